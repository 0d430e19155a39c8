# mypy: allow-untyped-defs, allow-untyped-calls
# ruff: noqa: ANN001, ANN202
"""Reading networks that answer off the grid: for each cell the target in it, if there is one.

Such a map is (B, 7 c², H, W). The c × c cells of a pixel are channels of it, row by row, for each
of: the log-odds that a target's position lies in the cell, and, if so, its offset from the cell's
centre, x and y, in cells, its intensity, and the logarithms of the Laplace scales of these three.
A target whose cell is uncertain has its probability spread over several; what belongs together is
gathered here. Only the few cells that may hold a target are turned into pixels and counts.
"""

import math

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit, ndtr

from pipeline.physics.candidates import LIKELY
from pipeline.physics.compiled import compiled
from pipeline.physics.grid import Peaks

_ROOT2 = math.sqrt(2.0)

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

NEVER = -18.0
"""Log-odds of cells that are taken as empty, 1.5e-8: three quarters of a patch's."""

SILENCE = 0.01
"""Probability that must be left for a target to be read from it."""

CountSpread = tuple[float, float]
"""a, b: the number of targets is normal about the sum of the probabilities p, rounded to whole
numbers, with variance a + b Σ p(1 − p)."""


def read_cell_targets(
    map_BCHW: NDArray[np.floating],
    c: int,
    sigma_px: float,
    count_spread: CountSpread,
    position_spread: float = 1.0,
    intensity_spread: float = 1.0,
    most: int = SPEAKING,
) -> Peaks:
    """Targets of each patch, the surest first, and one more where it is not sure there is none.

    The most probable cell first: it and its nearest within REACH_SIGMA, until their probabilities
    add up to 1, are a target; its figures are their weighted means. Then the same of what is left.
    `p_exist` is what was gathered: that there is a target thereabouts. `p_count` of the k-th is the
    probability of k or more in the patch, so its differences are the probabilities of the counts,
    and those of at least a half are as many targets as the cells' probabilities add up to, rounded.
    count_spread, position_spread, intensity_spread: as measured of the engine (engines/spread.py).
    most: of a patch.
    """
    batch, _, height, width = map_BCHW.shape
    flat = np.ascontiguousarray(map_BCHW).reshape(batch, CHANNELS, c * c * height * width)
    spread = (*count_spread, position_spread, math.sqrt(intensity_spread))
    return Peaks(*_read(flat, c, width, REACH_SIGMA * sigma_px, spread, most))


def count_at_least(
    p_BM: NDArray[np.floating], most: int, count_spread: CountSpread
) -> NDArray[np.float64]:
    """Probability (B, most) that a patch holds at least 1, 2, … targets, of its cells' p (B, M)."""
    p_BM = p_BM.astype(np.float64)
    total = p_BM.sum(axis=1)
    variance = count_spread[0] + count_spread[1] * (p_BM * (1.0 - p_BM)).sum(axis=1)
    more = (np.arange(most) + 0.5 - total[:, None]) / np.sqrt(variance)[:, None]
    result: NDArray[np.float64] = ndtr(-more)
    return result


def cell_probability(map_BCHW: NDArray[np.floating], c: int) -> NDArray[np.float64]:
    """Probability (B, c² H W) that a target is in each cell, the cells in the map's own order."""
    batch, _, height, width = map_BCHW.shape
    odds = map_BCHW[:, : c * c].reshape(batch, c * c * height * width).astype(np.float64)
    result: NDArray[np.float64] = expit(odds)
    return result


def compile_reading() -> None:
    """Have the reading compiled, or got from its cache, now instead of with the first maps."""
    read_cell_targets(np.zeros((0, CHANNELS, 1, 1), np.float32), 1, 1.0, (1.0, 0.0))


@compiled
def _read(maps, c, width, reach, spread, most):
    """Of maps (B, 7, cells) the fields of `Peaks`; spread: of the count, a and b, and the factors.

    The latter are on the variances of positions and the deviations of intensities.
    """
    room = min(SPEAKING, maps.shape[2])
    place, p = np.empty(maps.shape[2], np.int64), np.empty(maps.shape[2])
    loud, left = np.empty(room, np.int64), np.empty(room)
    x, y = np.empty(room), np.empty(room)
    near, away, weight = np.empty(room, np.int64), np.empty(room), np.empty(room)
    size = len(maps) * room
    image, xy_px, intensity = np.empty(size, np.int64), np.empty((size, 2)), np.empty(size)
    p_exist, p_count = np.empty(size), np.empty(size)
    cov_px2, sigma = np.empty((size, 3)), np.empty(size)
    found = 0
    for b in range(len(maps)):
        possible, total, variance = _listen(maps[b, 0], place, p)
        heard = _loudest(place[:possible], p, loud, left)
        _locate(maps[b], loud[:heard], c, width, x, y)
        deviation = math.sqrt(spread[0] + spread[1] * variance)
        first = found
        for rank in range(room):
            more = 0.5 * math.erfc((rank + 0.5 - total) / deviation / _ROOT2)
            if not more >= SPARE or found - first == most:
                break
            cells, gathered = _gather(left[:heard], x, y, reach, near, away, weight)
            if gathered > SILENCE:
                image[found], p_count[found], p_exist[found] = b, more, gathered
                intensity[found], sigma[found] = _mean(
                    maps[b], loud, x, y, near[:cells], weight, gathered, c, spread, xy_px[found],
                    cov_px2[found],
                )  # fmt: skip
                found += 1
            if more < LIKELY:  # this was the one too many
                break
    return (
        image[:found], xy_px[:found], intensity[:found], p_count[:found], p_exist[:found],
        p_count[:found], cov_px2[:found], sigma[:found],
    )  # fmt: skip


