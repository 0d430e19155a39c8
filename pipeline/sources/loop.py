"""A recording played again and again from memory, at changing rates: to measure live runs."""

import time
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from threading import Event
from typing import Annotated, Any, Self

from numpy.typing import NDArray
from pydantic import Field

from pipeline.component import Settings, Source, configured_sensor
from pipeline.errors import PipelineError
from pipeline.formats.recording import open_recording
from pipeline.messages import Frame, FrameInfo
from pipeline.pacing import Pace
from pipeline.physics.sensor import Sensor

MAX_BYTES = 1 << 30
Seconds = Annotated[float, Field(gt=0.0, le=1e7)]
RateHz = Annotated[float, Field(gt=0.0, le=1e6)]


class Loop(Source):
    """Frames of a recording, stamped with the time of day; they cost no reading."""

    class Config(Settings):
        """Which file; `phases`: seconds and frames/s, one after another, then the source ends."""

        path: Path
        phases: tuple[tuple[Seconds, RateHz], ...] = Field(min_length=1)

    def __init__(
        self,
        frames: list[NDArray[Any]],
        sensor: Sensor,
        phases: tuple[tuple[float, float], ...],
        utc_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        self.sensor = sensor
        self.shape = frames[0].shape[0], frames[0].shape[1]
        self._frames, self._phases, self._utc_ns = frames, phases, utc_ns
        self.length = sum(round(seconds * rate_hz) for seconds, rate_hz in phases)
        self._closed = Event()

    @classmethod
    def build(cls, config: Config, sensor: dict[str, Any]) -> Self:
        """Read the recording; raises PipelineError if it is malformed or larger than 1 GiB."""
        recording = open_recording(config.path)
        own = configured_sensor(recording.sensor, sensor, str(config.path))
        size = recording.stored.nbytes
        if not 0 < size <= MAX_BYTES:
            raise PipelineError(f"{config.path}: {size} bytes of frames, must be 1…{MAX_BYTES}")
        frames = [recording.frame(index) for index in range(len(recording))]
        return cls(frames, own, config.phases)

    def frames(self) -> Iterator[Frame]:
        """The frames in order; a phase begins when the one before it is over."""
        numbers = count()
        for seconds, rate_hz in self._phases:
            pace = Pace(rate_hz, self._closed)
            for index in range(round(seconds * rate_hz)):
                pace.wait(index)
                if self._closed.is_set():
                    return
                seq = next(numbers)
                info = FrameInfo(seq, self.sensor.id, self._utc_ns(), "utc", self.shape)
                yield Frame(info, self._frames[seq % len(self._frames)])

    def close(self) -> None:
        """End `frames` at its next frame."""
        self._closed.set()
