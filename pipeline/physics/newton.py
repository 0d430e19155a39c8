# mypy: allow-untyped-defs, allow-untyped-calls
# ruff: noqa: ANN001, ANN201, ANN202
"""The inner loop of the fit: Levenberg-Marquardt with Fisher scoring, one patch after another.

Compiled by Numba, a patch at a time on any core, so that a patch's answer does not depend on its
batch mates. It computes what `psf.render`, `bounds.jacobian`, `measurement` and `noise` do (tests
hold it to them), for one patch, without a temporary array a term.

Parameters of a patch: x, y, intensity of each of its K targets, then the constant on top of the
local background, then σ: P = 3K + 2. Priors are Gaussian; infinite precision means known exactly.
"""

import math

import numpy as np
from numba import njit, prange

from pipeline.physics.noise import ROUNDING_VARIANCE

MAX_STEP_PX = 0.4
CONVERGED_GAIN = 1e-2  # nats: a hundredth of what one standard deviation is worth, and less
STIFFEST = 1e8
ROUNDED_AWAY = 0.3
"""Counts; a pixel that expects no more, and has no noise, is 0 whatever it expects exactly."""

_ROOT2 = math.sqrt(2.0)
_LOG_2PI = math.log(2.0 * math.pi)
_FAR = -30.0
OBSERVED, EXPECTED = True, False
_compiled = njit(cache=True, fastmath={"reassoc", "contract", "nsz"}, error_model="numpy")


@_compiled
def _log_cdf(t):
    """Logarithm of Φ(t)."""
    if t < _FAR:
        return -0.5 * t * t - 0.5 * _LOG_2PI - math.log(-t) - 1.0 / (t * t)
    return math.log(0.5 * math.erfc(-t / _ROOT2))


@_compiled
def _hazard(t):
    """φ(t)/Φ(t)."""
    if t < _FAR:
        return -t - 1.0 / t
    return math.exp(-0.5 * (t * t + _LOG_2PI)) / (0.5 * math.erfc(-t / _ROOT2))


@_compiled
def _respond(position, sigma, value, slope, curve, by_sigma):
    """Share of a unit source in each pixel of an axis, its first two derivatives, and that by σ."""
    before = (-0.5 - position) / sigma
    cdf, pdf = 0.5 * math.erf(before / _ROOT2), math.exp(-0.5 * (before * before + _LOG_2PI))
    for i in range(len(value)):
        t = (i + 0.5 - position) / sigma
        next_cdf, next_pdf = 0.5 * math.erf(t / _ROOT2), math.exp(-0.5 * (t * t + _LOG_2PI))
        value[i] = next_cdf - cdf
        slope[i] = (pdf - next_pdf) / sigma
        curve[i] = (before * pdf - t * next_pdf) / sigma**2
        by_sigma[i] = (before * pdf - t * next_pdf) / sigma
        before, cdf, pdf = t, next_cdf, next_pdf


@_compiled
def _respond_all(parameters, axes):
    """Fill axes (2, K, 4, n): along x and y of each target; see `_respond`."""
    sigma = parameters[-1]
    for k in range(axes.shape[1]):
        for axis in range(2):
            out = axes[axis, k]
            _respond(parameters[3 * k + axis], sigma, out[0], out[1], out[2], out[3])


@_compiled
def _expect(parameters, level, axes, mean):
    """Expected counts (H, W) into mean."""
    height, width = mean.shape
    for i in range(height):
        for j in range(width):
            mean[i, j] = level[i, j] + parameters[-2]
        for k in range(axes.shape[1]):
            weight = parameters[3 * k + 2] * axes[1, k, 0, i]
            for j in range(width):
                mean[i, j] += weight * axes[0, k, 0, j]


