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
from scipy.special import expit

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
) -> Peaks:
    """Targets of each patch, the surest first, and one more where it is not sure there is none.

    The most probable cell first: it and its nearest within REACH_SIGMA, until their probabilities
    add up to 1, are a target; its figures are their weighted means. Then the same of what is left.
    `p_exist` is what was gathered: that there is a target thereabouts. `p_count` of the k-th is the
    probability of k or more in the patch, so its differences are the probabilities of the counts,
    and those of at least a half are as many targets as the cells' probabilities add up to, rounded.
    count_spread, position_spread, intensity_spread: as measured of the engine (engines/spread.py).
    """
    batch, _, height, width = map_BCHW.shape
    flat = np.ascontiguousarray(map_BCHW).reshape(batch, CHANNELS, c * c * height * width)
    image, found = _read(flat, c, width, REACH_SIGMA * sigma_px, count_spread)
    return Peaks(
        image=image,
        xy_px=found[:, 0:2],
        intensity=found[:, 2],
        value=found[:, 3],
        p_exist=found[:, 4],
        p_count=found[:, 3].copy(),
        cov_px2=position_spread * found[:, 5:8],
        intensity_sigma=math.sqrt(intensity_spread) * found[:, 8],
    )


def count_at_least(
    p_BM: NDArray[np.floating], most: int, count_spread: CountSpread
) -> NDArray[np.float64]:
    """Probability (B, most) that a patch holds at least 1, 2, … targets, of its cells' p (B, M)."""
    result = np.empty((len(p_BM), most))
    for p, row in zip(p_BM, result, strict=True):
        _count(np.ascontiguousarray(p), count_spread, row)
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
def _count(p, spread, more):
    """Fill more (most,) with `count_at_least` of one patch."""
    total, variance = 0.0, 0.0
    for n in range(len(p)):
        share = float(p[n])
        total += share
        variance += share * (1.0 - share)
    deviation = math.sqrt(spread[0] + spread[1] * variance)
    for k in range(len(more)):
        more[k] = 0.5 * math.erfc((k + 0.5 - total) / deviation / _ROOT2)


@compiled
def _loudest(p, cells):
    """Fill cells (M,) with the numbers of the M most probable, the most probable first."""
    heard = 0
    for n in range(len(p)):
        if heard == len(cells) and not p[n] > p[cells[heard - 1]]:
            continue
        place = min(heard, len(cells) - 1)
        while place > 0 and p[n] > p[cells[place - 1]]:
            cells[place] = cells[place - 1]
            place -= 1
        cells[place] = n
        heard = min(heard + 1, len(cells))


@compiled
def _gather(left, x, y, reach, near, away, weight):
    """Fill weight (M,) with what of the probabilities left is the next target's: at most 1.

    near and away (M,) are room for the cells within reach, the nearest first.
    """
    seed = np.argmax(left)
    number = 0
    for n in range(len(left)):
        weight[n] = 0.0
        distance = math.hypot(x[n] - x[seed], y[n] - y[seed])
        if distance > reach:
            continue
        place = number
        while place > 0 and distance < away[place - 1]:
            near[place], away[place] = near[place - 1], away[place - 1]
            place -= 1
        near[place], away[place] = n, distance
        number += 1
    passed, gathered = 0.0, 0.0
    for n in near[:number]:
        weight[n] = min(left[n], max(1.0 - passed, 0.0))
        passed += left[n]
        gathered += weight[n]
    return gathered


@compiled
def _mean(weight, gathered, cells, out):
    """Fill out (9,) with the figures of one target, of its cells (7, M) and their weights."""
    out[:3] = 0.0
    out[5:] = 0.0
    whole = max(gathered, 1e-12)
    for n in np.flatnonzero(weight):
        for k in range(3):
            out[k] += weight[n] / whole * cells[1 + k, n]
    for n in np.flatnonzero(weight):
        share = weight[n] / whole
        dx, dy, di = cells[1, n] - out[0], cells[2, n] - out[1], cells[3, n] - out[2]
        out[5] += share * (cells[4, n] ** 2 + dx**2)
        out[6] += share * (dx * dy)
        out[7] += share * (cells[5, n] ** 2 + dy**2)
        out[8] += share * (cells[6, n] ** 2 + di**2)
    out[8] = math.sqrt(out[8])


@compiled
def _hear(said, p, chosen, c, width, cells):
    """Fill cells (7, M) with p, x px, y px, intensity, and deviations of these, of chosen cells."""
    pixels = len(p) // (c * c)
    for m, n in enumerate(chosen):
        row, column = divmod(n // pixels, c)  # within the pixel
        y, x = divmod(n % pixels, width)
        cells[0, m] = p[n]
        cells[1, m] = x + (column - (c - 1) / 2 + said[1, n]) / c
        cells[2, m] = y + (row - (c - 1) / 2 + said[2, n]) / c
        cells[3, m] = said[3, n]
        for k in range(4, 7):
            log_scale = min(max(float(said[k, n]), LOG_SCALES[0]), LOG_SCALES[1])
            deviation = _ROOT2 * math.exp(log_scale)  # of a Laplace variable
            cells[k, m] = deviation if k == 6 else deviation / c


@compiled
def _read(maps, c, width, reach, spread):
    """Of maps (B, 7, cells): the image of each target (N,), and its figures (N, 9).

    These are x, y, intensity, p_count, p_exist, the variances xx, xy, yy, and intensity_sigma.
    """
    heard = min(SPEAKING, maps.shape[2])
    image = np.empty(len(maps) * heard, np.int64)
    found = np.empty((len(maps) * heard, 9))
    number = 0
    chosen, more, left = np.empty(heard, np.int64), np.empty(heard), np.empty(heard)
    near, away, weight = np.empty(heard, np.int64), np.empty(heard), np.empty(heard)
    cells, p = np.empty((maps.shape[1], heard)), np.empty(maps.shape[2])
    for b in range(len(maps)):
        for n in range(len(p)):
            odds = float(maps[b, 0, n])
            p[n] = 1.0 / (1.0 + math.exp(-odds)) if odds > NEVER else 0.0
        _count(p, spread, more)
        _loudest(p, chosen)
        _hear(maps[b], p, chosen, c, width, cells)
        left[:] = cells[0]
        spare, likely = np.count_nonzero(more >= SPARE), np.count_nonzero(more >= 0.5)
        for rank in range(min(spare, likely + 1)):
            gathered = _gather(left, cells[1], cells[2], reach, near, away, weight)
            left -= weight
            if gathered <= SILENCE:
                continue
            gathered = min(gathered, 1.0)  # which rounding may pass
            image[number] = b
            _mean(weight, gathered, cells, found[number])
            found[number, 3], found[number, 4] = more[rank], gathered
            number += 1
    return image[:number], found[:number]
