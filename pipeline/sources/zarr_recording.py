"""Frames from a zarr recording, or from a CSIST dataset laid out as a mosaic of its patches."""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import Any, Self

from numpy.typing import NDArray
from pydantic import Field

from pipeline.component import Settings, Source, configured_sensor
from pipeline.errors import PipelineError
from pipeline.formats import open_any
from pipeline.formats.mosaic import PITCH_PX, Mosaic
from pipeline.formats.recording import Recording
from pipeline.messages import Frame, FrameInfo, Tiling
from pipeline.pacing import Pace
from pipeline.physics.groups import SIZE_PX
from pipeline.physics.sensor import Sensor

READ_AHEAD = 8
"""Frames held ready: reading one takes 1–2 ms, so a thread does it while others are processed."""


class ZarrRecording(Source):
    """Plays a recording once, from its first frame to its last.

    A CSIST dataset becomes frames of 16 × 16 patches, marked as tiles, its truth moved with them.
    """

    class Config(Settings):
        """Which file, how fast."""

        path: Path
        rate_hz: float | None = Field(
            None, gt=0.0, description="frames/s; null: as fast as they are taken"
        )

    def __init__(
        self, recording: Recording | Mosaic, sensor: Sensor, rate_hz: float | None
    ) -> None:
        self.sensor = sensor
        self.shape = recording.shape
        self.length: int = len(recording)
        self.truth = recording.truth
        self._recording = recording
        self._tiling = Tiling(SIZE_PX, PITCH_PX) if isinstance(recording, Mosaic) else None
        self._rate_hz = rate_hz
        self._closed = Event()

    @classmethod
    def build(cls, config: Config, sensor: dict[str, Any]) -> Self:
        """Open the file; raises PipelineError if it is malformed or its frames are too small."""
        recording = open_any(config.path)
        height, width = recording.shape
        if min(height, width) < SIZE_PX:
            raise PipelineError(
                f"{config.path}: frames are {width}×{height} px, smaller than the "
                f"{SIZE_PX}×{SIZE_PX} window targets are unmixed in; record larger frames"
            )
        own = configured_sensor(recording.sensor, sensor, str(config.path))
        return cls(recording, own, config.rate_hz)

    def frames(self) -> Iterator[Frame]:
        """The frames in order; raises PipelineError naming the frame that cannot be read."""
        pace = Pace(self._rate_hz, self._closed)
        waiting: deque[Future[NDArray[Any]]] = deque()
        reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="read-ahead")
        try:
            for seq in range(self.length):
                for index in range(seq + len(waiting), min(seq + READ_AHEAD, self.length)):
                    waiting.append(reader.submit(self._recording.frame, index))
                pixels_HW = waiting.popleft().result()
                pace.wait(seq)
                if self._closed.is_set():
                    return
                yield Frame(self._info(seq), pixels_HW)
        finally:
            reader.shutdown(cancel_futures=True)

    def _info(self, seq: int) -> FrameInfo:
        return FrameInfo(
            seq=seq,
            sensor_id=self.sensor.id,
            t_exposure_ns=int(self._recording.timestamp_ns[seq]),
            clock="recording",
            shape=self.shape,
            tiling=self._tiling,
        )

    def close(self) -> None:
        """End `frames` at its next frame."""
        self._closed.set()
