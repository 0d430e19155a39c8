# mypy: allow-untyped-defs, allow-untyped-calls
# ruff: noqa: ANN001, ANN202
"""What a network is given of patches, compiled: every frame's go through here."""

import math

import numpy as np
from numpy.typing import NDArray

from pipeline.physics.compiled import compiled, read_only
from pipeline.physics.noise import ROUNDING_VARIANCE
from pipeline.physics.sensor import Sensor

Image = NDArray[np.float32]
PLANES = ("signal", "noise", "sigma")


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
    camera = sensor.full_scale, sensor.read_noise**2 + ROUNDING_VARIANCE, 1.0 / sensor.gain
    rows = [planes.index(plane) if plane in planes else -1 for plane in PLANES]
    made, unit = _make(
        read_only(counts_BHW),
        read_only(background_BHW),
        read_only(usable_BHW),
        camera,
        sensor.sigma_px,
        scaling == "peak",
        len(planes),
        tuple(rows),
    )
    return (made[:, 0] if planes == ("signal",) else made), unit


def compile_input() -> None:
    """Have this compiled, or read from its cache, now instead of with the first frame."""
    nothing = np.zeros((0, 1, 1), np.float32)
    patch_input(nothing, nothing, nothing > 0.0, Sensor(), "peak", ("signal",))


@compiled
def _make(counts, background, usable, camera, sigma_px, by_peak, planes, rows):
    """What a network is given (B, planes, H, W), and its unit; rows: of PLANES, -1 if left out."""
    batch, height, width = counts.shape
    full_scale, variance, counts_per_electron = camera
    made = np.empty((batch, planes, height, width), np.float32)
    unit = np.empty(batch, np.float32)
    signal = np.empty((height, width), np.float32)
    for b in range(batch):
        unit[b] = 1.0 if by_peak else full_scale
        for i in range(height):
            for j in range(width):
                signal[i, j] = counts[b, i, j] - background[b, i, j] if usable[b, i, j] else 0.0
                if by_peak:
                    unit[b] = max(unit[b], signal[i, j])
        for i in range(height):
            for j in range(width):
                if rows[0] >= 0:
                    made[b, rows[0], i, j] = signal[i, j] / unit[b]
                if rows[1] >= 0:
                    noise = math.inf
                    if usable[b, i, j] and counts[b, i, j] < full_scale:
                        level = max(counts[b, i, j], np.float32(0.0))
                        noise = math.sqrt(variance + level * counts_per_electron)
                    made[b, rows[1], i, j] = min(noise / unit[b], 1.0)
                if rows[2] >= 0:
                    made[b, rows[2], i, j] = sigma_px
    return made, unit
