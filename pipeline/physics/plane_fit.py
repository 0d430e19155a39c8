# mypy: allow-untyped-defs, allow-untyped-calls
# ruff: noqa: ANN001, ANN201, ANN202
"""`background.plane_background` of one patch, compiled: what crops every frame."""

import math

from pipeline.physics.background import CLIP_SIGMA, GUARD_PX, ITERATIONS
from pipeline.physics.compiled import compiled

RIDGE = 1e-6
FEWEST = 8


@compiled
def fit_plane(patch, x_px, y_px, usable, weight, plane):
    """Fill the plane (H, W), counts, under a blob at x, y and return the rms about it.

    weight (H, W) is room, and True afterwards where the plane was fitted to.
    """
    height, width = patch.shape
    number = 0
    for i in range(height):
        for j in range(width):
            away = max(abs(i - y_px), abs(j - x_px))
            weight[i, j] = usable[i, j] and away > GUARD_PX
            number += weight[i, j]
    sloping = number >= FEWEST
    if not sloping:
        for i in range(height):
            for j in range(width):
                weight[i, j] = usable[i, j]
    rms = 0.0
    for _ in range(ITERATIONS):
        level, by_x, by_y = _solved(patch, x_px, y_px, weight, sloping)
        total, square = 0, 0.0
        for i in range(height):
            for j in range(width):
                plane[i, j] = level + by_x * (j - x_px) + by_y * (i - y_px)
                if weight[i, j]:
                    total += 1
                    square += (patch[i, j] - plane[i, j]) ** 2
        rms = math.sqrt(square / max(total - 3, 1))
        limit = (CLIP_SIGMA * rms) ** 2 + 1e-6
        settled = True
        for i in range(height):
            for j in range(width):
                if weight[i, j] and (patch[i, j] - plane[i, j]) ** 2 > limit:
                    weight[i, j] = settled = False
        if settled:
            break
    return rms


@compiled
def _solved(values, x_px, y_px, weight, sloping):
    """Level at the centre and slopes along x and y, least squares over the pixels of weight."""
    n, x, y, xx, xy, yy = RIDGE, 0.0, 0.0, RIDGE, 0.0, RIDGE
    v, vx, vy = 0.0, 0.0, 0.0
    for i in range(values.shape[0]):
        for j in range(values.shape[1]):
            if weight[i, j]:
                dx = (j - x_px) * sloping
                dy = (i - y_px) * sloping
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
