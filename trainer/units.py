"""Counts to network units just as the pipeline does it, for numpy arrays and torch tensors."""

from typing import NamedTuple

from array_api_compat import array_namespace, device

from engines.scaling import Plane, Scaling, network_input, network_unit
from pipeline.physics.arrays import Array
from pipeline.physics.background import plane_background
from pipeline.physics.noise import pixel_noise
from pipeline.physics.sensor import Sensor


class NetworkInput(NamedTuple):
    """What a network is given of patches, and what leads back to counts."""

    patch: Array  # (B, n, n) or (B, planes, n, n), network units
    unit: Array  # (B,) counts in a unit
    background: Array  # (B, n, n) counts


def to_network_units(
    patch_BHW: Array,
    sensor: Sensor,
    scaling: Scaling,
    *,
    background: bool,
    planes: tuple[Plane, ...] = ("signal",),
    usable_BHW: Array | None = None,
) -> NetworkInput:
    """Patches of floating-point counts without their background, as a network sees them.

    background: estimate the local background from each patch and take it away; otherwise there is
    none. usable_BHW: False for pixels that say nothing; None = all say something.
    """
    xp = array_namespace(patch_BHW)
    usable = xp.ones_like(patch_BHW, dtype=xp.bool) if usable_BHW is None else usable_BHW
    level = 0.0 * patch_BHW
    if background:
        where = {"dtype": patch_BHW.dtype, "device": device(patch_BHW)}
        middle = xp.full((patch_BHW.shape[0], 2), (patch_BHW.shape[-1] - 1) / 2, **where)
        level = plane_background(patch_BHW, middle, usable)[0]
    signal = xp.where(usable, patch_BHW - level, 0.0 * level)
    unit = network_unit(signal, scaling, sensor.full_scale)
    noise = pixel_noise(patch_BHW, usable, sensor)
    return NetworkInput(network_input(signal, noise, sensor.sigma_px, unit, planes), unit, level)
