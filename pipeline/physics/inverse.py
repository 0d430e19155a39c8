# mypy: allow-untyped-defs, allow-untyped-calls
# ruff: noqa: ANN001, ANN201, ANN202
"""Covariance bounds, compiled: `bounds.cramer_rao`, by Cholesky where that will do."""

import math

import numpy as np
from numba import prange
from numpy.typing import NDArray

from pipeline.physics.compiled import compiled, compiled_with

FLOOR = 1e-12
"""Least eigenvalue of information scaled to a unit diagonal, as in `bounds.cramer_rao`."""

Array64 = NDArray[np.float64]


def inverses(information_BPP: Array64) -> Array64:
    """`bounds.cramer_rao` of each matrix (P, P) of a batch, to rounding."""
    bound = np.empty_like(information_BPP)
    _inverses(information_BPP, bound)
    return bound


@compiled_with(parallel=True)
def _inverses(information, bound):
    for b in prange(len(information)):
        bound[b] = inverse(information[b])


@compiled
def inverse(information):
    """`bounds.cramer_rao` of one matrix (P, P), in compiled code."""
    size = len(information)
    scale = np.empty(size)
    for p in range(size):
        scale[p] = 1.0 / math.sqrt(max(information[p, p], 1e-30))
    scaled = np.empty((size, size))
    for p in range(size):
        for q in range(size):
            scaled[p, q] = information[p, q] * scale[p] * scale[q]
    bound = np.zeros((size, size))
    if not np.isfinite(scaled).all():
        return bound + np.nan
    # The sum of one over the eigenvalues: small enough, and none of them is near the floor.
    if not _inverted(scaled, bound) < 1e-3 / FLOOR:
        _inverted_above_floor(scaled, bound)
    for p in range(size):
        for q in range(size):
            bound[p, q] *= scale[p] * scale[q]
    return bound


@compiled
def _inverted(matrix, inverse):
    """Fill the inverse by Cholesky's factor; returns its trace, infinite where there is none."""
    size = len(matrix)
    lower = np.zeros((size, size))  # inverse of the factor
    factor = np.zeros((size, size))
    for p in range(size):
        for q in range(p + 1):
            total = matrix[p, q]
            for n in range(q):
                total -= factor[p, n] * factor[q, n]
            if p > q:
                factor[p, q] = total / factor[q, q]
            elif total > 0.0:
                factor[p, p] = math.sqrt(total)
            else:
                return math.inf
        lower[p, p] = 1.0 / factor[p, p]
        for q in range(p):
            total = 0.0
            for n in range(q, p):
                total -= factor[p, n] * lower[n, q]
            lower[p, q] = total / factor[p, p]
    trace = 0.0
    for p in range(size):
        for q in range(p + 1):
            total = 0.0
            for n in range(p, size):
                total += lower[n, p] * lower[n, q]
            inverse[p, q] = inverse[q, p] = total
        trace += inverse[p, p]
    return trace


@compiled
def _inverted_above_floor(matrix, inverse):
    """Fill the inverse with no eigenvalue below the floor."""
    values, vectors = np.linalg.eigh(matrix)
    for p in range(len(matrix)):
        for q in range(len(matrix)):
            inverse[p, q] = 0.0
            for n in range(len(matrix)):
                inverse[p, q] += vectors[p, n] * vectors[q, n] / max(values[n], FLOOR)
