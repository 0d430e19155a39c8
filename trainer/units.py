"""Counts to network units just as the pipeline does it, for numpy arrays and torch tensors."""

from array_api_compat import array_namespace, device

from engines.scaling import Scaling, network_unit
from pipeline.physics.arrays import Array
from pipeline.physics.background import plane_background


def to_network_units(
    patch_BHW: Array, *, background: bool, scaling: Scaling, full_scale: int
) -> tuple[Array, Array]:
    """Patches without background in network units (B, n, n), and counts in a unit (B,).

    patch_BHW: floating-point counts. background: estimate the local background from each patch
    and take it away; otherwise there is none.
    """
    if background:
        xp = array_namespace(patch_BHW)
        where = {"dtype": patch_BHW.dtype, "device": device(patch_BHW)}
        middle = xp.full((patch_BHW.shape[0], 2), (patch_BHW.shape[-1] - 1) / 2, **where)
        usable = xp.ones_like(patch_BHW, dtype=xp.bool)
        patch_BHW = patch_BHW - plane_background(patch_BHW, middle, usable)[0]
    unit = network_unit(patch_BHW, scaling, full_scale)
    return patch_BHW / unit[:, None, None], unit
