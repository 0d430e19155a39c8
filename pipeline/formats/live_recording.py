"""A recording that can be read while it is written, and after whatever ended the writing."""

import os
from pathlib import Path
from typing import Any

import zarr
from numpy.typing import NDArray

from pipeline.errors import PipelineError, RunError
from pipeline.formats import _checks
from pipeline.formats.recording import COMPLETE, FORMAT, NOT_WRITTEN, UNFINISHED, open_recording
from pipeline.formats.recording_folder import leads_to, lost
from pipeline.physics.sensor import Sensor

TIMES_A_CHUNK = 256
FARTHEST_NS = 1 << 62
"""146 years, either way: no exposure is that far, and frames after it have room."""


class LiveRecordingWriter:
    """Appends frames to a recording at `path`, in place.

    A frame counts once its time is written, after its pixels: a process that is killed leaves a
    recording of all whole frames. Raises PipelineError if `path` exists, RunError if it cannot be
    written, or is moved or removed meanwhile: zarr alone would make its folders again.
    """

    def __init__(self, path: Path, shape: tuple[int, int], sensor: Sensor) -> None:
        self.path, self.count, self.pixel_bytes = path, 0, 0
        self._last_ns: int | None = None
        if path.exists():
            raise PipelineError(f"{path}: exists already; remove it or choose another name")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            group = zarr.open_group(str(path), mode="w-", zarr_format=3)
            self._times = group.create_array(
                "timestamp_ns",
                shape=(TIMES_A_CHUNK,),
                chunks=(TIMES_A_CHUNK,),
                dtype="int64",
                fill_value=NOT_WRITTEN,
            )
            self._frames = group.create_array(
                "frame",
                shape=(TIMES_A_CHUNK, *shape),
                chunks=(1, *shape),
                dtype=_checks.dtype_for(sensor),
                attributes={UNFINISHED: True},
                config={"write_empty_chunks": True},
            )
            group.attrs.update(
                {
                    "format": FORMAT,
                    "format_version": _checks.FORMAT_VERSION,
                    "sensor": sensor.to_attributes(),
                }
            )
            # Held open, so that no file made later has its inode number. Zarr writes it no more.
            self._group_file = os.open(path / "zarr.json", os.O_RDONLY)
        except OSError as error:
            raise self._failed(error) from error

    def following(self, timestamp_ns: int) -> int:
        """This time, or the nearest that a frame can have here.

        Time advances in a recording, and lies within ±FARTHEST_NS.
        """
        nearest_ns = max(-FARTHEST_NS, min(timestamp_ns, FARTHEST_NS))
        return nearest_ns if self._last_ns is None else max(nearest_ns, self._last_ns + 1)

    def append(self, pixels_HW: NDArray[Any], timestamp_ns: int) -> None:
        """Add a frame; raises ValueError if its time does not advance, or is too far."""
        if timestamp_ns != self.following(timestamp_ns):
            raise ValueError(f"timestamp {timestamp_ns} ns does not follow the last frame's")
        self._refuse_lost()
        try:
            if self.count == self._times.shape[0]:
                room = 2 * self.count
                self._frames.resize((room, *self._frames.shape[1:]))
                self._times.resize((room,))
            self._frames[self.count] = pixels_HW.astype(self._frames.dtype, copy=False)
            self._times[self.count] = timestamp_ns
        except OSError as error:
            raise self._failed(error) from error
        self._last_ns = timestamp_ns
        self.count += 1
        self.pixel_bytes += pixels_HW.nbytes

    def close(self) -> None:
        """Cut the recording to its length: it is as any other then.

        Raises RunError if it cannot be read.
        """
        try:
            self._refuse_lost()
            self._times.resize((self.count,))
            self._frames.resize((self.count, *self._frames.shape[1:]))
            self._refuse_unreadable()
            self._frames.attrs.update({UNFINISHED: False, COMPLETE: True})
        except OSError as error:
            raise self._failed(error) from error
        finally:
            os.close(self._group_file)

    def _refuse_lost(self) -> None:
        if not leads_to(self.path / "zarr.json", self._group_file):
            raise lost(self.path)

    def _refuse_unreadable(self) -> None:
        try:
            times = open_recording(self.path).timestamp_ns
        except PipelineError as error:
            raise RunError(f"recorded, but not readable: {error}") from error
        first = Path(self._frames.metadata.encode_chunk_key((0, 0, 0)))  # c/0/0/0
        chunks = self.path / "frame" / first.parents[2]
        number = len(list(chunks.iterdir())) if self.count else 0
        if len(times) != self.count or number < self.count:
            raise lost(self.path)

    def _failed(self, error: OSError) -> RunError:
        return RunError(f"{self.path}: cannot be written ({_checks.first_line(error)})")
