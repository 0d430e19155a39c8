"""A calibration from two recordings of uniform scenes, a darker and a brighter one.

Two-point correction: gain and offset of each pixel that take its two mean levels to those of the
median pixel. Photon transfer (Janesick, 2007): the variance in time, over the good pixels, is
read² + level/gain, so the two levels give read noise and gain.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from pipeline.errors import PipelineError
from pipeline.formats.calibration import Calibration

MIN_FRAMES = 16
"""With fewer, quiet pixels look noisy by chance: 1 in 10 million of 16 frames doubles."""

RESPONSE = 0.25
"""A pixel that answers by this much more or less than those round it is bad."""

NOISE = 2.0
"""A pixel with so many times the median's noise is bad; one with a tenth of it is stuck."""

TOO_MANY = 0.2
SIGNIFICANT = 10.0
ROUNDING = 1.0 / 12.0

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Level:
    """Pixels of one uniform scene over time, (H, W) each."""

    mean_HW: Array
    variance_HW: Array  # changes that all pixels share are taken out
    saturated_HW: Mask  # at full scale, or at zero, in a frame or more
    frames: int


@dataclass(frozen=True)
class Estimate:
    """A calibration, and what else the two levels say of the sensor."""

    calibration: Calibration
    read_noise: float  # counts rms
    gain: float  # electrons per count
    levels: tuple[float, float]  # counts
    pedestal: bool  # the counts have an offset: shot noise is less than read noise allows
    unlike: int  # pixels that respond more or less than their neighbours
    noisy: int
    saturated: int


def measure(frames: Iterable[NDArray[Any]], full_scale: int) -> Level:
    """Statistics of a uniform scene's frames (H, W); raises ValueError on fewer than MIN_FRAMES."""
    count = 0
    for pixels_HW in frames:
        counts_HW = pixels_HW.astype(np.float64)
        if count == 0:
            first_HW = counts_HW
            total_HW, square_HW = np.zeros_like(first_HW), np.zeros_like(first_HW)
            saturated_HW = np.zeros(first_HW.shape, np.bool_)
            drift = 0.0
        change_HW = counts_HW - first_HW
        shared = float(change_HW.mean())
        change_HW -= shared
        drift += shared
        total_HW += change_HW
        square_HW += change_HW * change_HW
        saturated_HW |= (pixels_HW >= full_scale) | (pixels_HW == 0)
        count += 1
    if count < MIN_FRAMES:
        raise ValueError(f"holds {count} frames; record at least {MIN_FRAMES}")
    mean_HW = total_HW / count
    variance_HW = np.maximum(square_HW - count * mean_HW**2, 0.0) / (count - 1)
    return Level(first_HW + mean_HW + drift / count, variance_HW, saturated_HW, count)


def estimate(low: Level, high: Level, full_scale: int) -> Estimate:
    """Correction, bad pixels and noise; raises PipelineError if the levels cannot give them."""
    response_HW = high.mean_HW - low.mean_HW
    response = float(np.median(response_HW))
    spread = float(
        np.sqrt(np.median(low.variance_HW / low.frames + high.variance_HW / high.frames))
    )
    if response <= SIGNIFICANT * spread:
        raise PipelineError(
            f"the levels differ by {response:.1f} counts only; give the darker scene first, "
            "and a brighter one second"
        )
    local_HW = cv2.medianBlur(response_HW.astype(np.float32), 5)
    unlike_HW = np.abs(response_HW - local_HW) > RESPONSE * np.abs(local_HW)
    unlike_HW |= response_HW < RESPONSE * response
    saturated_HW = low.saturated_HW | high.saturated_HW
    noisy_HW = _noisy(low.variance_HW) | _noisy(high.variance_HW)
    bad_HW = unlike_HW | saturated_HW | noisy_HW
    if bad_HW.mean() > TOO_MANY:
        raise PipelineError(
            f"{100 * bad_HW.mean():.0f} % of the pixels are bad ({_count(unlike_HW)} unlike their "
            f"neighbours, {_count(noisy_HW)} noisy, {_count(saturated_HW)} saturated or zero); "
            "record uniform scenes within the sensor's range"
        )
    good_HW = ~bad_HW
    levels = [float(np.median(level.mean_HW[good_HW])) for level in (low, high)]
    gain_HW = np.where(bad_HW, 1.0, (levels[1] - levels[0]) / np.where(bad_HW, 1.0, response_HW))
    offset_HW = np.where(bad_HW, 0.0, levels[0] - gain_HW * low.mean_HW)
    variances = [
        float(np.mean((gain_HW**2 * level.variance_HW)[good_HW])) - ROUNDING
        for level in (low, high)
    ]
    read_noise, gain, pedestal = photon_transfer(levels, variances)
    return Estimate(
        Calibration(
            gain_HW.astype(np.float32),
            offset_HW.astype(np.float32),
            bad_HW,
            full_scale,
        ),
        read_noise,
        gain,
        (levels[0], levels[1]),
        pedestal,
        *(_count(mask_HW) for mask_HW in (unlike_HW, noisy_HW, saturated_HW)),
    )


def photon_transfer(levels: list[float], variances: list[float]) -> tuple[float, float, bool]:
    """Read noise (counts rms), gain (electrons per count), and whether the counts have a pedestal.

    Without a rise of the variance there is no shot noise: infinite gain. Where the line through
    the two points has no variance left at level 0, the counts hold a pedestal: then read noise is
    0 and the gain is right halfway between the levels.
    """
    low, high = levels
    slope = (variances[1] - variances[0]) / (high - low)
    if slope <= 0.0:
        return math.sqrt(max(sum(variances) / 2.0, 0.0)), math.inf, False
    left = variances[0] - slope * low
    if left < 0.0:
        return 0.0, (low + high) / sum(variances), True
    return math.sqrt(left), 1.0 / slope, False


def _noisy(variance_HW: Array) -> Mask:
    usual = float(np.median(variance_HW))
    noisy_HW = variance_HW > NOISE**2 * max(usual, ROUNDING)
    if usual > 1.0:
        noisy_HW |= variance_HW < 0.01 * usual
    return noisy_HW


def _count(mask_HW: Mask) -> int:
    return int(np.count_nonzero(mask_HW))
