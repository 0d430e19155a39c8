# mypy: allow-untyped-defs, allow-untyped-calls
# ruff: noqa: ANN001, ANN202
"""What the imaging model says of every target of a frame, compiled: `bounds`, group by group.

`bounds.fisher_information` and `bounds.cramer_rao` are the definition and the tests hold this to
them; a frame's groups are of many sizes, and each of those calls takes ten temporary arrays.
"""

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.physics.compiled import compiled
from pipeline.physics.inverse import inverse
from pipeline.physics.patch_model import (
    EXPECTED,
    expect,
    normal_equations,
    respond_all,
    weigh,
)
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
    error_px = sensor.sigma_error * sensor.sigma_px
    sigma = sensor.sigma_px, math.inf if error_px == 0.0 else error_px**-2
    camera = float(sensor.full_scale), sensor.read_noise**2, 1.0 / sensor.gain
    # Copies: for arrays that are read-only, as those that were received, it would compile anew.
    arrays = (np.array(a, order="C") for a in (patch, xy_px, intensity, level, usable_BHW))
    return Bounds(*_bound_all(*arrays, sigma, camera))


def compile_bounds() -> None:
    """Have this compiled, or read from its cache, now instead of with the first frame."""
    nothing = np.zeros(0)
    group_bounds(
        np.zeros(0, np.int32), np.zeros((0, 2)), nothing, nothing, np.zeros((0, 1, 1), np.bool_),
        Sensor(),
    )  # fmt: skip


@compiled
def _bound_all(patch, xy_px, intensity, level, usable, sigma, sensor):
    """All of `Bounds`; sigma: its value, px, and the precision it is known with, 1/px²."""
    number = len(patch)
    snr, deviation, cov = np.empty(number), np.empty(number), np.empty((number, 3))
    begin = 0
    while begin < number:
        end = begin
        while end < number and patch[end] == patch[begin]:
            end += 1
        parameters = np.zeros(3 * (end - begin) + 2)
        for k in range(begin, end):
            parameters[3 * (k - begin)] = xy_px[k, 0]
            parameters[3 * (k - begin) + 1] = xy_px[k, 1]
            parameters[3 * (k - begin) + 2] = intensity[k]
        parameters[-1] = sigma[0]
        row = patch[begin]
        information = _information(parameters, level[row], usable[row], sigma[1], sensor)
        bound = inverse(information)
        for k in range(begin, end):
            x, y, g = 3 * (k - begin), 3 * (k - begin) + 1, 3 * (k - begin) + 2
            snr[k] = intensity[k] * math.sqrt(information[g, g])
            deviation[k] = math.sqrt(bound[g, g])
            cov[k, 0], cov[k, 1], cov[k, 2] = bound[x, x], bound[x, y], bound[y, y]
        begin = end
    return snr, cov, deviation


@compiled
def _information(parameters, level, usable, sigma_precision, sensor):
    """Fisher information (P, P) of a group, and what is known of σ; a σ known exactly has 1."""
    height, width = usable.shape
    size = len(parameters)
    axes = np.empty((2, (size - 2) // 3, 4, max(height, width)))
    mean, score, weight = np.empty((3, height, width))
    rows, normal, slope = np.empty((size, height * width)), np.zeros((size, size)), np.empty(size)
    precision = np.zeros(size)
    precision[-1] = sigma_precision
    respond_all(parameters, axes)
    expect(parameters, np.full((height, width), level), axes, mean)
    weigh(np.zeros((height, width)), usable, mean, sensor, score, weight, EXPECTED)
    normal_equations(
        parameters, parameters, precision, 0.0, 0.0, axes, score, weight, rows, normal, slope
    )
    for p in range(size):
        for q in range(p):
            normal[q, p] = normal[p, q]
    return normal
