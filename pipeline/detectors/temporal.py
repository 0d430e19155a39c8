"""Several frames: the matched filter over what moves against a background learnt over time.

1. Registration: the shift between the learnt background and the frame by phase correlation at half
   resolution; the background is moved under the frame, so camera jitter makes no edges.
2. Residual: frame − background, less what is left of it at scales wider than a group (clouds
   that drift).
3. Matched filter and noise by blocks as in `matched_filter`; and where the filtered residual has
   been restless in the frames before (a horizon that shakes, glint, leaves) its own deviation over
   time is taken for noise. Then the frame is averaged into the background.

In the first `warm_up_frames`, and again after the frame's shape has changed or the camera has moved
by more than `max_shift_px`, there is no background to compare with: the frame gets the statistic of
`matched_filter`. What stands still for about `memory_frames` becomes background, and what moves
slower than its own width in that time grows fainter.
"""

from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from pipeline.component import Settings
from pipeline.detector import Detector, Signal
from pipeline.detectors.matched_filter import MatchedFilter
from pipeline.imaging.noise_blocks import BLOCK_SAMPLES, float32
from pipeline.imaging.point_filter import PointFilter
from pipeline.imaging.regions import Image
from pipeline.imaging.sampling import Integers
from pipeline.physics.sensor import Sensor

STILL_PX = 0.03
"""A shift below the error of its estimate is none, and the background is not blurred by it."""


class Temporal(Detector):
    """Keeps the mean of the frames so far and the power of what moved over it."""

    class Config(Settings):
        """Times in frames; block_px as in matched_filter."""

        memory_frames: int = Field(60, ge=2, le=10_000)
        warm_up_frames: int = Field(8, ge=2, le=10_000)
        max_shift_px: float = Field(16.0, gt=0.0, le=1000.0)
        block_px: int = Field(32, ge=BLOCK_SAMPLES, le=1024)

    def __init__(self, config: Config, sensor: Sensor) -> None:
        super().__init__(config, sensor)
        self._filter = PointFilter(sensor)
        self._first = MatchedFilter(MatchedFilter.Config(block_px=config.block_px), sensor)
        self._seen = 0
        self._mean_HW = self._power_HW = self._taper = np.zeros((0, 0), np.float32)

    def signal(self, clean_HW: NDArray[Any]) -> Signal:
        """SNR against the background learnt from the frames before; learns this one."""
        frame_HW = clean_HW.astype(np.float32)
        if not self._registered(frame_HW):
            self._seen = 0
            self._mean_HW = frame_HW.copy()
            self._power_HW = np.zeros_like(frame_HW)
        moving_HW = frame_HW - self._mean_HW
        slow = self._filter.background(moving_HW)
        moving_HW -= cv2.resize(slow, clean_HW.shape[::-1])
        filtered_HW = self._filter(moving_HW)
        if self._seen < self._config.warm_up_frames:
            signal = self._first.signal(clean_HW)
        else:
            level = self._filter.background(clean_HW)
            sigma_HW = self._filter.sigma(filtered_HW, level, self._config.block_px)
            # running sums may fall a little below zero
            restless_HW = np.sqrt(np.maximum(cv2.blur(self._power_HW, (3, 3)), 0.0))
            sigma_HW = float32(np.maximum(sigma_HW, restless_HW))
            signal = Signal(moving_HW, filtered_HW / sigma_HW, sigma_HW)
        self._seen = min(self._seen + 1, self._config.memory_frames)
        weight = 1.0 / self._seen
        cv2.accumulateWeighted(frame_HW, self._mean_HW, weight)
        if self._seen > 1:  # the first frame differs from itself by nothing
            weight = 1.0 / (self._seen - 1)
            cv2.accumulateWeighted(filtered_HW**2, self._power_HW, weight)
        return signal

    def mended(self, signal: Signal, clean_HW: NDArray[Any], xy: Integers) -> Signal:  # noqa: ARG002
        """The same arrays, changed round the mended pixels only: the frame is learnt once."""
        self._filter.replaced(*signal, xy)
        return signal

    def _registered(self, frame_HW: Image) -> bool:
        """Move the background under the frame; False if there is none that would fit."""
        if self._seen == 0 or self._mean_HW.shape != frame_HW.shape:
            return False
        learnt, seen = _halved(self._mean_HW), _halved(frame_HW)
        if self._taper.shape != seen.shape:
            self._taper = float32(cv2.createHanningWindow(seen.shape[::-1], cv2.CV_32F))
        (dx, dy), _ = cv2.phaseCorrelate(learnt, seen, self._taper)
        dx, dy = 2.0 * dx, 2.0 * dy
        if not np.hypot(dx, dy) <= self._config.max_shift_px:  # not a number: a constant frame
            return False
        if np.hypot(dx, dy) > STILL_PX:
            move = np.array([[1.0, 0.0, dx], [0.0, 1.0, dy]])
            size, border = frame_HW.shape[::-1], cv2.BORDER_REPLICATE
            self._mean_HW, self._power_HW = (
                float32(cv2.warpAffine(image_HW, move, size, borderMode=border))
                for image_HW in (self._mean_HW, self._power_HW)
            )
        return True


def _halved(image_HW: Image) -> Image:
    """At half resolution and without its mean, which would weigh on the correlation."""
    height, width = image_HW.shape
    small = cv2.resize(image_HW, (width // 2, height // 2), interpolation=cv2.INTER_AREA)
    return float32(small - small.mean())
