# mypy: allow-untyped-defs, allow-untyped-calls
# ruff: noqa: ANN001, ANN201, ANN202
"""What the imaging model says of every target of a frame, compiled: `bounds`, group by group.

`bounds.fisher_information` and `bounds.cramer_rao` are the definition and the tests hold this to
them; a frame's groups are of many sizes, and each of those calls takes ten temporary arrays.
"""

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.physics.compiled import read_only
from pipeline.physics.inverse import inverse
from pipeline.physics.patch_model import EXPECTED, compiled, expect, respond_all, weigh
from pipeline.physics.sensor import Sensor

Array64 = NDArray[np.float64]


class Bounds(NamedTuple):
    """Of each target (M,): its fellows known, or all of its group and the background unknown."""

    snr: Array64  # (M,) intensity over its deviation, all else known
    cov_px2: Array64  # (M, 3) xx, xy, yy
    intensity_sigma: Array64  # (M,) counts


def group_bounds(
    patch: NDArray[np.int32],
    xy_px: Array64,
    intensity: Array64,
    level: Array64,
    usable_BHW: NDArray[np.bool_],
    sensor: Sensor,
) -> Bounds:
    """Bounds of M targets in B patches, those of a patch one after another.

    patch (M,) row among the patches, xy_px (M, 2) in the patch, intensity (M,) counts, level (B,)
    background in counts, usable_BHW False for pixels that say nothing.
    """
    fields = bound_all(
        read_only(patch),
        read_only(xy_px),
        read_only(intensity),
        read_only(level),
        read_only(usable_BHW),
        np.ones(len(patch), np.bool_),
        *model_of(sensor),
    )
    return Bounds(*fields)


def model_of(sensor: Sensor) -> tuple[tuple[float, float], tuple[float, float, float]]:
    """σ, px, and the precision it is known with, 1/px²; full scale, read variance, 1/gain."""
    error_px = sensor.sigma_error * sensor.sigma_px
    sigma = sensor.sigma_px, math.inf if error_px == 0.0 else error_px**-2
    return sigma, (float(sensor.full_scale), sensor.read_noise**2, 1.0 / sensor.gain)


@compiled
def bound_all(patch, xy_px, intensity, level, usable, asked, sigma, camera):
    """All of `Bounds`; sigma, camera: see `model_of`.

    asked (M,): groups of which none is asked for have an SNR only, which needs no inverse.
    """
    number = len(patch)
    snr, deviation, cov = np.empty(number), np.empty(number), np.empty((number, 3))
    _, height, width = usable.shape
    nothing, mean = np.zeros((height, width)), np.empty((height, width))
    score, weight = np.empty((height, width)), np.empty((height, width))
    begin = 0
    while begin < number:
        end, wanted = begin, False
        while end < number and patch[end] == patch[begin]:
            wanted |= asked[end]
            end += 1
        parameters = np.zeros(3 * (end - begin) + 2)
        for k in range(begin, end):
            parameters[3 * (k - begin)] = xy_px[k, 0]
            parameters[3 * (k - begin) + 1] = xy_px[k, 1]
            parameters[3 * (k - begin) + 2] = intensity[k]
        row = patch[begin]
        parameters[-2], parameters[-1] = level[row], sigma[0]
        axes = np.empty((2, end - begin, 4, max(height, width)))
        respond_all(parameters, axes)
        expect(parameters, nothing, axes, mean)
        weigh(nothing, usable[row], mean, camera, score, weight, EXPECTED)
        for k in range(begin, end):
            share = _squared(axes[0, k - begin, 0], axes[1, k - begin, 0], weight)
            snr[k], deviation[k] = intensity[k] * math.sqrt(share), math.nan
            cov[k, 0], cov[k, 1], cov[k, 2] = math.nan, math.nan, math.nan
        if wanted:
            bound = inverse(_information(parameters, axes, weight, sigma[1]))
            for k in range(begin, end):
                x, y, g = 3 * (k - begin), 3 * (k - begin) + 1, 3 * (k - begin) + 2
                deviation[k] = math.sqrt(bound[g, g])
                cov[k, 0], cov[k, 1], cov[k, 2] = bound[x, x], bound[x, y], bound[y, y]
        begin = end
    return snr, cov, deviation


@compiled
def _squared(x, y, weight):
    """Weighted sum of squares of a unit source's counts, of its shares along the axes."""
    total = 0.0
    for i in range(weight.shape[0]):
        for j in range(weight.shape[1]):
            total += weight[i, j] * (x[j] * y[i]) ** 2
    return total


@compiled
def _information(parameters, axes, weight, sigma_precision):
    """Fisher information (P, P) of a group, and what is known of σ; a σ known exactly has 1."""
    size = len(parameters)
    rows = np.empty((size, *weight.shape))
    _differentiate(parameters, axes, rows)
    information = _products(rows.reshape(size, weight.size), weight.ravel())
    if math.isfinite(sigma_precision):
        information[-1, -1] += sigma_precision
    else:  # known exactly: it tells nothing of the others
        for p in range(size):
            information[p, -1] = information[-1, p] = 0.0
        information[-1, -1] = 1.0
    return information


@compiled
def _differentiate(parameters, axes, rows):
    """Fill rows (P, H, W) with the derivatives of the expected counts by the parameters."""
    size, height, width = rows.shape
    for i in range(height):
        for j in range(width):
            rows[size - 2, i, j], rows[size - 1, i, j] = 1.0, 0.0
    for k in range(axes.shape[1]):
        g, x = parameters[3 * k + 2], axes[0, k]
        for i in range(height):
            y, by_y, by_sigma = axes[1, k, 0, i], axes[1, k, 1, i], axes[1, k, 3, i]
            for j in range(width):
                rows[3 * k, i, j] = g * x[1, j] * y
                rows[3 * k + 1, i, j] = g * x[0, j] * by_y
                rows[3 * k + 2, i, j] = x[0, j] * y
                rows[size - 1, i, j] += g * (x[3, j] * y + x[0, j] * by_sigma)


@compiled
def _products(rows, weight):
    """Weighted inner products (P, P) of rows (P, n)."""
    size, pixels = rows.shape
    result, weighted = np.empty((size, size)), np.empty(pixels)
    for p in range(size):
        for n in range(pixels):
            weighted[n] = rows[p, n] * weight[n]
        for q in range(p + 1):
            total = 0.0
            for n in range(pixels):
                total += weighted[n] * rows[q, n]
            result[p, q] = result[q, p] = total
    return result
