# mypy: allow-untyped-defs, allow-untyped-calls
# ruff: noqa: ANN001, ANN201
"""The imaging model of one patch, compiled: what the fit's inner loop evaluates.

What `psf.render`, `bounds.jacobian`, `measurement` and `noise` compute (tests hold it to them), for
one patch, without a temporary array a term. Parameters of a patch: x, y, intensity of each of its K
targets, then the constant on top of the local background, then σ: P = 3K + 2. Priors are Gaussian;
infinite precision means known exactly. sensor: full scale, read variance, one over the gain.
"""

import math

from pipeline.physics.compiled import compiled_with
from pipeline.physics.noise import ROUNDING_VARIANCE

ROUNDED_AWAY = 0.3
"""Counts; a pixel that expects no more, and has no noise, is 0 whatever it expects exactly."""

OBSERVED, EXPECTED = True, False

_ROOT2 = math.sqrt(2.0)
_LOG_2PI = math.log(2.0 * math.pi)
_FAR = -30.0
compiled = compiled_with(fastmath={"reassoc", "contract", "nsz"})


@compiled
def log_cdf(t):
    """Logarithm of Φ(t)."""
    if t < _FAR:
        return -0.5 * t * t - 0.5 * _LOG_2PI - math.log(-t) - 1.0 / (t * t)
    return math.log(0.5 * math.erfc(-t / _ROOT2))


@compiled
def hazard(t):
    """φ(t)/Φ(t)."""
    if t < _FAR:
        return -t - 1.0 / t
    return math.exp(-0.5 * (t * t + _LOG_2PI)) / (0.5 * math.erfc(-t / _ROOT2))


@compiled
def respond(position, sigma, value, slope, curve, by_sigma):
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


@compiled
def respond_all(parameters, axes):
    """Fill axes (2, K, 4, n): along x and y of each target; see `respond`."""
    sigma = parameters[-1]
    for k in range(axes.shape[1]):
        for axis in range(2):
            out = axes[axis, k]
            respond(parameters[3 * k + axis], sigma, out[0], out[1], out[2], out[3])


@compiled
def expect(parameters, level, axes, mean):
    """Expected counts (H, W) into mean."""
    height, width = mean.shape
    for i in range(height):
        for j in range(width):
            mean[i, j] = level[i, j] + parameters[-2]
        for k in range(axes.shape[1]):
            weight = parameters[3 * k + 2] * axes[1, k, 0, i]
            for j in range(width):
                mean[i, j] += weight * axes[0, k, 0, j]


@compiled
def log_prior(parameters, prior, precision, separation, stiffness):
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


@compiled
def log_likelihood(counts, usable, mean, sensor):
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
                total += log_cdf((m - full_scale + 0.5) / math.sqrt(variance))
            else:
                square = (counts[i, j] - m) ** 2 / variance
                total -= 0.5 * (square + math.log(variance) + _LOG_2PI)
    return total


@compiled
def weigh(counts, usable, mean, sensor, score, weight, observed):
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
                score[i, j] = hazard(t) / math.sqrt(variance)
            else:
                score[i, j] = (counts[i, j] - m) / variance
            if t < -8.0 and not saturated:
                share = 1.0
            elif observed:
                share = hazard(t) * (hazard(t) + t) if saturated else 1.0
            else:
                density = math.exp(-0.5 * (t * t + _LOG_2PI))
                share = 0.5 * math.erfc(t / _ROOT2) + t * density + density * hazard(t)
            weight[i, j] = min(max(share, 0.0), 1.0) / variance


@compiled
def normal_equations(
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


@compiled
def bend(parameters, axes, score, normal):
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


@compiled
def reduced_chi2(counts, usable, mean, sensor, precision):
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