@_compiled
def _log_prior(parameters, prior, precision, separation, stiffness):
    """Of the parameters: Gaussians, and a soft wall about targets nearer than `separation`."""
    total = 0.0
    for p in range(len(parameters)):
        if math.isfinite(precision[p]):
            total -= 0.5 * precision[p] * (parameters[p] - prior[p]) ** 2
    targets = (len(parameters) - 2) // 3
    for k in range(targets):
        for other in range(k):
            dx = parameters[3 * k] - parameters[3 * other]
            dy = parameters[3 * k + 1] - parameters[3 * other + 1]
            short = separation - math.sqrt(dx * dx + dy * dy)
            if short > 0.0:
                total -= 0.5 * stiffness * short * short
    return total


@_compiled
def _log_likelihood(counts, usable, mean, sensor):
    """Of the usable pixels, nats; sensor: full scale, read variance, one over the gain."""
    full_scale, read_variance, per_gain = sensor
    total = 0.0
    for i in range(counts.shape[0]):
        for j in range(counts.shape[1]):
            if not usable[i, j]:
                continue
            m = mean[i, j]
            variance = read_variance + max(m, 0.0) * per_gain + ROUNDING_VARIANCE
            if counts[i, j] >= full_scale:
                total += _log_cdf((m - full_scale + 0.5) / math.sqrt(variance))
            else:
                square = (counts[i, j] - m) ** 2 / variance
                total -= 0.5 * (square + math.log(variance) + _LOG_2PI)
    return total


@_compiled
def _weigh(counts, usable, mean, sensor, score, weight, observed):
    """Score and information of each pixel (H, W) about its mean; observed or expected."""
    full_scale, read_variance, per_gain = sensor
    for i in range(counts.shape[0]):
        for j in range(counts.shape[1]):
            score[i, j] = 0.0
            weight[i, j] = 0.0
            if not usable[i, j]:
                continue
            m = mean[i, j]
            variance = read_variance + max(m, 0.0) * per_gain + ROUNDING_VARIANCE
            t = (m - full_scale + 0.5) / math.sqrt(variance)
            saturated = counts[i, j] >= full_scale
            if saturated:
                score[i, j] = _hazard(t) / math.sqrt(variance)
            else:
                score[i, j] = (counts[i, j] - m) / variance
            if t < -8.0 and not saturated:
                share = 1.0
            elif observed:
                share = _hazard(t) * (_hazard(t) + t) if saturated else 1.0
            else:
                density = math.exp(-0.5 * (t * t + _LOG_2PI))
                share = 0.5 * math.erfc(t / _ROOT2) + t * density + density * _hazard(t)
            weight[i, j] = min(max(share, 0.0), 1.0) / variance


@_compiled
def _normal(
    parameters, prior, precision, separation, stiffness, axes, score, weight, rows, normal, slope
):
    """Normal matrix (P, P) and gradient (P,) of log-likelihood and prior; rows (P, H·W) is room."""
    targets = axes.shape[1]
    size = len(parameters)
    height, width = score.shape
    rows[size - 1, :] = 0.0
    for i in range(height):
        for j in range(width):
            n = i * width + j
            for k in range(targets):
                g = parameters[3 * k + 2]
                x, y = axes[0, k], axes[1, k]
                rows[3 * k, n] = g * x[1, j] * y[0, i]
                rows[3 * k + 1, n] = g * x[0, j] * y[1, i]
                rows[3 * k + 2, n] = x[0, j] * y[0, i]
                rows[size - 1, n] += g * (x[3, j] * y[0, i] + x[0, j] * y[3, i])
            rows[size - 2, n] = 1.0
    flat_score, flat_weight = score.ravel(), weight.ravel()
    for p in range(size):
        total = 0.0
        for n in range(height * width):
            total += rows[p, n] * flat_score[n]
        slope[p] = total
        for q in range(p + 1):
            total = 0.0
            for n in range(height * width):
                total += rows[p, n] * flat_weight[n] * rows[q, n]
            normal[p, q] = total
    for k in range(targets):
        for other in range(k):
            dx = parameters[3 * k] - parameters[3 * other]
            dy = parameters[3 * k + 1] - parameters[3 * other + 1]
            apart = math.sqrt(dx * dx + dy * dy)
            short = separation - apart
            if short > 0.0 and apart > 0.0:
                push = (dx / apart, dy / apart)
                for a in range(2):
                    slope[3 * k + a] += stiffness * short * push[a]
                    slope[3 * other + a] -= stiffness * short * push[a]
                    for b in range(2):
                        pull = stiffness * push[a] * push[b]
                        if b <= a:
                            normal[3 * k + a, 3 * k + b] += pull
                            normal[3 * other + a, 3 * other + b] += pull
                        normal[3 * k + a, 3 * other + b] -= pull
    for p in range(size):
        if math.isfinite(precision[p]):
            normal[p, p] += precision[p]
            slope[p] += precision[p] * (prior[p] - parameters[p])
        else:  # known exactly: it neither moves nor tells of the others
            normal[p, :p] = 0.0
            normal[p:, p] = 0.0
            normal[p, p] = 1.0
            slope[p] = 0.0


