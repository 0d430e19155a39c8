# mypy: allow-untyped-defs, allow-untyped-calls
# ruff: noqa: ANN001, ANN201, ANN202
"""The inner loop of the fit: Levenberg-Marquardt with Fisher scoring, one patch after another.

Compiled by Numba, a patch at a time on any core, so that a patch's answer does not depend on its
batch mates. The model and its parameters: `pipeline/physics/patch_model.py`.
"""

import math

import numpy as np
from numba import prange

from pipeline.physics.compiled import compiled_with
from pipeline.physics.patch_model import (
    EXPECTED,
    OBSERVED,
    bend,
    compiled,
    expect,
    log_likelihood,
    log_prior,
    normal_equations,
    reduced_chi2,
    respond_all,
    weigh,
)

MAX_STEP_PX = 0.4
CONVERGED_GAIN = 1e-2  # nats: a hundredth of what one standard deviation is worth, and less
STIFFEST = 1e8


@compiled
def _factor(normal, damping, factor):
    """Cholesky factor of the lower triangle, diagonal raised by the share `damping`; or False."""
    size = len(normal)
    for p in range(size):
        for q in range(p + 1):
            total = normal[p, q]
            if p == q:
                total += damping * normal[p, p] + 1e-12
            for n in range(q):
                total -= factor[p, n] * factor[q, n]
            if p == q:
                if not total > 0.0:
                    return False
                factor[p, p] = math.sqrt(total)
            else:
                factor[p, q] = total / factor[q, q]
    return True


@compiled
def _solve(factor, values, out):
    """Solve L Lᵀ out = values."""
    size = len(values)
    for p in range(size):
        total = values[p]
        for n in range(p):
            total -= factor[p, n] * out[n]
        out[p] = total / factor[p, p]
    for p in range(size - 1, -1, -1):
        total = out[p]
        for n in range(p + 1, size):
            total -= factor[n, p] * out[n]
        out[p] = total / factor[p, p]


@compiled
def _moved(parameters, step, width, height, sigma_px, out):
    """Parameters a step on: no target moves far, none gets dark, all stay about the patch."""
    size = len(parameters)
    largest = 0.0
    for p in range(size - 2):
        if p % 3 < 2:
            largest = max(largest, abs(step[p]))
    shorter = min(1.0, MAX_STEP_PX / max(largest, 1e-12))
    for p in range(size - 2):
        value = parameters[p] + shorter * step[p]
        if p % 3 == 2:  # an intensity is at most halved in a step, so it never reaches zero
            out[p] = max(value, 0.5 * parameters[p])
        else:
            out[p] = min(max(value, -1.0), float(width if p % 3 == 0 else height))
    out[size - 2] = parameters[size - 2] + shorter * step[size - 2]
    sigma = parameters[size - 1] + shorter * step[size - 1]
    out[size - 1] = min(max(sigma, 0.5 * sigma_px), 2.0 * sigma_px)


