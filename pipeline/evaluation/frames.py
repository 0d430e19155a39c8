"""What detection is evaluated on: frames with true positions, from files, one at a time."""

import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import PipelineError
from pipeline.evaluation.score import Positions, groups_of, regions_of
from pipeline.formats.pictures import paired, read_mask, read_picture
from pipeline.formats.recording import open_recording
from pipeline.physics.sensor import Sensor


class TrueFrame(NamedTuple):
    """Counts (H, W), where the targets or groups of targets are (N, 2), and a name."""

    pixels_HW: NDArray[Any]
    true_xy_px: Positions
    name: str


class Frames(ABC):
    """Frames of one camera, one following the other in time, or of many: not `in_sequence`."""

    sensor: Sensor
    in_sequence: bool

    @abstractmethod
    def __iter__(self) -> Iterator[TrueFrame]: ...


class Pictures(Frames):
    """A folder of pictures, in the order of their names, and one of masks."""

    sensor = Sensor()
    in_sequence = False

    def __init__(self, pictures: Path, masks: Path) -> None:
        self._pairs, others = paired(pictures, masks)
        if others:
            names = ", ".join(path.name for path in others[:3]) + ("…" if len(others) > 3 else "")
            print(f"left out, no pictures: {names} ({len(others)} files)", file=sys.stderr)

    def __iter__(self) -> Iterator[TrueFrame]:
        for pair in self._pairs:
            pixels_HW = read_picture(pair.picture)
            mask_HW, scaled = read_mask(pair, pixels_HW.shape)
            if scaled:
                print(f"{pair.mask}: scaled to the size of its picture", file=sys.stderr)
            yield TrueFrame(pixels_HW, regions_of(mask_HW).xy_px, str(pair.picture))


class RecordedFrames(Frames):
    """A recording with truth; bad pixels as marked beside it, if they are."""

    in_sequence = True

    def __init__(self, path: Path) -> None:
        self._recording = open_recording(path)
        self.sensor = self._recording.sensor
        if self._recording.truth is None:
            raise PipelineError(f"{path}: holds no truth; detection is scored where it is known")
        self._truth = self._recording.truth
        if not len(self._recording):
            raise PipelineError(f"{path}: holds no frame; record some")
        self.shape = self._recording.shape

    def __iter__(self) -> Iterator[TrueFrame]:
        for index in range(len(self._recording)):
            true = groups_of(np.asarray(self._truth.of_frame(index)))
            yield TrueFrame(self._recording.frame(index), true, f"frame {index}")
