# mypy: allow-untyped-defs, allow-untyped-calls
# ruff: noqa: ANN001, ANN202
"""The noise of an image by blocks: what most of the values in a block stay below."""

from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from pipeline.imaging.regions import Image
from pipeline.physics.compiled import compiled

BLOCK_SAMPLES = 12
"""A block's statistics come from BLOCK_SAMPLES × BLOCK_SAMPLES of its pixels."""

WITHIN_SIGMA = 0.6827
"""Share of a Gaussian's values within one sigma."""


def float32(image: NDArray[Any]) -> Image:
    """For OpenCV's results, the type of which only it knows; copies nothing that is float32."""
    return np.asarray(image, dtype=np.float32)


def block_samples(image_HW: Image, block_px: int) -> Image:
    """Sorted values (rows, columns, BLOCK_SAMPLES²) of each block of about block_px squared."""
    samples = _samples(image_HW, block_px)
    samples.sort(axis=-1)
    return samples


def block_sigma(image_HW: Image, block_px: int) -> Image:
    """Deviation (rows, columns) of each block of an image of mean zero, which targets hardly move.

    Few samples may by chance say too little: a block is no quieter than those around it.
    """
    samples = _samples(image_HW, block_px)
    np.abs(samples, out=samples)
    samples.sort(axis=-1)
    spread = samples[..., round(WITHIN_SIGMA * BLOCK_SAMPLES**2)]
    return float32(np.maximum(spread, cv2.blur(spread, (3, 3))))


def compile_sampling() -> None:
    """Have this compiled, or read from its cache, now instead of with the first frame."""
    _samples(np.zeros((1, 1), np.float32), 1)


def _samples(image_HW: Image, block_px: int) -> Image:
    """Values (rows, columns, BLOCK_SAMPLES²) of pixels evenly spaced over each block."""
    height, width = image_HW.shape
    rows, columns = max(round(height / block_px), 1), max(round(width / block_px), 1)
    y = np.arange(rows * BLOCK_SAMPLES) * height // (rows * BLOCK_SAMPLES)
    x = np.arange(columns * BLOCK_SAMPLES) * width // (columns * BLOCK_SAMPLES)
    samples = np.empty((rows, columns, BLOCK_SAMPLES**2), np.float32)
    _gather(image_HW, y, x, samples)
    return samples


@compiled
def _gather(image, y, x, samples):
    """Fill samples (rows, columns, BLOCK_SAMPLES²) from the rows y and columns x."""
    for row in range(len(samples)):
        for i in range(BLOCK_SAMPLES):
            line = image[y[row * BLOCK_SAMPLES + i]]
            for column in range(samples.shape[1]):
                block = samples[row, column]
                for j in range(BLOCK_SAMPLES):
                    block[i * BLOCK_SAMPLES + j] = line[x[column * BLOCK_SAMPLES + j]]
