"""Noise of a measured count about its expectation."""

import math

from array_api_compat import array_namespace

from pipeline.physics.arrays import Array
from pipeline.physics.sensor import Sensor

ROUNDING_VARIANCE = 1.0 / 12.0
"""Variance of rounding to whole counts, DN²."""


def variance(mean: Array, sensor: Sensor) -> Array:
    """Variance in DN² of a pixel that expects `mean` DN: read² + max(m, 0)/gain + 1/12."""
    return analogue_variance(mean, sensor) + ROUNDING_VARIANCE


def analogue_variance(mean: Array, sensor: Sensor) -> Array:
    """`variance` before rounding: read² + max(m, 0)/gain, DN²."""
    xp = array_namespace(mean)
    return sensor.read_noise**2 + xp.clip(mean, 0.0, None) / sensor.gain


def pixel_noise(counts: Array, usable: Array, sensor: Sensor) -> Array:
    """Standard deviation of each measured count, DN; infinite where it says nothing of the light.

    That is where a pixel is not usable or stands at full scale.
    """
    xp = array_namespace(counts)
    known = usable & (counts < sensor.full_scale)
    return xp.where(known, xp.sqrt(variance(counts, sensor)), xp.full_like(counts, math.inf))