@_compiled
def _bend(parameters, axes, score, normal):
    """Take from the normal matrix what the curvature of the model takes: Σ score · ∂²mean."""
    height, width = score.shape
    for k in range(axes.shape[1]):
        g = parameters[3 * k + 2]
        x, y = axes[0, k], axes[1, k]
        xx, xy, yy, xg, yg = 0.0, 0.0, 0.0, 0.0, 0.0
        for i in range(height):
            for j in range(width):
                s = score[i, j]
                xx += s * x[2, j] * y[0, i]
                xy += s * x[1, j] * y[1, i]
                yy += s * x[0, j] * y[2, i]
                xg += s * x[1, j] * y[0, i]
                yg += s * x[0, j] * y[1, i]
        normal[3 * k, 3 * k] -= g * xx
        normal[3 * k + 1, 3 * k] -= g * xy
        normal[3 * k + 1, 3 * k + 1] -= g * yy
        normal[3 * k + 2, 3 * k] -= xg
        normal[3 * k + 2, 3 * k + 1] -= yg


@_compiled
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


@_compiled
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


@_compiled
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


@_compiled
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
    _respond_all(parameters, axes)
    _expect(parameters, level, axes, mean)
    best = _log_likelihood(counts, usable, mean, sensor) + _log_prior(
        parameters, prior, precision, separation, stiffness
    )
    damping, converged, fresh = 1e-3, False, False
    for _ in range(iterations):
        if not fresh:
            _weigh(counts, usable, mean, sensor, score, weight, EXPECTED)
            _normal(
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
        _respond_all(tried, axes)
        _expect(tried, level, axes, mean)
        value = _log_likelihood(counts, usable, mean, sensor) + _log_prior(
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
    _respond_all(parameters, axes)
    _expect(parameters, level, axes, mean)
    _weigh(counts, usable, mean, sensor, score, weight, OBSERVED)
    _normal(
        parameters, prior, precision, separation, stiffness, axes, score, weight, rows, normal,
        slope,
    )  # fmt: skip
    _bend(parameters, axes, score, normal)
    if not _factor(normal, 0.0, factor):  # no maximum as yet: what it is expected to be
        _weigh(counts, usable, mean, sensor, score, weight, EXPECTED)
        _normal(
            parameters, prior, precision, separation, stiffness, axes, score, weight, rows,
            normal, slope,
        )  # fmt: skip
    return best, converged, _reduced_chi2(counts, usable, mean, sensor, precision), normal


@_compiled
def _reduced_chi2(counts, usable, mean, sensor, precision):
    """χ² over degrees of freedom, of usable pixels neither censored nor rounded away."""
    full_scale, read_variance, per_gain = sensor
    total, freedom = 0.0, 0
    for i in range(counts.shape[0]):
        for j in range(counts.shape[1]):
            m = mean[i, j]
            if usable[i, j] and counts[i, j] < full_scale and m > ROUNDED_AWAY:
                variance = read_variance + m * per_gain + ROUNDING_VARIANCE
                total += (counts[i, j] - m) ** 2 / variance
                freedom += 1
    for p in range(len(precision)):
        if math.isfinite(precision[p]):
            freedom -= 1
    return total / max(freedom, 1)


@njit(cache=True, parallel=True, error_model="numpy")
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
