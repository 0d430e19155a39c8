# mypy: allow-untyped-defs, allow-untyped-calls
# ruff: noqa: ANN001, ANN201
"""Reading an image at some places only, vectorised."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.physics.compiled import compiled

Integers = NDArray[np.int64]

STEPS = np.stack(np.meshgrid([-1, 0, 1], [-1, 0, 1]), axis=-1)
"""From a pixel to itself and its neighbours, (3, 3, 2)."""


def values_at(image_HW: NDArray[Any], xy: Integers) -> NDArray[Any]:
    """Pixels (...) at places (..., 2); those off the image are mirrored at its outermost pixels.

    No place may be farther out than the image is wide.
    """
    height, width = image_HW.shape
    row, column = _mirrored(xy[..., 1], height), _mirrored(xy[..., 0], width)
    values: NDArray[Any] = np.take(image_HW, row * width + column)
    return values


def _mirrored(index: Integers, length: int) -> Integers:
    last = length - 1
    if index.size and index.min() >= 0 and index.max() <= last:
        return index
    mirrored: Integers = last - np.abs(last - np.abs(index))
    return mirrored


def surroundings(image_HW: NDArray[Any], xy: Integers) -> NDArray[Any]:
    """3 × 3 pixels (..., 9) round each place (..., 2)."""
    return values_at(image_HW, xy[..., None, :] + STEPS.reshape(9, 2))


def square_ring(reach: int) -> Integers:
    """Steps (8 · reach, 2) from a pixel to the sides of the square round it."""
    x, y = np.meshgrid(*[np.arange(-reach, reach + 1)] * 2)
    on_side = np.maximum(np.abs(x), np.abs(y)) == reach
    return np.stack([x[on_side], y[on_side]], axis=-1)


def as_tiles(image_HW: NDArray[Any], size_px: int, pitch_px: int) -> NDArray[Any]:
    """View (rows, size_px, columns, size_px) of the complete tiles of a contiguous mosaic."""
    height, width = image_HW.shape
    rows, columns = ((length + pitch_px - size_px) // pitch_px for length in (height, width))
    y_step, x_step = image_HW.strides
    tiles: NDArray[Any] = np.lib.stride_tricks.as_strided(
        image_HW,
        (rows, size_px, columns, size_px),
        (pitch_px * y_step, y_step, pitch_px * x_step, x_step),
    )
    return tiles


@compiled
def mirrored(index, length):
    """For compiled loops: off the image it is mirrored at its outermost pixels."""
    return length - 1 - abs(length - 1 - abs(index))
