"""From expected counts to measured ones, and the likelihood of the way back."""

import math

from array_api_compat import array_namespace

from pipeline.physics import noise
from pipeline.physics.arrays import Array, Random, log_normal_cdf
from pipeline.physics.sensor import Sensor


def measure(mean: Array, sensor: Sensor, rng: Random) -> Array:
    """Draw measured counts z = clip(round(m + n), 0, full_scale) for expected counts `mean`.

    Same shape as `mean`, floating point holding whole numbers.
    """
    xp = array_namespace(mean)
    if not sensor.noiseless:
        deviation = xp.sqrt(noise.analogue_variance(mean, sensor))
        mean = mean + deviation * xp.astype(rng.normal(mean.shape), mean.dtype)
    return xp.clip(xp.round(mean), 0, sensor.full_scale)


def log_likelihood(counts: Array, mean: Array, sensor: Sensor) -> Array:
    """Censored log-likelihood per pixel, in nats; same shape as `counts`.

    A pixel below full scale is Gaussian about its mean with variance `noise.variance`; one at
    full scale is censored: log P(z ≥ full_scale), the threshold lying half a count below.
    """
    xp = array_namespace(counts, mean)
    var = noise.variance(mean, sensor)
    gaussian = -0.5 * ((counts - mean) ** 2 / var + xp.log(2.0 * math.pi * var))
    censored = log_normal_cdf((mean - (sensor.full_scale - 0.5)) / xp.sqrt(var))
    return xp.where(counts >= sensor.full_scale, censored, gaussian)


def score(counts: Array, mean: Array, sensor: Sensor) -> Array:
    """Derivative of `log_likelihood` by the mean, variance held fixed, 1/DN; shape of `counts`.

    (z − m)/v below full scale; φ(t)/(Φ(t) √v), t = (m − full_scale + ½)/√v, at full scale.
    """
    xp = array_namespace(counts, mean)
    deviation = xp.sqrt(noise.variance(mean, sensor))
    t = (mean - (sensor.full_scale - 0.5)) / deviation
    log_pdf = -0.5 * t**2 - 0.5 * math.log(2.0 * math.pi)
    censored = xp.exp(log_pdf - log_normal_cdf(t)) / deviation
    return xp.where(counts >= sensor.full_scale, censored, (counts - mean) / deviation**2)
