"""Recordings: frames with their timestamps and, if known, the truth, as a zarr group.

Arrays: frame uint8|uint16 (T, H, W), one frame a chunk; timestamp_ns int64 (T,). Optional truth:
truth/frame_index int32 (M,), truth/target_id int32 (M,), truth/xy_px float64 (M, 2),
truth/intensity float32 (M,). Attributes: format "irst-recording", format_version, sensor.
"""

from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import zarr
from numpy.typing import ArrayLike, NDArray

from pipeline.errors import PipelineError
from pipeline.formats import _checks
from pipeline.physics.sensor import Sensor

FORMAT = "irst-recording"
COMPLETE = "every_chunk_stored"
"""Attribute of `frame`: even black frames have a chunk, so an absent chunk is a lost frame."""
UNFINISHED = "unfinished"
"""Attribute of `frame`: being written, or cut off; ends where `timestamp_ns` is NOT_WRITTEN."""
NOT_WRITTEN = np.iinfo(np.int64).min


@dataclass(frozen=True)
class Truth:
    """Where the targets of a recording truly are, for scoring."""

    frame_index: NDArray[np.int32]  # (M,) which frame, counted from 0
    target_id: NDArray[np.int32]  # (M,)
    xy_px: NDArray[np.float64]  # (M, 2)
    intensity: NDArray[np.float32]  # (M,) counts

    def of_frame(self, index: int) -> NDArray[np.float64]:
        """Positions (m, 2) px in frame `index`."""
        found: NDArray[np.float64] = self.xy_px[self.frame_index == index]
        return found


@dataclass(frozen=True)
class Recording:
    """An open recording; frames are read when asked for."""

    path: Path
    sensor: Sensor
    timestamp_ns: NDArray[np.int64]  # (T,) increasing
    truth: Truth | None
    stored: zarr.Array[Any]  # (T, H, W)

    def __len__(self) -> int:
        return len(self.timestamp_ns)

    @property
    def shape(self) -> tuple[int, int]:
        """H, W of every frame."""
        return self.stored.shape[1], self.stored.shape[2]

    def frame(self, index: int) -> NDArray[Any]:
        """Counts (H, W) of one frame; raises PipelineError naming a frame that is damaged."""
        remedy = "its chunk is damaged: copy or record it again"
        with _checks.named(self.path, f"frame {index}", remedy):
            pixels = np.asarray(self.stored[index])
        return pixels.astype(pixels.dtype.newbyteorder("="), copy=False)


def open_recording(path: Path) -> Recording:
    """Open and check a recording; raises PipelineError naming what is malformed."""
    return recording_from(path, _checks.open_group(path))


def recording_from(path: Path, group: zarr.Group) -> Recording:
    """`open_recording` of a group that is open already."""
    _checks.check_format(path, group, FORMAT)
    described = _checks.attribute(path, group.attrs.asdict(), "sensor")
    if not isinstance(described, dict):
        raise PipelineError(f"{path}: attribute `sensor` must be a map, got {described!r}")
    sensor = _checks.sensor_from(path, described, "sensor.")
    stored = _checks.array(path, group, "frame", _checks.UNSIGNED, (None, None, None))
    if stored.attrs.get(COMPLETE) and stored.nchunks_initialized < stored.nchunks:
        raise PipelineError(
            f"{path}: array `frame` lacks {stored.nchunks - stored.nchunks_initialized} of its "
            f"{stored.nchunks} chunks; copy the recording again"
        )
    unfinished = bool(stored.attrs.get(UNFINISHED))
    length = None if unfinished else stored.shape[0]
    timestamp_ns = _checks.values(path, group, "timestamp_ns", "int64", (length,))
    if unfinished:
        blank = np.flatnonzero(timestamp_ns == NOT_WRITTEN)
        timestamp_ns = timestamp_ns[: blank[0] if len(blank) else stored.shape[0]]
    late = np.zeros(len(timestamp_ns), dtype=np.bool_)
    late[1:] = timestamp_ns[1:] <= timestamp_ns[:-1]
    _checks.refuse(path, "timestamp_ns", "must increase from frame to frame", late)
    return Recording(path, sensor, timestamp_ns, _read_truth(path, group), stored)


def _read_truth(path: Path, group: zarr.Group) -> Truth | None:
    with _checks.named(path, "group `truth`", "write the recording again"):
        found = group.get("truth")
    if found is None:
        return None
    if not isinstance(found, zarr.Group):
        raise PipelineError(f"{path}: `truth` must be a group, but it is an array")
    frame_index = _checks.values(path, group, "truth/frame_index", "int32", (None,))
    number = len(frame_index)
    truth = Truth(
        frame_index=frame_index,
        target_id=_checks.values(path, group, "truth/target_id", "int32", (number,)),
        xy_px=_checks.values(path, group, "truth/xy_px", "float64", (number, 2)),
        intensity=_checks.values(path, group, "truth/intensity", "float32", (number,)),
    )
    frames = group["frame"].shape[0]  # type: ignore[union-attr]  # checked to be an array
    outside = (frame_index < 0) | (frame_index >= frames)
    rule = f"must lie in 0…{frames - 1}, the frames there are"
    _checks.refuse(path, "truth/frame_index", rule, outside)
    lost = ~np.isfinite(truth.xy_px).all(axis=1)
    _checks.refuse(path, "truth/xy_px", "must be finite", lost)
    _checks.refuse(path, "truth/intensity", "must be finite", ~np.isfinite(truth.intensity))
    return truth


