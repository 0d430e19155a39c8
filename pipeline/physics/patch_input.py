# mypy: allow-untyped-defs, allow-untyped-calls
# ruff: noqa: ANN001, ANN202
"""What a network is given of patches, compiled: every frame's go through here."""

import math

import numpy as np
from numpy.typing import NDArray

from pipeline.physics.compiled import compiled
from pipeline.physics.noise import ROUNDING_VARIANCE
from pipeline.physics.sensor import Sensor

Image = NDArray[np.float32]


def patch_input(
    counts_BHW: Image,
    background_BHW: Image,
    usable_BHW: NDArray[np.bool_],
    sensor: Sensor,
    scaling: str,
    planes: tuple[str, ...],
) -> tuple[Image, Image]:
    """What a network is given, (B, H, W) or (B, planes, H, W), and its unit (B,) in counts.

    Counts and their local background. scaling, planes: as an engine's manifest has them; defined by
    `engines.scaling` and `noise.pixel_noise`, and tests hold this to them.
    """
    batch, height, width = counts_BHW.shape
    made = np.empty((batch, len(planes), height, width), np.float32)
    unit = np.full(batch, sensor.full_scale, np.float32)
    # Copies: for arrays that are read-only, as those that were received, it would compile anew.
    measured = [np.array(a, order="C") for a in (counts_BHW, background_BHW, usable_BHW)]
    signal = np.empty((height, width), np.float32)
    camera = sensor.full_scale, sensor.read_noise**2 + ROUNDING_VARIANCE, 1.0 / sensor.gain
    order = np.array([("signal", "noise", "sigma").index(plane) for plane in planes])
    _fill(*measured, camera, sensor.sigma_px, scaling == "peak", order, signal, unit, made)
    return (made[:, 0] if planes == ("signal",) else made), unit


def compile_input() -> None:
    """Have this compiled, or read from its cache, now instead of with the first frame."""
    nothing = np.zeros((0, 1, 1), np.float32)
    patch_input(nothing, nothing, nothing > 0.0, Sensor(), "peak", ("signal",))


@compiled
def _fill(counts, background, usable, sensor, sigma_px, by_peak, order, signal, unit, made):
    """Fill made (B, planes, H, W), and unit (B,) where it is the brightest pixel."""
    batch, height, width = counts.shape
    full_scale, variance, counts_per_electron = sensor
    for b in range(batch):
        for i in range(height):
            for j in range(width):
                signal[i, j] = counts[b, i, j] - background[b, i, j] if usable[b, i, j] else 0.0
        if by_peak:
            unit[b] = max(signal.max(), np.float32(1.0))
        for k in range(len(order)):
            for i in range(height):
                for j in range(width):
                    if order[k] == 0:
                        made[b, k, i, j] = signal[i, j] / unit[b]
                    elif order[k] == 2:
                        made[b, k, i, j] = sigma_px
                    elif usable[b, i, j] and counts[b, i, j] < full_scale:
                        level = max(counts[b, i, j], np.float32(0.0))
                        noise = math.sqrt(variance + level * counts_per_electron)
                        made[b, k, i, j] = min(noise / unit[b], 1.0)
                    else:
                        made[b, k, i, j] = 1.0
