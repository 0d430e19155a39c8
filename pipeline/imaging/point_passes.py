# mypy: allow-untyped-defs, allow-untyped-calls
# ruff: noqa: ANN001, ANN202
"""The passes of the point filter over a whole frame, compiled.

Coarse images come with the frame's width and lie over its height as `cv2.resize` has it: each row
is known in the middle of a band. All inner loops run over slices of rows, which the compiler makes
vector instructions of; `cv2.subtract`, `sepFilter2D` and `divide` with `resize` before them take
half as long again, since each goes through memory anew.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.imaging.regions import Image
from pipeline.imaging.sampling import mirrored
from pipeline.physics.compiled import compiled, read_only


def filter_residual(
    image_HW: NDArray[Any], background_hW: Image, kernel: Image
) -> tuple[Image, Image]:
    """Image − background, and that correlated with the kernel along rows and columns, (H, W) each.

    kernel (2 r + 1,) is symmetric. The image is mirrored at its outermost pixels.
    """
    residual_HW = np.empty(image_HW.shape, np.float32)
    out_HW = np.empty(image_HW.shape, np.float32)
    _filter_residual(read_only(image_HW), background_hW, kernel, residual_HW, out_HW)
    return residual_HW, out_HW


def divide_by_noise(image_HW: Image, noise_hW: Image) -> Image:
    """Divide an image by its noise, in place; the noise of every pixel (H, W)."""
    sigma_HW = np.empty(image_HW.shape, np.float32)
    _divide(image_HW, noise_hW, sigma_HW)
    return sigma_HW


def compile_passes() -> None:
    """Have the passes compiled, or read from their cache, now instead of with the first frame."""
    some, kernel = np.ones((5, 5), np.float32), np.zeros(3, np.float32)
    for dtype in (np.uint8, np.uint16, np.float32):
        filter_residual(some.astype(dtype), some, kernel)
    divide_by_noise(some.copy(), some)


@compiled
def _between(coarse, y, height):
    """The rows (W,) of a coarse image above and below row y of `height`; the latter's share."""
    at = min(max((y + 0.5) * len(coarse) / height - 0.5, 0.0), len(coarse) - 1.0)
    above = int(at)
    return coarse[above], coarse[min(above + 1, len(coarse) - 1)], np.float32(at - above)


@compiled
def _subtract(row, above, below, share, out):
    for x in range(len(out)):
        out[x] = np.float32(row[x]) - (above[x] + share * (below[x] - above[x]))


@compiled
def _begin(weight, middle, outer_weight, before, after, out):
    for x in range(len(out)):
        out[x] = weight * middle[x] + outer_weight * (before[x] + after[x])


@compiled
def _add(weight, before, after, out):
    for x in range(len(out)):
        out[x] += weight * (before[x] + after[x])


@compiled
def _along(row, kernel, out):
    """Correlate a row with the kernel."""
    width, radius = len(row), len(kernel) // 2
    number = max(width - 2 * radius, 0)  # that the whole kernel lies on
    inner = out[radius : radius + number]
    _begin(kernel[radius], row[radius:], kernel[0], row[:number], row[2 * radius :], inner)
    for k in range(1, radius):
        _add(kernel[k], row[k:], row[2 * radius - k :], inner)
    for n in range(width - number):
        x = n if n < radius else number + n
        out[x] = 0.0
        for k in range(len(kernel)):
            out[x] += kernel[k] * row[mirrored(x + k - radius, width)]


@compiled
def _across(ring, y, height, kernel, out):
    """Correlate the rows round row y with the kernel; row n is the ring's n modulo its length."""
    radius, length = len(kernel) // 2, len(ring)
    before, after = mirrored(y - radius, height), mirrored(y + radius, height)
    middle = ring[y % length]
    _begin(kernel[radius], middle, kernel[0], ring[before % length], ring[after % length], out)
    for k in range(1, radius):
        before, after = mirrored(y - radius + k, height), mirrored(y + radius - k, height)
        _add(kernel[k], ring[before % length], ring[after % length], out)


@compiled
def _filter_residual(image, background, kernel, residual, out):
    """See `filter_residual`; the rows that are needed again stay in a ring, which is cached."""
    height, width = image.shape
    radius, length = len(kernel) // 2, len(kernel)
    ring = np.empty((length, width), np.float32)
    for y in range(height + radius):
        if y < height:
            above, below, share = _between(background, y, height)
            _subtract(image[y], above, below, share, residual[y])
            _along(residual[y], kernel, ring[y % length])
        if y >= radius:
            _across(ring, y - radius, height, kernel, out[y - radius])


@compiled
def _divide(image, noise, sigma):
    """See `divide_by_noise`."""
    height = len(image)
    for y in range(height):
        above, below, share = _between(noise, y, height)
        row, here = image[y], sigma[y]
        for x in range(len(row)):
            here[x] = above[x] + share * (below[x] - above[x])
        for x in range(len(row)):
            row[x] /= here[x]
