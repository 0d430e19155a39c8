# mypy: allow-untyped-defs, allow-untyped-calls
# ruff: noqa: ANN001, ANN202
"""Is a bright place shaped like point sources? Tests that tell wide things, edges and hot pixels.

A place's 3 × 3 pixels are compared with those of eight places far away. Against the mean of two
that lie opposite each other, a ridge or a straight edge has no contrast in its own direction;
against the third brightest, a corner has none, while up to two neighbouring targets are let be. The
far levels are medians, which heed no hot pixel.

A point source is least peaked off the middle of a pixel, so its eight neighbours show at least what
they show of a centred one. Their excess over the local level, as a least-squares estimate of the
central pixel, is compared with that pixel. At sigma_px 0.5 the estimate's noise is 2.1 sigma: hot
pixels of 12 sigma and more are told in nearly all cases.
"""

import math
from enum import IntEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.imaging.regions import Image, Regions
from pipeline.imaging.sampling import Integers, mirrored, square_ring
from pipeline.physics.compiled import compiled, read_only
from pipeline.physics.psf import pixel_response

STANDS_OUT = 0.35
"""Least contrast over greatest. On generated scenes 0.53 and more for targets of peak SNR 8 and
more; 99 of 100 pieces of a horizon have less than 0.17."""

SPIKE_SHARE, SPIKE_SIGMAS = 0.75, 2.0
"""A hot pixel's neighbours fall short of SPIKE_SHARE of a centred point source's by SPIKE_SIGMAS.
The share allows for a PSF 10 % narrower than it should be."""


class Shape(IntEnum):
    """What a region looks like."""

    POINTS = 0  # a group of point sources
    EXTENDED = 1  # wider than any such group
    EDGE = 2  # does not stand out on all sides
    SPIKE = 3  # a single hot pixel, narrower than any point source


class ShapeTest:
    """Tells what shape regions have, seen through a PSF of sigma_px.

    max_width_px: of a group. Made with all that a frame needs compiled.
    """

    def __init__(self, sigma_px: float, max_width_px: int) -> None:
        self._max_width_px = max_width_px
        far_px = max_width_px // 2 + 1
        diagonal = round(far_px / math.sqrt(2.0))
        self._far = np.array(
            [[far_px, 0], [0, far_px], [diagonal, diagonal], [diagonal, -diagonal]]
        )
        response = pixel_response(np.asarray(1.0), 3, sigma_px)
        share = np.outer(response, response).ravel() / response[1] ** 2
        share[4] = 0.0
        self._weight = (share / (share @ share)).astype(np.float32)
        self._ring = square_ring(math.ceil(3.0 * sigma_px) + 1)
        # A median's variance is π/2 of a mean's.
        level_variance = 0.5 * math.pi / len(self._ring)
        level_share = float(self._weight.sum()) - SPIKE_SHARE
        self._shortfall_sigmas = SPIKE_SIGMAS * math.sqrt(
            1.0 / float(share @ share) + SPIKE_SHARE**2 + level_share**2 * level_variance
        )
        nowhere, nothing = np.zeros((0, 2), np.int64), np.zeros((1, 1), np.float32)
        for dtype in (np.uint8, np.uint16, np.float32):
            self._judged(nothing.astype(dtype), nothing, nothing, nowhere, nowhere)
        brightest(nothing, nowhere, nowhere)

    def __call__(
        self, clean_HW: NDArray[Any], residual_HW: Image, sigma_HW: Image, regions: Regions
    ) -> Integers:
        """A `Shape` (N,) for each region of a frame.

        residual_HW: the frame less its background, sigma_HW: noise of its pixels.
        """
        return self._judged(clean_HW, residual_HW, sigma_HW, regions.peak_xy, regions.bbox_px)

    def is_wide(self, regions: Regions) -> NDArray[np.bool_]:
        """Which regions (N,) are EXTENDED."""
        width_px = regions.bbox_px[:, 2:] - regions.bbox_px[:, :2]
        result: NDArray[np.bool_] = np.any(width_px > self._max_width_px, axis=1)
        return result

    def _judged(
        self, clean_HW: NDArray[Any], residual_HW: Image, sigma_HW: Image, xy: Integers,
        bbox_px: Integers,
    ) -> Integers:  # fmt: skip
        shape = np.empty(len(xy), np.int64)
        spike = self._ring, self._weight, self._shortfall_sigmas
        measured = read_only(clean_HW), residual_HW, sigma_HW
        _judge(*measured, xy, bbox_px, self._max_width_px, self._far, spike, shape)
        return shape


def brightest(image_HW: Image, xy: Integers, steps: Integers) -> Image:
    """The largest of the pixels at `steps` (M, 2) from each place (N, 2), (N,)."""
    result = np.empty(len(xy), np.float32)
    _brightest(image_HW, xy, steps, result)
    return result


@compiled
def _around(image, x, y, values):
    """Fill values (9,) with the 3 × 3 pixels round a place, row by row."""
    height, width = image.shape
    for n in range(9):
        row, column = mirrored(y - 1 + n // 3, height), mirrored(x - 1 + n % 3, width)
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
            row = mirrored(xy[n, 1] + steps[k, 1], height)
            column = mirrored(xy[n, 0] + steps[k, 0], width)
            result[n] = max(result[n], image[row, column])


@compiled
def _judge(image, residual, sigma, xy, box, max_width, far, spike, shape):
    """Fill shape (N,)."""
    near, level, ring = np.empty(9), np.empty(8), np.empty(len(spike[0]))
    for n in range(len(xy)):
        x, y = xy[n]
        if max(box[n, 2] - box[n, 0], box[n, 3] - box[n, 1]) > max_width:
            shape[n] = Shape.EXTENDED
        elif not _stands_out(image, x, y, far, near, level):
            shape[n] = Shape.EDGE
        elif _is_spike(residual, x, y, sigma[y, x], spike, near, ring):
            shape[n] = Shape.SPIKE
        else:
            shape[n] = Shape.POINTS


@compiled
def _stands_out(image, x, y, far, near, level):
    """True if a place is brighter than its surroundings, all round; far (4, 2) to one side.

    near (9,) and level (8,) are room.
    """
    least, greatest = math.inf, -math.inf
    _around(image, x, y, near)
    here = near.mean()
    for k in range(4):
        for side in range(2):
            sign = 1 - 2 * side
            _around(image, x + sign * far[k, 0], y + sign * far[k, 1], near)
            _sort(near)
            level[2 * k + side] = near[4]
        across = here - 0.5 * (level[2 * k] + level[2 * k + 1])
        least, greatest = min(least, across), max(greatest, across)
    _sort(level)
    return min(least, here - level[-3]) >= STANDS_OUT * greatest


@compiled
def _is_spike(image, x, y, sigma, spike, near, far):
    """True if a place is a single pixel; sigma is a pixel's noise there, spike as ShapeTest has it.

    near (9,) and far, as long as the ring, are room.
    """
    ring, weight, shortfall_sigmas = spike
    height, width = image.shape
    for k in range(len(ring)):
        far[k] = image[mirrored(y + ring[k, 1], height), mirrored(x + ring[k, 0], width)]
    _sort(far)
    _around(image, x, y, near)
    near -= far[len(ring) // 2]
    total = 0.0
    for k in range(9):
        total += near[k] * weight[k]
    return np.float32(SPIKE_SHARE * near[4] - total) > shortfall_sigmas * sigma
