"""What the array API standard lacks: special functions, and random draws for any array library."""

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import scipy.special
from array_api_compat import array_namespace, is_numpy_array

Array = Any
"""A numpy array or a torch tensor."""


def erf(x: Array) -> Array:
    """Error function, elementwise, for numpy arrays and torch tensors."""
    return scipy.special.erf(x) if is_numpy_array(x) else array_namespace(x).erf(x)


def log_normal_cdf(x: Array) -> Array:
    """Logarithm of Φ(x), accurate far into the tail, for numpy arrays and torch tensors."""
    if is_numpy_array(x):
        return scipy.special.log_ndtr(x)
    return array_namespace(x).special.log_ndtr(x)


class Random(Protocol):
    """A seeded source of randomness; what it returns decides numpy or torch, and the device."""

    def uniform(self, shape: Sequence[int]) -> Array:
        """Uniform in [0, 1)."""
        ...

    def normal(self, shape: Sequence[int]) -> Array:
        """Standard normal."""
        ...


class NumpyRandom:
    """`Random` over a numpy generator: float64 arrays, reproducible from `seed`."""

    def __init__(self, seed: int | Sequence[int]) -> None:
        self.generator = np.random.default_rng(seed)

    def uniform(self, shape: Sequence[int]) -> Array:
        """Uniform in [0, 1), float64."""
        return self.generator.random(tuple(shape))

    def normal(self, shape: Sequence[int]) -> Array:
        """Standard normal, float64."""
        return self.generator.standard_normal(tuple(shape))