class RecordingWriter:
    """Writes a recording frame by frame; it appears at `path` when closed, or not at all.

    with RecordingWriter(path, (512, 640), sensor) as writer:
        for ...: writer.append(pixels_HW, timestamp_ns, xy_px=..., target_id=..., intensity=...)

    An exception inside the block removes what was written. dtype is uint8 up to full scale 255,
    else uint16. The truth is stored if any frame came with it. Raises PipelineError if `path`
    exists or cannot be written.
    """

    def __init__(self, path: Path, shape: tuple[int, int], sensor: Sensor) -> None:
        self.count = 0
        self._full_scale = sensor.full_scale
        self._timestamp_ns: list[int] = []
        self._truth: list[tuple[NDArray[Any], ...]] = []
        self._new = _checks.NewGroup(path)
        group = self._new.group
        with self._new.all_or_nothing():
            group.attrs.update(
                {
                    "format": FORMAT,
                    "format_version": _checks.FORMAT_VERSION,
                    "sensor": sensor.to_attributes(),
                }
            )
            self._frames = group.create_array(
                "frame",
                shape=(0, *shape),
                chunks=(1, *shape),
                dtype=_checks.dtype_for(sensor),
                attributes={COMPLETE: True},
                config={"write_empty_chunks": True},
            )

    def append(
        self,
        pixels_HW: NDArray[Any],
        timestamp_ns: int,
        *,
        xy_px: ArrayLike | None = None,
        target_id: ArrayLike | None = None,
        intensity: ArrayLike | None = None,
    ) -> None:
        """Add a frame and, if known, its targets: xy_px (m, 2), target_id (m,), intensity (m,).

        Raises ValueError if the frame is not unsigned, has another shape than the recording or
        exceeds full scale, if time does not advance, or if the truth is incomplete.
        """
        shape = self._frames.shape[1:]
        if pixels_HW.shape != shape or pixels_HW.dtype.name not in _checks.UNSIGNED:
            raise ValueError(
                f"frames here are {' or '.join(_checks.UNSIGNED)} of shape {shape}, "
                f"got {pixels_HW.dtype} {pixels_HW.shape}"
            )
        if pixels_HW.max() > self._full_scale:
            raise ValueError(f"frame exceeds full scale {self._full_scale}: {pixels_HW.max()}")
        if self._timestamp_ns and timestamp_ns <= self._timestamp_ns[-1]:
            raise ValueError(f"timestamp {timestamp_ns} ns does not follow the last frame's")
        rows = None if xy_px is None else _truth_rows(xy_px, target_id, intensity)
        with self._new.all_or_nothing():
            if self.count == self._frames.shape[0]:  # room for twice as many
                room = max(2 * self.count, 64)
                self._frames.resize((room, *shape))
            self._frames[self.count] = pixels_HW.astype(self._frames.dtype, copy=False)
        if rows is not None:
            index = np.full(len(rows[0]), self.count, dtype=np.int32)
            self._truth.append((index, *rows))
        self._timestamp_ns.append(timestamp_ns)
        self.count += 1

    def close(self) -> None:
        """Finish the recording and give it its name."""
        group = self._new.group
        with self._new.all_or_nothing():
            self._frames.resize((self.count, *self._frames.shape[1:]))
            group.create_array("timestamp_ns", data=np.array(self._timestamp_ns, dtype=np.int64))
            if self._truth:
                names = ("frame_index", "target_id", "xy_px", "intensity")
                columns = [np.concatenate(column) for column in zip(*self._truth, strict=True)]
                truth = group.create_group("truth")
                for name, column in zip(names, columns, strict=True):
                    truth.create_array(name, data=column)
            self._new.commit()

    def discard(self) -> None:
        """Remove what was written."""
        self._new.discard()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.discard()


def _truth_rows(
    xy_px: ArrayLike, target_id: ArrayLike | None, intensity: ArrayLike | None
) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    xy = np.asarray(xy_px, dtype=np.float64).reshape(-1, 2)
    if target_id is None or intensity is None:
        raise ValueError("xy_px needs target_id and intensity beside it")
    identity = np.asarray(target_id, dtype=np.int32).reshape(-1)
    bright = np.asarray(intensity, dtype=np.float32).reshape(-1)
    if not len(xy) == len(identity) == len(bright):
        raise ValueError(f"{len(xy)} positions, {len(identity)} ids, {len(bright)} intensities")
    return identity, xy, bright
