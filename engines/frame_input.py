"""What a detector of whole frames is given: counts of any depth, stretched and placed.

`noise`: asinh((counts − median)/σ), σ being the noise of the frame as the differences of neighbours
show it: a point source has the same value in any sensor, and what is bright stays finite.
`percentile`: the 1st percentile is 0, the 99.9th 1: as a picture of the frame would be.
`full_scale`: counts/full scale.
"""

import math
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Stretch = Literal["noise", "percentile", "full_scale"]
Image = NDArray[np.float32]

SAMPLES = 20_000
"""About so many pixels, on a grid, stand for the frame; medians of all of them would take ms."""
ROUNDING = 1.0 / math.sqrt(12.0)


def stretched(frame_HW: NDArray[Any], stretch: Stretch, full_scale: int) -> Image:
    """Counts (H, W) as the network is used to them, float32; what is not finite is the median."""
    image_HW = frame_HW.astype(np.float32)
    if not np.issubdtype(frame_HW.dtype, np.integer):
        finite = np.isfinite(image_HW)
        if not finite.all():
            middle = np.median(image_HW[finite]) if finite.any() else 0.0
            image_HW = np.where(finite, image_HW, np.float32(middle))
    if stretch == "full_scale":
        return np.asarray(image_HW / np.float32(full_scale), np.float32)
    step = max(1, math.isqrt(image_HW.size // SAMPLES))
    sample = image_HW[::step, ::step]
    if stretch == "percentile":
        low, high = np.percentile(sample, [1.0, 99.9])
        return np.asarray(np.clip((image_HW - low) / max(high - low, 1.0), 0.0, 1.0), np.float32)
    difference = np.abs(image_HW[::step, 1::step] - image_HW[::step, :-1:step])
    sigma = max(1.4826 / math.sqrt(2.0) * float(np.median(difference)), ROUNDING)
    result: Image = np.arcsinh((image_HW - np.median(sample)) / np.float32(sigma))
    return result
