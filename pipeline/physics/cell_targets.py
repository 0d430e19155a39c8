"""Reading networks that answer off the grid: for each cell the target in it, if there is one.

Such a map is (B, 7, cH, cW): the probability that a target's position lies in the cell, and, if
so, its x and y in px, its intensity, and the standard deviations of these three. A target whose
cell is uncertain has its probability spread over several; what belongs together is gathered here.
"""

import numpy as np
from numpy.typing import NDArray

from pipeline.physics.grid import Peaks

Vector = NDArray[np.float64]

REACH_CELLS = 0.9
"""Cells that say a target at most so far apart speak of the same one."""

SPEAKING = 32
"""Cells of a patch that are heard, those of the highest probability: so many targets at most."""


def read_cell_targets(map_BCHW: NDArray[np.floating], c: int) -> Peaks:
    """As many targets in each patch as its probabilities add up to, rounded.

    The most probable cell first: it and its nearest within REACH_CELLS, until their probabilities
    add up to 1, are a target; its figures are their weighted means. Then the same of what is left.
    """
    batch, channels, height, width = map_BCHW.shape
    flat = map_BCHW.reshape(batch, channels, height * width)
    heard = min(SPEAKING, height * width)
    number = np.clip(np.rint(flat[:, 0].sum(axis=1)), 0, heard).astype(np.int64)
    loudest = np.argpartition(flat[:, 0], -heard, axis=1)[:, -heard:]
    cells = np.take_along_axis(flat, loudest[:, None], axis=2).astype(np.float64)  # (B, 7, M)
    left = np.clip(cells[:, 0], 0.0, 1.0)
    parts: list[Peaks] = []
    for rank in range(int(number.max(initial=0))):
        row = np.flatnonzero(number > rank)
        weight = _gathered(left[row], cells[row, 1:3], REACH_CELLS / c)
        left[row] -= weight
        parts.append(_mean(row, weight, cells[row]))
    if not parts:
        parts = [_mean(number[:0], left[:0], cells[:0])]
    joined = Peaks(*map(np.concatenate, zip(*parts, strict=True)))
    return joined.take(np.argsort(joined.image, kind="stable"))


def _gathered(left: Vector, xy_px: Vector, reach_px: float) -> Vector:
    """Of the probabilities left (B, M), those of the next target: at most 1 in all."""
    seed = left.argmax(axis=1)[:, None]
    away = np.hypot(
        *(xy_px[:, axis] - np.take_along_axis(xy_px[:, axis], seed, axis=1) for axis in (0, 1))
    )
    order = np.argsort(away, axis=1)
    near = np.where(away <= reach_px, left, 0.0)
    outwards = np.take_along_axis(near, order, axis=1)
    room = np.clip(1.0 - (np.cumsum(outwards, axis=1) - outwards), 0.0, None)
    taken = np.empty_like(left)
    np.put_along_axis(taken, order, np.minimum(outwards, room), axis=1)
    return taken


def _mean(row: NDArray[np.int64], weight: Vector, cells: Vector) -> Peaks:
    """One target for each patch from its cells (B, 7, M) and their weights (B, M)."""
    total = np.minimum(weight.sum(axis=1), 1.0)  # which rounding may pass
    share = weight / np.maximum(total, 1e-12)[:, None]
    x, y, intensity = means = [np.sum(share * cells[:, k], axis=1) for k in (1, 2, 3)]
    dx, dy, di = (cells[:, k] - mean[:, None] for k, mean in enumerate(means, start=1))
    xx, xy, yy, ii = (
        np.sum(share * value, axis=1)
        for value in (
            cells[:, 4] ** 2 + dx**2,
            dx * dy,
            cells[:, 5] ** 2 + dy**2,
            cells[:, 6] ** 2 + di**2,
        )
    )
    return Peaks(
        image=row,
        xy_px=np.stack([x, y], axis=1),
        intensity=intensity,
        value=total,
        p_exist=total,
        cov_px2=np.stack([xx, xy, yy], axis=1),
        intensity_sigma=np.sqrt(ii),
    )
