"""Several frames: the matched filter over what moves against a background learnt over time.

1. Registration: the shift between the learnt background and the frame, at half resolution by phase
   correlation and then by least squares, which is finer; the background is moved under the frame,
   so camera jitter makes no edges.
2. Residual: frame − background, less what is left of it at scales wider than a group (clouds
   that drift).
3. Matched filter and noise by blocks as in `matched_filter`; where the background is steep (a
   horizon, a roof, a star) the registration's error counts as noise too: the slope times
   `registration_px`, and times half of what the camera moves from frame to frame, up to a pixel,
   since a moved background is interpolated. Then the frame is averaged into the background.

In the first `warm_up_frames`, and again after the frame's shape has changed or the camera has moved
by more than `max_shift_px`, there is no background to compare with: the frame gets the statistic of
`matched_filter`. What stands still for about `memory_frames` becomes background, and what moves
slower than some widths in that time grows fainter. Leaves and glint, which move too, are found.
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

REFINEMENTS = 3
STILL_PX = 0.03
"""A shift below the error of its estimate is none, and the background is not blurred by it."""


class Temporal(Detector):
    """Keeps the mean of the frames so far."""

    class Config(Settings):
        """Times in frames; block_px as in matched_filter."""

        memory_frames: int = Field(60, ge=2, le=10_000)
        warm_up_frames: int = Field(8, ge=2, le=10_000)
        max_shift_px: float = Field(16.0, gt=0.0, le=1000.0)
        registration_px: float = Field(0.1, ge=0.0, le=10.0)
        block_px: int = Field(32, ge=BLOCK_SAMPLES, le=1024)

    def __init__(self, config: Config, sensor: Sensor) -> None:
        super().__init__(config, sensor)
        self._filter = PointFilter(sensor)
        self._first = MatchedFilter(MatchedFilter.Config(block_px=config.block_px), sensor)
        self._seen, self._shift_px = 0, 0.0
        self._mean_HW = self._taper = np.zeros((0, 0), np.float32)

    def signal(self, clean_HW: NDArray[Any]) -> Signal:
        """SNR against the background learnt from the frames before; learns this one."""
        frame_HW = clean_HW.astype(np.float32)
        if not self._registered(frame_HW):
            self._seen, self._shift_px = 0, 0.0
            self._mean_HW = frame_HW.copy()
        if self._seen < self._config.warm_up_frames:
            signal = self._first.signal(clean_HW)
        else:
            moving_HW = frame_HW - self._mean_HW
            slow = self._filter.background(moving_HW)
            moving_HW -= cv2.resize(slow, clean_HW.shape[::-1])
            filtered_HW = self._filter(moving_HW)
            level = self._filter.background(clean_HW)
            sigma_HW = self._filter.sigma(filtered_HW, level, self._config.block_px)
            sigma_HW = float32(cv2.magnitude(sigma_HW, self._unsure()))
            signal = Signal(moving_HW, filtered_HW / sigma_HW, sigma_HW)
        self._seen = min(self._seen + 1, self._config.memory_frames)
        cv2.accumulateWeighted(frame_HW, self._mean_HW, 1.0 / self._seen)
        return signal

    def mended(self, signal: Signal, clean_HW: NDArray[Any], xy: Integers) -> Signal:  # noqa: ARG002
        """The same arrays, changed round the mended pixels only: the frame is learnt once."""
        self._filter.replaced(*signal, xy)
        return signal

    def _unsure(self) -> Image:
        """How far the filtered background (H, W) may be wrong by being misplaced, counts."""
        filtered_HW = self._filter(self._mean_HW)
        scale = 0.125 * (self._config.registration_px + 0.5 * min(self._shift_px, 1.0))
        slope = [cv2.Sobel(filtered_HW, cv2.CV_32F, x, 1 - x, scale=scale) for x in (0, 1)]
        # on a peak, which is flat, what counts is the slope beside it
        return float32(cv2.dilate(cv2.magnitude(*slope), np.ones((3, 3), np.uint8)))

    def _registered(self, frame_HW: Image) -> bool:
        """Move the background under the frame; False if there is none that would fit."""
        if self._seen == 0 or self._mean_HW.shape != frame_HW.shape:
            return False
        learnt, seen = _halved(self._mean_HW), _halved(frame_HW)
        if self._taper.shape != seen.shape:
            self._taper = float32(cv2.createHanningWindow(seen.shape[::-1], cv2.CV_32F))
        coarse, _ = cv2.phaseCorrelate(learnt, seen, self._taper)
        dx, dy = 2.0 * _refined(learnt, seen, self._taper, np.array(coarse))
        if not np.hypot(dx, dy) <= self._config.max_shift_px:  # not a number: a constant frame
            return False
        self._shift_px += (float(np.hypot(dx, dy)) - self._shift_px) / max(self._seen, 1)
        if np.hypot(dx, dy) > STILL_PX:
            self._mean_HW = _moved(self._mean_HW, np.array([dx, dy]))
        return True


def _moved(image_HW: Image, shift_px: NDArray[np.float64]) -> Image:
    """The image (H, W) moved by x, y px."""
    move = np.column_stack([np.eye(2), shift_px])
    size, flags, border = image_HW.shape[::-1], cv2.INTER_CUBIC, cv2.BORDER_REPLICATE
    return float32(cv2.warpAffine(image_HW, move, size, flags=flags, borderMode=border))


def _refined(
    learnt: Image, seen: Image, taper: Image, shift_px: NDArray[np.float64]
) -> NDArray[np.float64]:
    """The shift (2,) by least squares on the differences, from a coarse one (Lucas and Kanade)."""
    for _ in range(REFINEMENTS):
        if not np.hypot(*shift_px) < min(learnt.shape):  # not a number: a constant frame
            break
        moved = _moved(learnt, shift_px)
        slope = np.stack(
            [taper * cv2.Sobel(moved, cv2.CV_32F, x, 1 - x, scale=0.125) for x in (1, 0)]
        ).reshape(2, -1)
        square = (slope @ slope.T).astype(np.float64)
        wanted = (slope @ (taper * (moved - seen)).ravel()).astype(np.float64)
        shift_px = shift_px + np.linalg.solve(square + 1e-6 * np.eye(2), wanted)
    return shift_px


def _halved(image_HW: Image) -> Image:
    """At half resolution and without its mean, which would weigh on the correlation."""
    height, width = image_HW.shape
    small = cv2.resize(image_HW, (width // 2, height // 2), interpolation=cv2.INTER_AREA)
    return float32(small - small.mean())
