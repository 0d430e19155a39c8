"""A scene that never ends: clouds, horizon, bad pixels and moving targets, made as it runs."""

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cached_property
from threading import Event
from typing import Any, Self

import numpy as np
from pydantic import Field

from pipeline.component import Settings, Source, Truth, configured_sensor
from pipeline.errors import PipelineError
from pipeline.messages import Frame, FrameInfo
from pipeline.pacing import Pace
from pipeline.physics.groups import SIZE_PX
from pipeline.physics.scene import Scene, SceneSettings

DEFAULT = SceneSettings()


class Synthetic(Source):
    """Frames of a `Scene`, stamped with the time of day.

    A consumer that is slower than the rate gets each frame when it asks; shedding is the runtime's
    affair. With `frames` set the source ends there and knows its truth; endless, it has none.
    """

    class Config(Settings):
        """Frame size, px; how many targets, how bright, how fast the frames come."""

        rate_hz: float | None = Field(
            None, ge=0.0, description="frames/s; null or 0: as fast as they are taken"
        )
        frames: int | None = Field(None, ge=1, description="how many; null: without end")
        seed: int = Field(DEFAULT.seed, ge=0)
        width: int = Field(DEFAULT.width, ge=SIZE_PX, le=16384)
        height: int = Field(DEFAULT.height, ge=SIZE_PX, le=16384)
        singles: int = Field(DEFAULT.singles, ge=0, le=1000)
        groups: int = Field(DEFAULT.groups, ge=0, le=1000)
        snr: tuple[float, float] = Field(DEFAULT.snr, description="lowest and highest peak SNR")

    def __init__(
        self, config: Config, sensor: dict[str, Any], utc_ns: Callable[[], int] = time.time_ns
    ) -> None:
        if not 0.0 < config.snr[0] <= config.snr[1]:
            raise PipelineError(
                f"source.snr must be lowest, highest, both positive, got {list(config.snr)}"
            )
        own = replace(DEFAULT.sensor, id="synthetic")
        fields = config.model_dump(exclude={"rate_hz", "frames"})
        self.sensor = configured_sensor(own, sensor, "source synthetic")
        try:
            self._scene = Scene(SceneSettings(sensor=self.sensor, **fields))
        except ValueError as error:
            raise PipelineError(f"source synthetic: {error}") from error
        self.shape = (config.height, config.width)
        self.length = config.frames
        self._pace_hz = config.rate_hz or None
        self._utc_ns = utc_ns
        self._closed = Event()

    @classmethod
    def build(cls, config: Config, sensor: dict[str, Any]) -> Self:
        """Draw the scene; raises PipelineError if its targets do not fit into the frame."""
        return cls(config, sensor)

    @cached_property
    def truth(self) -> Truth | None:  # type: ignore[override]  # worked out when asked for
        """Of all frames, if their number is limited."""
        if self.length is None:
            return None
        found = [self._scene.truth(index) for index in range(self.length)]
        return Truth(
            frame_index=np.repeat(np.arange(len(found)), [len(one[0]) for one in found]).astype(
                np.int32
            ),
            target_id=np.concatenate([one[1] for one in found]),
            xy_px=np.concatenate([one[0] for one in found]),
            intensity=np.concatenate([one[2] for one in found]),
        )

    def frames(self) -> Iterator[Frame]:
        """The frames in order."""
        pace = Pace(self._pace_hz, self._closed)
        seq = 0
        while seq != self.length:
            pace.wait(seq)
            if self._closed.is_set():
                return
            info = FrameInfo(seq, self.sensor.id, self._utc_ns(), "utc", self.shape)
            yield Frame(info, self._scene.frame(seq).pixels_HW)
            seq += 1

    def close(self) -> None:
        """End `frames` at its next frame."""
        self._closed.set()
