# mypy: allow-untyped-defs, allow-untyped-calls
# ruff: noqa: ANN001, ANN202
"""Bad pixels replaced by what is round them."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.imaging.sampling import STEPS
from pipeline.physics.compiled import compiled


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
        near = np.where(inside, near_y * width + near_x, self._bad[:, None])
        ignored = bad_HW.ravel()[near]
        # The good ones first.
        self._near = np.take_along_axis(near, np.argsort(ignored, axis=1, kind="stable"), axis=1)
        self._number = np.count_nonzero(~ignored, axis=1)
        self._lonely = bool((self._number == 0).any())

    def __call__(self, pixels_HW: NDArray[Any]) -> NDArray[Any]:
        """A copy of the frame without bad pixels."""
        clean_HW = pixels_HW.copy()
        least = clean_HW.dtype.type(0)
        if self._lonely and self.usable_HW.any():
            least = pixels_HW[self.usable_HW].min()
        _mend(clean_HW.ravel(), self._bad, self._near, self._number, least)
        return clean_HW


def compile_repair() -> None:
    """Have this compiled, or read from its cache, now instead of with the first frame."""
    repair = Repair(np.zeros((1, 1), np.bool_))
    for dtype in (np.uint8, np.uint16, np.float32):
        repair(np.zeros((1, 1), dtype))


@compiled
def _mend(values, bad, near, number, least):
    """Give values at bad (N,) the median of those at near (N, 9), of which `number` are good."""
    found = np.empty(near.shape[1], values.dtype)
    for n in range(len(bad)):
        for k in range(number[n]):
            value, place = values[near[n, k]], k
            while place > 0 and found[place - 1] > value:
                found[place] = found[place - 1]
                place -= 1
            found[place] = value
        values[bad[n]] = found[(number[n] - 1) // 2] if number[n] > 0 else least
