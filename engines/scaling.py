"""Network units: what a network sees instead of counts, and the way back.

`full_scale`: one unit is the sensor's full scale; absolute brightness is kept. `peak`: one unit
is the patch's brightest pixel above background; any sensor and any brightness looks alike.

A network made for one sensor sees the signal alone; one made for many is also told, in planes of
their own, how well each pixel is known and how wide the sensor's PSF is.
"""

from typing import Any, Literal

from array_api_compat import array_namespace

Scaling = Literal["full_scale", "peak"]

Plane = Literal["signal", "noise", "sigma"]
"""Counts above background; their standard deviation, at most 1 and 1 where the counts do not say
how much arrived (bad or saturated pixels), both in network units; σ of the PSF, px."""


def network_unit(signal_BHW: Any, scaling: Scaling, full_scale: int) -> Any:
    """Counts in one network unit for each patch (B,), always positive.

    signal_BHW: counts above background. Divide patches by it, multiply maps by it.
    """
    xp = array_namespace(signal_BHW)
    peak = xp.max(xp.max(signal_BHW, axis=-1), axis=-1)
    if scaling == "full_scale":
        return xp.full_like(peak, float(full_scale))
    return xp.clip(peak, 1.0, None)


def network_input(
    signal_BHW: Any, noise_BHW: Any, sigma_px: float, unit_B: Any, planes: tuple[Plane, ...]
) -> Any:
    """What a network is given: (B, H, W) if that is the signal alone, else (B, planes, H, W).

    signal_BHW and noise_BHW in counts, noise infinite where a pixel says nothing; unit_B: see
    `network_unit`.
    """
    xp = array_namespace(signal_BHW)
    unit = unit_B[:, None, None]
    made = {
        "signal": lambda: signal_BHW / unit,
        "noise": lambda: xp.clip(noise_BHW / unit, 0.0, 1.0),
        "sigma": lambda: xp.full_like(signal_BHW, sigma_px),
    }
    parts = [made[plane]() for plane in planes]
    return parts[0] if planes == ("signal",) else xp.stack(parts, axis=1)
