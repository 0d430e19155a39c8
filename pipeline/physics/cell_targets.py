"""Reading networks that answer off the grid: for each cell the target in it, if there is one.

Such a map is (B, 7, cH, cW): the probability that a target's position lies in the cell, and, if
so, its x and y in px, its intensity, and the standard deviations of these three. A target whose
cell is uncertain has its probability spread over several; what belongs together is gathered here.
"""

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr

from pipeline.physics.grid import Peaks

Vector = NDArray[np.float64]

REACH_SIGMA = 0.6
"""Cells that say a target at most so many σ of the PSF apart speak of the same one: six tenths of
the least separation the networks are trained for."""

SPEAKING = 32
"""Cells of a patch that are heard, those of the highest probability: so many targets at most."""

SPARE = 0.02
"""A target more than the count says is read too if it is at least this probable."""

SILENCE = 0.01
"""Probability that must be left for a target to be read from it."""

CountSpread = tuple[float, float]
"""a, b: the number of targets is normal about the sum of the probabilities p, rounded to whole
numbers, with variance a + b Σ p(1 − p); of each engine, measured when it is exported."""


def read_cell_targets(
    map_BCHW: NDArray[np.floating], sigma_px: float, count_spread: CountSpread
) -> Peaks:
    """Targets of each patch, the surest first, and one more where it is not sure there is none.

    The most probable cell first: it and its nearest within REACH_SIGMA, until their probabilities
    add up to 1, are a target; its figures are their weighted means. Then the same of what is left.
    `p_exist` is what was gathered: that there is a target thereabouts. `p_count` of the k-th is the
    probability of k or more in the patch, so its differences are the probabilities of the counts,
    and those of at least a half are as many targets as the cells' probabilities add up to, rounded.
    """
    batch, channels, height, width = map_BCHW.shape
    flat = map_BCHW.reshape(batch, channels, height * width)
    heard = min(SPEAKING, height * width)
    more = count_at_least(flat[:, 0], heard, count_spread)  # (B, heard)
    number = np.minimum((more >= 0.5).sum(axis=1) + 1, (more >= SPARE).sum(axis=1))
    loudest = np.argpartition(flat[:, 0], -heard, axis=1)[:, -heard:]
    cells = np.take_along_axis(flat, loudest[:, None], axis=2).astype(np.float64)  # (B, 7, M)
    left = np.clip(cells[:, 0], 0.0, 1.0)
    parts: list[Peaks] = []
    for rank in range(int(number.max(initial=0))):
        row = np.flatnonzero(number > rank)
        weight = _gathered(left[row], cells[row, 1:3], REACH_SIGMA * sigma_px)
        left[row] -= weight
        told = weight.sum(axis=1) > SILENCE
        row, weight = row[told], weight[told]
        parts.append(_mean(row, weight, cells[row], more[row, rank]))
    if not parts:
        parts = [_mean(number[:0], left[:0], cells[:0], more[:0, 0])]
    joined = Peaks(*map(np.concatenate, zip(*parts, strict=True)))
    return joined.take(np.argsort(joined.image, kind="stable"))


def count_at_least(
    p_BM: NDArray[np.floating], most: int, count_spread: CountSpread
) -> NDArray[np.float64]:
    """Probability (B, most) that a patch holds at least 1, 2, … targets, of its cells' p (B, M)."""
    p = np.clip(p_BM, 0.0, 1.0).astype(np.float64)
    a, b = count_spread
    deviation = np.sqrt(a + b * np.sum(p * (1.0 - p), axis=1))[:, None]
    result: NDArray[np.float64] = ndtr(
        (p.sum(axis=1)[:, None] - (np.arange(most) + 0.5)) / deviation
    )
    return result


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


def _mean(row: NDArray[np.int64], weight: Vector, cells: Vector, p_count: Vector) -> Peaks:
    """One target for each patch from its cells (B, 7, M) and their weights (B, M)."""
    gathered = np.minimum(weight.sum(axis=1), 1.0)  # which rounding may pass
    share = weight / np.maximum(gathered, 1e-12)[:, None]
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
        value=p_count,
        p_exist=gathered,
        p_count=p_count,
        cov_px2=np.stack([xx, xy, yy], axis=1),
        intensity_sigma=np.sqrt(ii),
    )
