"""White top-hat: what an opening removes, compared with its spread in the neighbourhood.

An opening by a disc of `size_px` removes what the disc does not fit into: points, but also thin
lines and the noise's peaks. In white noise its values are no Gaussian; at start the detector looks
at noise it makes itself and so learns which of its values is how many sigmas.
"""

from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from scipy.special import ndtr

from pipeline.component import Settings
from pipeline.detector import Detector, Signal
from pipeline.imaging.noise_blocks import BLOCK_SAMPLES, WITHIN_SIGMA, block_samples, float32
from pipeline.imaging.point_filter import PointFilter
from pipeline.imaging.regions import Image
from pipeline.physics.sensor import Sensor

CALIBRATION_PX = 512
CALIBRATION_SIGMAS = np.linspace(2.5, 3.9, 15)
"""Between these, where noise of CALIBRATION_PX² has enough values, a line is fitted."""


class TopHat(Detector):
    """Calibrated on white noise."""

    class Config(Settings):
        """size_px: diameter of the disc, wider than a group; block_px: as in matched_filter."""

        size_px: int = Field(7, ge=3, le=63)
        block_px: int = Field(32, ge=BLOCK_SAMPLES, le=1024)

    def __init__(self, config: Config, sensor: Sensor) -> None:
        super().__init__(config, sensor)
        self._filter = PointFilter(sensor)
        self._disc = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (config.size_px, config.size_px))
        rng = np.random.default_rng(0)
        noise_HW = rng.standard_normal((CALIBRATION_PX, CALIBRATION_PX), np.float32)
        _, top_hat_HW = self._opened(noise_HW)
        level, self._noise_share = np.quantile(top_hat_HW, [0.5, 0.5 + 0.5 * WITHIN_SIGMA])
        self._noise_share -= level
        values = np.quantile(
            (top_hat_HW - level) / self._noise_share, ndtr(CALIBRATION_SIGMAS).astype(np.float64)
        )
        self._slope, self._offset = np.polyfit(values, CALIBRATION_SIGMAS, 1).tolist()

    def signal(self, clean_HW: NDArray[Any]) -> Signal:
        """Top-hat above its block's median, over its spread there, in equivalent sigmas."""
        opened_HW, residual_HW = self._opened(clean_HW)
        ordered = block_samples(residual_HW, self._config.block_px)
        samples = ordered.shape[-1]
        level = ordered[..., samples // 2]
        spread = ordered[..., round((0.5 + 0.5 * WITHIN_SIGMA) * samples)] - level
        mean = cv2.resize(opened_HW, level.shape[::-1], interpolation=cv2.INTER_AREA)
        floor = float(self._noise_share) * self._filter.noise_floor(mean)
        sigma = np.maximum(np.maximum(spread, cv2.blur(spread, (3, 3))), floor)
        size = clean_HW.shape[::-1]
        level_HW, sigma_HW = (float32(cv2.resize(image, size)) for image in (level, sigma))
        snr_HW = self._offset + self._slope * (residual_HW - level_HW) / sigma_HW
        snr_HW[residual_HW <= 0.0] = 0.0
        return Signal(residual_HW, float32(snr_HW), sigma_HW)

    def _opened(self, clean_HW: NDArray[Any]) -> tuple[Image, Image]:
        """The opening of an image and what it removes."""
        opened_HW = cv2.morphologyEx(clean_HW, cv2.MORPH_OPEN, self._disc)
        return float32(opened_HW), float32(cv2.subtract(clean_HW, opened_HW, dtype=cv2.CV_32F))
