"""The noise of an image by blocks: what most of the values in a block stay below."""

from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from pipeline.imaging.regions import Image

BLOCK_SAMPLES = 12
"""A block's statistics come from BLOCK_SAMPLES × BLOCK_SAMPLES of its pixels."""

WITHIN_SIGMA = 0.6827
"""Share of a Gaussian's values within one sigma."""


def float32(image: NDArray[Any]) -> Image:
    """For OpenCV's results, the type of which only it knows; copies nothing that is float32."""
    return np.asarray(image, dtype=np.float32)


def block_samples(image_HW: Image, block_px: int) -> Image:
    """Sorted values (rows, columns, BLOCK_SAMPLES²) of each block of about block_px squared."""
    return float32(np.sort(_samples(image_HW, block_px), axis=-1))


def block_sigma(image_HW: Image, block_px: int) -> Image:
    """Deviation (rows, columns) of each block of an image of mean zero, which targets hardly move.

    Few samples may by chance say too little: a block is no quieter than those around it.
    """
    ordered = np.sort(np.abs(_samples(image_HW, block_px)), axis=-1)
    spread = ordered[..., round(WITHIN_SIGMA * BLOCK_SAMPLES**2)]
    return float32(np.maximum(spread, cv2.blur(spread, (3, 3))))


def _samples(image_HW: Image, block_px: int) -> Image:
    height, width = image_HW.shape
    rows, columns = max(round(height / block_px), 1), max(round(width / block_px), 1)
    grid = (columns * BLOCK_SAMPLES, rows * BLOCK_SAMPLES)
    samples = cv2.resize(image_HW, grid, interpolation=cv2.INTER_NEAREST)
    samples = samples.reshape(rows, BLOCK_SAMPLES, columns, BLOCK_SAMPLES).swapaxes(1, 2)
    return float32(samples.reshape(rows, columns, -1))
