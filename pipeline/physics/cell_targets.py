"""Reading networks that answer off the grid: for each cell the target in it, if there is one.

Such a map is (B, 7 c², H, W). The c × c cells of a pixel are channels of it, row by row, for each
of: the log-odds that a target's position lies in the cell, and, if so, its offset from the cell's
centre, x and y, in cells, its intensity, and the logarithms of the Laplace scales of these three.
A target whose cell is uncertain has its probability spread over several; what belongs together is
gathered here. Only the few cells that may hold a target are turned into pixels and counts.
"""

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit, ndtr

from pipeline.physics.grid import Peaks, cell_centres_px

Vector = NDArray[np.float64]

CHANNELS = 7
LOG_SCALES = (-6.0, 3.0)
"""Between these a network may say how sure it is."""

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
    map_BCHW: NDArray[np.floating], c: int, sigma_px: float, count_spread: CountSpread
) -> Peaks:
    """Targets of each patch, the surest first, and one more where it is not sure there is none.

    The most probable cell first: it and its nearest within REACH_SIGMA, until their probabilities
    add up to 1, are a target; its figures are their weighted means. Then the same of what is left.
    `p_exist` is what was gathered: that there is a target thereabouts. `p_count` of the k-th is the
    probability of k or more in the patch, so its differences are the probabilities of the counts,
    and those of at least a half are as many targets as the cells' probabilities add up to, rounded.
    """
    p = cell_probability(map_BCHW, c)
    heard = min(SPEAKING, p.shape[1])
    more = count_at_least(p, heard, count_spread)  # (B, heard)
    number = np.minimum((more >= 0.5).sum(axis=1) + 1, (more >= SPARE).sum(axis=1))
    cells = _loudest(map_BCHW, p, heard, c)  # (B, 7, heard)
    left = cells[:, 0].copy()
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


def cell_probability(map_BCHW: NDArray[np.floating], c: int) -> Vector:
    """Probability (B, c² H W) that a target is in each cell, the cells in the map's own order."""
    batch, _, height, width = map_BCHW.shape
    odds = map_BCHW[:, : c * c].reshape(batch, c * c * height * width)
    p: Vector = expit(odds.astype(np.float64))
    return p


def _loudest(map_BCHW: NDArray[np.floating], p: Vector, heard: int, c: int) -> Vector:
    """The most probable cells (B, 7, heard): p, x px, y px, intensity, and their deviations."""
    batch, _, height, width = map_BCHW.shape
    place = np.argpartition(p, -heard, axis=1)[:, -heard:]
    said = map_BCHW.reshape(batch, CHANNELS, c * c * height * width)
    said = np.take_along_axis(said, place[:, None], axis=2).astype(np.float64)
    cell, pixel = np.divmod(place, height * width)
    centre = cell_centres_px(1, c)
    deviation = np.sqrt(2.0) * np.exp(np.clip(said[:, 4:], *LOG_SCALES))  # of a Laplace variable
    return np.stack(
        [
            np.take_along_axis(p, place, axis=1),
            pixel % width + centre[cell % c] + said[:, 1] / c,
            pixel // width + centre[cell // c] + said[:, 2] / c,
            said[:, 3],
            deviation[:, 0] / c,
            deviation[:, 1] / c,
            deviation[:, 2],
        ],
        axis=1,
    )


def count_at_least(
    p_BM: NDArray[np.floating], most: int, count_spread: CountSpread
) -> NDArray[np.float64]:
    """Probability (B, most) that a patch holds at least 1, 2, … targets, of its cells' p (B, M)."""
    p = p_BM.astype(np.float64)
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