@compiled
def _listen(odds, place, p):
    """Fill place and p with the cells that are not NEVER; → how many, Σ p and Σ p(1 − p)."""
    possible = 0
    for n in range(len(odds)):
        place[possible] = n
        possible += odds[n] > NEVER
    total, variance = 0.0, 0.0
    for k in range(possible):
        p[k] = 1.0 / (1.0 + math.exp(-float(odds[place[k]])))
        total += p[k]
        variance += p[k] * (1.0 - p[k])
    return possible, total, variance


@compiled
def _loudest(place, p, loud, left):
    """Fill loud with the places of the most probable, from the top, left with their p; → number."""
    heard = 0
    for k in range(len(place)):
        if heard == len(loud):
            if not p[k] > left[heard - 1]:
                continue
            heard -= 1
        m = heard
        while m > 0 and p[k] > left[m - 1]:
            loud[m], left[m] = loud[m - 1], left[m - 1]
            m -= 1
        loud[m], left[m] = place[k], p[k]
        heard += 1
    return heard


@compiled
def _locate(said, loud, c, width, x, y):
    """Fill x and y, px, with where a target of each cell that is loud would be."""
    pixels = said.shape[1] // (c * c)
    for m in range(len(loud)):
        cell, pixel = divmod(loud[m], pixels)
        row, column = divmod(cell, c)  # within the pixel
        i, j = divmod(pixel, width)
        x[m] = j + (column - (c - 1) / 2 + said[1, loud[m]]) / c
        y[m] = i + (row - (c - 1) / 2 + said[2, loud[m]]) / c


@compiled
def _gather(left, x, y, reach, near, away, weight):
    """Take the next target out of the probabilities left; → of how many cells, and how much.

    Filled for these, the nearest first: near with their rows, away with the squares of their
    distances, weight with what was taken.
    """
    if len(left) == 0:
        return 0, 0.0
    seed = np.argmax(left)
    cells = 0
    for m in range(len(left)):
        square = (x[m] - x[seed]) ** 2 + (y[m] - y[seed]) ** 2
        if left[m] == 0.0 or square > reach**2:
            continue
        k = cells
        while k > 0 and square < away[k - 1]:
            near[k], away[k] = near[k - 1], away[k - 1]
            k -= 1
        near[k], away[k] = m, square
        cells += 1
    passed, gathered = 0.0, 0.0
    for k in range(cells):
        m = near[k]
        weight[k] = min(left[m], max(1.0 - passed, 0.0))
        passed += left[m]
        gathered += weight[k]
        left[m] -= weight[k]
    return cells, min(gathered, 1.0)  # which rounding may pass


@compiled
def _mean(said, loud, x, y, near, weight, whole, c, spread, xy_px, cov_px2):
    """Fill position and covariance of the target of the cells that are near; → its intensity, σ."""
    xy_px[0], xy_px[1], intensity = 0.0, 0.0, 0.0
    for k in range(len(near)):
        m, share = near[k], weight[k] / whole
        xy_px[0] += share * x[m]
        xy_px[1] += share * y[m]
        intensity += share * said[3, loud[m]]
    xx, xy, yy, square = 0.0, 0.0, 0.0, 0.0
    for k in range(len(near)):
        m, share = near[k], weight[k] / whole
        n = loud[m]
        dx, dy, di = x[m] - xy_px[0], y[m] - xy_px[1], said[3, n] - intensity
        xx += share * (_variance(said[4, n]) / c**2 + dx**2)
        xy += share * (dx * dy)
        yy += share * (_variance(said[5, n]) / c**2 + dy**2)
        square += share * (_variance(said[6, n]) + di**2)
    cov_px2[0], cov_px2[1], cov_px2[2] = spread[2] * xx, spread[2] * xy, spread[2] * yy
    return intensity, spread[3] * math.sqrt(square)


@compiled
def _variance(log_scale):
    """Of a Laplace variable."""
    return 2.0 * math.exp(2.0 * min(max(float(log_scale), LOG_SCALES[0]), LOG_SCALES[1]))
