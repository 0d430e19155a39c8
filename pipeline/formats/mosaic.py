"""A CSIST dataset laid out as frames: what a recording of all its patches would look like.

A frame is 16 × 16 tiles of 11 px at a pitch of 16 px; tile (row r, column q) begins at pixel
(16 q, 16 r) and holds image 256 · frame + 16 r + q. Gutters and tiles past the last image hold the
dataset's background.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.formats.csist import CsistDataset
from pipeline.formats.recording import Truth
from pipeline.physics.groups import MAX_TARGETS, SIZE_PX
from pipeline.physics.sensor import Sensor

PITCH_PX = 16
TILES_A_SIDE = 16
TILES_A_FRAME = TILES_A_SIDE**2
INTERVAL_NS = 10_000_000


@dataclass(frozen=True)
class Mosaic:
    """A dataset with the face of a `Recording`."""

    dataset: CsistDataset

    def __len__(self) -> int:
        return -(-len(self.dataset) // TILES_A_FRAME)

    @property
    def shape(self) -> tuple[int, int]:
        """H, W of every frame."""
        return TILES_A_SIDE * PITCH_PX, TILES_A_SIDE * PITCH_PX

    @property
    def sensor(self) -> Sensor:
        """Of the dataset."""
        return self.dataset.sensor

    @cached_property
    def timestamp_ns(self) -> NDArray[np.int64]:
        """(T,) as if recorded at 100 frames/s."""
        return np.arange(len(self), dtype=np.int64) * INTERVAL_NS

    @cached_property
    def truth(self) -> Truth:
        """Targets in frame coordinates, numbered through the dataset."""
        image, rank = np.nonzero(np.arange(MAX_TARGETS) < self.dataset.target_count[:, None])
        frame, tile = np.divmod(image, TILES_A_FRAME)
        row, column = np.divmod(tile, TILES_A_SIDE)
        origin_px = np.stack([column, row], axis=1) * PITCH_PX
        return Truth(
            frame_index=frame.astype(np.int32),
            target_id=np.arange(len(image), dtype=np.int32),
            xy_px=origin_px + self.dataset.target_xy_px[image, rank].astype(np.float64),
            intensity=self.dataset.target_intensity[image, rank],
        )

    def frame(self, index: int) -> NDArray[Any]:
        """Counts (H, W) of one frame."""
        images = self.dataset.image[index * TILES_A_FRAME : (index + 1) * TILES_A_FRAME]
        level = int(np.clip(np.rint(self.dataset.background), 0, self.sensor.full_scale))
        tiles = np.full((TILES_A_FRAME, PITCH_PX, PITCH_PX), level, dtype=images.dtype)
        tiles[: len(images), :SIZE_PX, :SIZE_PX] = images
        grid = tiles.reshape(TILES_A_SIDE, TILES_A_SIDE, PITCH_PX, PITCH_PX)
        return grid.swapaxes(1, 2).reshape(self.shape)
