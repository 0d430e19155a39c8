"""Bad pixels replaced by what is round them."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.imaging.sampling import STEPS


class Repair:
    """Replaces the pixels of a map, all that can be known beforehand worked out once.

    A bad pixel takes the median of the good among its eight neighbours; one without any takes
    the least of all good pixels, so that nothing is ever seen there.
    """

    def __init__(self, bad_HW: NDArray[np.bool_]) -> None:
        self.usable_HW = ~bad_HW
        height, width = bad_HW.shape
        y, x = np.nonzero(bad_HW)
        near_y = y[:, None] + STEPS[..., 1].ravel()
        near_x = x[:, None] + STEPS[..., 0].ravel()
        inside = (near_y >= 0) & (near_y < height) & (near_x >= 0) & (near_x < width)
        self._bad = y * width + x
        self._near = np.where(inside, near_y * width + near_x, self._bad[:, None])
        self._ignored = bad_HW.ravel()[self._near]
        number = (~self._ignored).sum(axis=1)
        self._middle = np.maximum(number - 1, 0)[:, None] // 2
        self._lonely = number == 0

    def __call__(self, pixels_HW: NDArray[Any]) -> NDArray[Any]:
        """A copy of the frame without bad pixels."""
        clean_HW = pixels_HW.copy()
        near = clean_HW.ravel()[self._near].astype(np.float32)
        near[self._ignored] = np.inf
        near.sort(axis=1)
        value = np.take_along_axis(near, self._middle, axis=1)[:, 0]
        if self._lonely.any():
            good = pixels_HW[self.usable_HW]
            value[self._lonely] = good.min() if len(good) else 0
        clean_HW.ravel()[self._bad] = value
        return clean_HW
