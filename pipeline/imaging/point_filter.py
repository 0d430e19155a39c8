"""The PSF-matched filter with a constant false-alarm rate: residual → statistic in sigmas."""

import math
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from pipeline.imaging.noise_blocks import block_sigma, compile_sampling, float32
from pipeline.imaging.point_passes import compile_passes, divide_by_noise, filter_residual
from pipeline.imaging.regions import Image
from pipeline.imaging.sampling import Integers, surroundings, values_at
from pipeline.physics import noise
from pipeline.physics.psf import pixel_response
from pipeline.physics.sensor import Sensor


class PointFilter:
    """Correlates with the pixel-integrated PSF, of unit norm: white noise keeps its deviation."""

    def __init__(self, sensor: Sensor) -> None:
        self._sensor = sensor
        self.radius = radius = math.ceil(3.0 * sensor.sigma_px)
        response = pixel_response(np.asarray(float(radius)), 2 * radius + 1, sensor.sigma_px)
        self._kernel = (response / np.linalg.norm(response)).astype(np.float32)
        self._cell_px = max(2, math.ceil(2.0 * sensor.sigma_px))
        compile_passes()
        compile_sampling()

    def __call__(self, residual_HW: Image) -> Image:
        """The filtered image, counts."""
        return float32(cv2.sepFilter2D(residual_HW, cv2.CV_32F, self._kernel, self._kernel))

    def background(self, clean_HW: NDArray[Any]) -> Image:
        """Median background of cells, (H, W) over the cell size.

        A group covers less than half of the 5 × 5 cells, so it leaves no trace there, and an edge
        stays an edge.
        """
        height, width = clean_HW.shape
        cells = (max(width // self._cell_px, 1), max(height // self._cell_px, 1))
        means = cv2.resize(clean_HW, cells, interpolation=cv2.INTER_AREA)
        return float32(cv2.medianBlur(means, 5))

    def over(self, background: Image, clean_HW: NDArray[Any]) -> tuple[Image, Image]:
        """The frame less its `background`, and that filtered, counts."""
        return filter_residual(clean_HW, _widened(background, clean_HW), self._kernel)

    def in_sigmas(self, filtered_HW: Image, background: Image, block_px: int) -> Image:
        """Divide a filtered image by its noise, in place; the noise (H, W)."""
        noise = self._block_noise(filtered_HW, background, block_px)
        return divide_by_noise(filtered_HW, _widened(noise, filtered_HW))

    def sigma(self, filtered_HW: Image, background: Image, block_px: int) -> Image:
        """Noise (H, W): that of the block, and never less than the sensor's own on such a level."""
        noise = self._block_noise(filtered_HW, background, block_px)
        return float32(cv2.resize(noise, filtered_HW.shape[::-1]))

    def _block_noise(self, filtered_HW: Image, background: Image, block_px: int) -> Image:
        spread = block_sigma(filtered_HW, block_px)
        rows, columns = spread.shape
        mean = cv2.resize(background, (columns, rows), interpolation=cv2.INTER_AREA)
        return np.maximum(spread, self.noise_floor(mean))

    def noise_floor(self, background: NDArray[Any]) -> Image:
        """The sensor's own noise on a background, counts."""
        return float32(np.sqrt(noise.variance(background, self._sensor)))

    def replaced(self, residual_HW: Image, snr_HW: Image, sigma_HW: Image, xy: Integers) -> None:
        """Replace single pixels (N, 2) by the median round them and filter anew there, in place."""
        change = -values_at(residual_HW, xy)
        residual_HW[xy[:, 1], xy[:, 0]] = np.sort(surroundings(residual_HW, xy), axis=1)[:, 4]
        change += values_at(residual_HW, xy)
        response = np.outer(self._kernel, self._kernel)
        for (x, y), step in zip((xy - self.radius).tolist(), change.tolist(), strict=True):
            here = (slice(y, y + len(response)), slice(x, x + len(response)))
            snr_HW[here] += step * response / sigma_HW[here]


def _widened(coarse: Image, image_HW: NDArray[Any]) -> Image:
    """A coarse image at the width of the whole one, as `point_passes` take it."""
    return float32(cv2.resize(coarse, (image_HW.shape[1], len(coarse))))
