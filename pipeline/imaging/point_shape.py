# mypy: allow-untyped-defs, allow-untyped-calls
# ruff: noqa: ANN001, ANN202
"""Is a bright place shaped like point sources? Two tests that tell edges and hot pixels apart."""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.imaging.sampling import Integers, square_ring
from pipeline.physics.compiled import compiled
from pipeline.physics.psf import pixel_response

STANDS_OUT = 0.35
"""Least contrast over greatest. On generated scenes 0.53 and more for targets of peak SNR 8 and
more; 99 of 100 pieces of a horizon have less than 0.17."""

SPIKE_SHARE, SPIKE_SIGMAS = 0.75, 2.0
"""A spike's neighbours fall short of SPIKE_SHARE of a centred point source's by SPIKE_SIGMAS.
The share allows for a PSF 10 % narrower than it should be."""


def stands_out(image_HW: NDArray[Any], xy: Integers, far_px: int) -> NDArray[np.bool_]:
    """Places (N, 2) that are brighter than their surroundings, all round, (N,).

    A place's 3 × 3 pixels are compared with those of eight places far_px away. Against the mean
    of two that lie opposite each other, a ridge or a straight edge has no contrast in its own
    direction; against the third brightest, a corner has none, while up to two neighbouring
    targets are let be. The far levels are medians, which heed no hot pixel.
    """
    diagonal = round(far_px / math.sqrt(2.0))
    step = np.array([[far_px, 0], [0, far_px], [diagonal, diagonal], [diagonal, -diagonal]])
    result = np.empty(len(xy), np.bool_)
    _stand_out(image_HW, xy, step, result)
    return result


def brightest(image_HW: NDArray[np.float32], xy: Integers, steps: Integers) -> NDArray[np.float32]:
    """The largest of the pixels at `steps` (M, 2) from each place (N, 2), (N,)."""
    result = np.empty(len(xy), np.float32)
    _brightest(image_HW, xy, steps, result)
    return result


def compile_shapes() -> None:
    """Have the tests compiled, or read from their cache, now instead of with the first frame."""
    nowhere = np.zeros((0, 2), np.int64)
    for dtype in (np.uint8, np.uint16, np.float32):
        image = np.zeros((1, 1), dtype)
        for image.flags.writeable in (True, False):  # as received
            stands_out(image, nowhere, 1)
    brightest(np.zeros((1, 1), np.float32), nowhere, nowhere)
    SpikeTest(1.0)(np.zeros((1, 1), np.float32), nowhere, np.zeros(0, np.float32))


class SpikeTest:
    """Tells a single hot pixel from a point source seen through a PSF of sigma_px.

    A point source is least peaked off the middle of a pixel, so its eight neighbours show at
    least what they show of a centred one. Their excess over the local level, as a least-squares
    estimate of the central pixel, is compared with that pixel. At sigma_px 0.5 the estimate's
    noise is 2.1 sigma: spikes of 12 sigma and more are told in nearly all cases.
    """

    def __init__(self, sigma_px: float) -> None:
        response = pixel_response(np.asarray(1.0), 3, sigma_px)
        share = np.outer(response, response).ravel() / response[1] ** 2
        share[4] = 0.0
        self._weight = (share / (share @ share)).astype(np.float32)
        self._ring = square_ring(math.ceil(3.0 * sigma_px) + 1)
        # A median's variance is π/2 of a mean's.
        level_variance = 0.5 * math.pi / len(self._ring)
        level_share = float(self._weight.sum()) - SPIKE_SHARE
        self._deviation = math.sqrt(
            1.0 / float(share @ share) + SPIKE_SHARE**2 + level_share**2 * level_variance
        )

    def __call__(
        self, image_HW: NDArray[np.float32], xy: Integers, sigma: NDArray[np.float32]
    ) -> NDArray[np.bool_]:
        """Places (N, 2) that are single pixels, (N,); sigma (N,) is the noise of a pixel there."""
        shortfall = np.empty(len(xy), np.float32)
        _fall_short(image_HW, xy, self._ring, self._weight, shortfall)
        result: NDArray[np.bool_] = shortfall > SPIKE_SIGMAS * self._deviation * sigma
        return result


@compiled
def _mirrored(index, length):
    """Off the image it is mirrored at its outermost pixels."""
    return length - 1 - abs(length - 1 - abs(index))


@compiled
def _around(image, x, y, values):
    """Fill values (9,) with the 3 × 3 pixels round a place, row by row."""
    height, width = image.shape
    for n in range(9):
        row, column = _mirrored(y - 1 + n // 3, height), _mirrored(x - 1 + n % 3, width)
        values[n] = image[row, column]


@compiled
def _sort(values):
    """In place, by insertion: a few values."""
    for n in range(1, len(values)):
        value, place = values[n], n
        while place > 0 and values[place - 1] > value:
            values[place] = values[place - 1]
            place -= 1
        values[place] = value


@compiled
def _brightest(image, xy, steps, result):
    """See `brightest`."""
    height, width = image.shape
    for n in range(len(xy)):
        result[n] = -np.inf
        for k in range(len(steps)):
            row = _mirrored(xy[n, 1] + steps[k, 1], height)
            column = _mirrored(xy[n, 0] + steps[k, 0], width)
            result[n] = max(result[n], image[row, column])


@compiled
def _stand_out(image, xy, step, result):
    """See `stands_out`; step (4, 2) to the far places on one side."""
    near, level = np.empty(9), np.empty(8)
    for n in range(len(xy)):
        x, y = xy[n]
        least, greatest = math.inf, -math.inf
        _around(image, x, y, near)
        here = near.mean()
        for k in range(4):
            for side in range(2):
                sign = 1 - 2 * side
                _around(image, x + sign * step[k, 0], y + sign * step[k, 1], near)
                _sort(near)
                level[2 * k + side] = near[4]
            across = here - 0.5 * (level[2 * k] + level[2 * k + 1])
            least, greatest = min(least, across), max(greatest, across)
        _sort(level)
        result[n] = min(least, here - level[-3]) >= STANDS_OUT * greatest


@compiled
def _fall_short(image, xy, ring, weight, shortfall):
    """Fill shortfall (N,): what a hot pixel's neighbours lack of a point source's, counts."""
    height, width = image.shape
    near, far = np.empty(9), np.empty(len(ring))
    for n in range(len(xy)):
        x, y = xy[n]
        for k in range(len(ring)):
            row, column = _mirrored(y + ring[k, 1], height), _mirrored(x + ring[k, 0], width)
            far[k] = image[row, column]
        _sort(far)
        _around(image, x, y, near)
        near -= far[len(ring) // 2]
        total = 0.0
        for k in range(9):
            total += near[k] * weight[k]
        shortfall[n] = SPIKE_SHARE * near[4] - total
