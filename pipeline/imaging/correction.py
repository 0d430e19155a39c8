"""Raw counts into uniform ones: two-point correction, and patterns of columns and rows."""

from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from pipeline.formats.calibration import Calibration

SMOOTH_PX = 31
"""A column is compared with the mean of as many: what varies more slowly is scene, or harmless."""

SAMPLES = 128
"""Rows, evenly spaced, of which a column's median is taken: 0.11 of a pixel's noise is added."""

Image = NDArray[np.float32]


def two_point(raw_HW: NDArray[Any], calibration: Calibration) -> Image:
    """Gain and offset of each pixel: counts (H, W), not rounded."""
    image_HW = cv2.multiply(raw_HW, calibration.gain_HW, dtype=cv2.CV_32F)
    image_HW = cv2.add(image_HW, calibration.offset_HW, dtype=cv2.CV_32F)
    return np.asarray(image_HW, dtype=np.float32)


def without_columns(image_HW: Image) -> Image:
    """The frame without what differs from column to column, in all of its rows alike.

    Of each pixel's difference from the mean of SMOOTH_PX neighbours in its row the column's median
    is taken, which targets and bad pixels do not move.
    """
    rows_HW = np.ascontiguousarray(image_HW[:: max(len(image_HW) // SAMPLES, 1)])
    middle = len(rows_HW) // 2
    rest_HW = rows_HW - _moving_mean(rows_HW)
    column_W: Image = np.partition(rest_HW, middle, axis=0)[middle]
    return image_HW - column_W


def _moving_mean(rows_HW: Image) -> Image:
    """Over SMOOTH_PX pixels of each row; near its ends the line fitted to the last SMOOTH_PX."""
    reach = (min(SMOOTH_PX, rows_HW.shape[1]) - 1) // 2
    length = 2 * reach + 1
    place = np.arange(length) - reach
    line = (1.0 / length + np.outer(place, place[:reach]) / (place @ place)).astype(np.float32)
    smooth_HW = np.asarray(cv2.blur(rows_HW, (length, 1)), dtype=np.float32)
    smooth_HW[:, :reach] = rows_HW[:, :length] @ line
    smooth_HW[:, -reach:] = rows_HW[:, -length:] @ line[::-1, ::-1]
    return smooth_HW


def without_rows(image_HW: Image) -> Image:
    """The same for rows; a level horizon is one, so not for a camera that sees it."""
    return np.ascontiguousarray(without_columns(np.ascontiguousarray(image_HW.T)).T)


def to_counts(image_HW: Image, full_scale: int, dtype: np.dtype[Any]) -> NDArray[Any]:
    """Rounded, from 0 to full scale."""
    return np.clip(np.rint(image_HW), 0, full_scale).astype(dtype)
