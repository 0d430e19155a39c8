# mypy: allow-untyped-defs, allow-untyped-calls
# ruff: noqa: ANN001, ANN202
"""`background.plane_background` compiled, a patch at a time: what crops every frame."""

import math

import numpy as np
from numpy.typing import NDArray

from pipeline.physics.background import CLIP_SIGMA, GUARD_PX, ITERATIONS
from pipeline.physics.compiled import compiled

RIDGE = 1e-6
FEWEST = 8
Array64 = NDArray[np.float64]


def fit_planes(
    patch_BHW: NDArray[np.floating], centre_xy_px: Array64, usable_BHW: NDArray[np.bool_]
) -> tuple[Array64, Array64]:
    """Plane (B, H, W) and rms (B,), counts; tests hold them to `plane_background`'s."""
    plane_BHW, rms = np.empty(patch_BHW.shape), np.empty(len(patch_BHW))
    patches, centres = np.array(patch_BHW, np.float64), np.array(centre_xy_px, np.float64)
    _fit_all(patches, centres, np.array(usable_BHW), plane_BHW, rms)
    return plane_BHW, rms


def compile_planes() -> None:
    """Have this compiled, or read from its cache, now instead of with the first frame."""
    nothing = np.zeros((0, 1, 1))
    fit_planes(nothing, nothing[:, 0], nothing > 0.0)


@compiled
def _fit_all(patches, centres, usable, planes, rms):
    batch, height, width = patches.shape
    weight = np.empty((height, width), np.bool_)
    for b in range(batch):
        number = 0
        for i in range(height):
            for j in range(width):
                away = max(abs(i - centres[b, 1]), abs(j - centres[b, 0]))
                weight[i, j] = usable[b, i, j] and away > GUARD_PX
                number += weight[i, j]
        sloping = number >= FEWEST
        if not sloping:
            weight[:] = usable[b]
        for _ in range(ITERATIONS):
            level, by_x, by_y = _solved(patches[b], centres[b], weight, sloping)
            total, square = 0, 0.0
            for i in range(height):
                for j in range(width):
                    at = level + by_x * (j - centres[b, 0]) + by_y * (i - centres[b, 1])
                    planes[b, i, j] = at
                    if weight[i, j]:
                        total += 1
                        square += (patches[b, i, j] - at) ** 2
            rms[b] = math.sqrt(square / max(total - 3, 1))
            limit = (CLIP_SIGMA * rms[b]) ** 2 + 1e-6
            settled = True
            for i in range(height):
                for j in range(width):
                    if weight[i, j] and (patches[b, i, j] - planes[b, i, j]) ** 2 > limit:
                        weight[i, j] = settled = False
            if settled:
                break


@compiled
def _solved(values, centre, weight, sloping):
    """Level at the centre and slopes along x and y, least squares over the pixels of weight."""
    n, x, y, xx, xy, yy = RIDGE, 0.0, 0.0, RIDGE, 0.0, RIDGE
    v, vx, vy = 0.0, 0.0, 0.0
    for i in range(values.shape[0]):
        for j in range(values.shape[1]):
            if weight[i, j]:
                dx = (j - centre[0]) * sloping
                dy = (i - centre[1]) * sloping
                value = values[i, j]
                n, x, y = n + 1.0, x + dx, y + dy
                xx, xy, yy = xx + dx * dx, xy + dx * dy, yy + dy * dy
                v, vx, vy = v + value, vx + dx * value, vy + dy * value
    # Elimination, the level first: what is left is about the means.
    xx, xy, yy = xx - x * x / n, xy - x * y / n, yy - y * y / n
    vx, vy = vx - x * v / n, vy - y * v / n
    by_y = (vy - xy * vx / xx) / (yy - xy * xy / xx)
    by_x = (vx - xy * by_y) / xx
    return (v - x * by_x - y * by_y) / n, by_x, by_y
