# mypy: allow-untyped-defs, allow-untyped-calls
# ruff: noqa: ANN001, ANN202
"""Is everything a network said a number? `np.isfinite(map).all()`, without an array between."""

import math

import numpy as np
from numpy.typing import NDArray

from pipeline.physics.compiled import compiled, read_only


def all_finite(map_BHW: NDArray[np.float32]) -> bool:
    """True if no value is infinite or NaN."""
    found: bool = _all_finite(read_only(map_BHW).ravel())
    return found


def compile_finite() -> None:
    """Have this compiled, or read from its cache, now instead of with the first frame."""
    all_finite(np.zeros(0, np.float32))


@compiled
def _all_finite(values):
    finite = True
    for n in range(len(values)):  # all of them: with a way out it would go one by one
        finite &= math.isfinite(values[n])
    return finite
