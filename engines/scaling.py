"""Network units: what a network sees instead of counts, and the way back.

`full_scale`: one unit is the sensor's full scale; absolute brightness is kept. `peak`: one unit
is the patch's brightest pixel above background; any sensor and any brightness looks alike.
"""

from typing import Any, Literal

from array_api_compat import array_namespace

Scaling = Literal["full_scale", "peak"]


def network_unit(signal_BHW: Any, scaling: Scaling, full_scale: int) -> Any:
    """Counts in one network unit for each patch (B,), always positive.

    signal_BHW: counts above background. Divide patches by it, multiply maps by it.
    """
    xp = array_namespace(signal_BHW)
    peak = xp.max(xp.max(signal_BHW, axis=-1), axis=-1)
    if scaling == "full_scale":
        return xp.full_like(peak, float(full_scale))
    return xp.clip(peak, 1.0, None)