@compiled
def _fit_one(counts, level, usable, parameters, prior, precision, wall, sensor, iterations):
    """One patch; see `fit_patches`. → log-likelihood, converged, reduced χ², normal matrix."""
    height, width = counts.shape
    size = len(parameters)
    separation, stiffness = wall
    axes = np.empty((2, (size - 2) // 3, 4, max(height, width)))
    mean, score, weight = np.empty((3, height, width))
    rows, normal = np.empty((size, height * width)), np.zeros((size, size))
    slope, step, tried = np.empty(size), np.empty(size), np.empty(size)
    factor = np.empty((size, size))
    sigma_px = prior[size - 1]
    respond_all(parameters, axes)
    expect(parameters, level, axes, mean)
    best = log_likelihood(counts, usable, mean, sensor) + log_prior(
        parameters, prior, precision, separation, stiffness
    )
    damping, converged, fresh = 1e-3, False, False
    for _ in range(iterations):
        if not fresh:
            weigh(counts, usable, mean, sensor, score, weight, EXPECTED)
            normal_equations(
                parameters, prior, precision, separation, stiffness, axes, score, weight, rows,
                normal, slope,
            )  # fmt: skip
            known = True
            for p in range(size):
                known = known and normal[p, p] > 0.0
            promised = np.inf
            if known and _factor(normal, 1e-9, factor):
                _solve(factor, slope, step)
                promised = 0.0
                for p in range(size):
                    promised += 0.5 * slope[p] * step[p]
            converged = promised < CONVERGED_GAIN
            fresh = True
        while not _factor(normal, damping, factor):
            damping *= 8.0
            if damping > STIFFEST:
                break
        if damping > STIFFEST:
            break
        _solve(factor, slope, step)
        _moved(parameters, step, width, height, sigma_px, tried)
        respond_all(tried, axes)
        expect(tried, level, axes, mean)
        value = log_likelihood(counts, usable, mean, sensor) + log_prior(
            tried, prior, precision, separation, stiffness
        )
        if value >= best:
            best = value
            parameters[:] = tried
            damping *= 0.2
            fresh = False
        else:
            damping *= 8.0
        if converged:
            break
    respond_all(parameters, axes)
    expect(parameters, level, axes, mean)
    weigh(counts, usable, mean, sensor, score, weight, OBSERVED)
    normal_equations(
        parameters, prior, precision, separation, stiffness, axes, score, weight, rows, normal,
        slope,
    )  # fmt: skip
    bend(parameters, axes, score, normal)
    if not _factor(normal, 0.0, factor):  # no maximum as yet: what it is expected to be
        weigh(counts, usable, mean, sensor, score, weight, EXPECTED)
        normal_equations(
            parameters, prior, precision, separation, stiffness, axes, score, weight, rows,
            normal, slope,
        )  # fmt: skip
    return best, converged, reduced_chi2(counts, usable, mean, sensor, precision), normal


@compiled_with(parallel=True)
def fit_patches(
    counts, level, usable, targets, present, shared, prior, precision, shared_prior,
    shared_precision, wall, sensor, iterations, log_likelihood, converged, chi2, normal,
):  # fmt: skip
    """Fit each patch of a batch in place.

    counts, level, usable (B, H, W); targets (B, K, 3) x, y, intensity, present (B, K) and shared
    (B, 2) offset and σ are the start and become the answer; prior and precision (B, K, 3),
    shared_prior and shared_precision (2,); wall: separation px and stiffness 1/px²; sensor: full
    scale, read variance, one over the gain. Filled: log_likelihood, converged, chi2 (B,), and
    normal (B, 3K + 2, 3K + 2), the observed information with that of the prior, 1 on the diagonal
    of absent targets.
    """
    for b in prange(len(counts)):
        number = int(present[b].sum())
        size = 3 * number + 2
        own, mean, known = np.empty(size), np.empty(size), np.empty(size)
        where = np.empty(size, np.int64)
        place = 0
        for k in range(present.shape[1]):
            for a in range(3):
                if present[b, k]:
                    own[place] = targets[b, k, a]
                    mean[place] = prior[b, k, a]
                    known[place] = precision[b, k, a]
                    where[place] = 3 * k + a
                    place += 1
        for a in range(2):
            own[place + a] = shared[b, a]
            mean[place + a] = shared_prior[a]
            known[place + a] = shared_precision[a]
            where[place + a] = 3 * present.shape[1] + a
        log_likelihood[b], converged[b], chi2[b], matrix = _fit_one(
            counts[b], level[b], usable[b], own, mean, known, wall, sensor, iterations
        )
        for p in range(size):
            for q in range(p + 1):
                normal[b, where[p], where[q]] = normal[b, where[q], where[p]] = matrix[p, q]
            if p < size - 2:
                targets[b, where[p] // 3, where[p] % 3] = own[p]
        for a in range(2):
            shared[b, a] = own[size - 2 + a]
