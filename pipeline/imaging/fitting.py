"""Between messages and the fit: what was measured in the patches, and what the fit made of it."""

from dataclasses import replace

import numpy as np

from pipeline.messages import Flag, Patches, Unmixed
from pipeline.physics.fit import Window
from pipeline.physics.refine import Refined

MAX_CHI2 = 3.0
"""Reduced, of a group that point sources explain: over noise it is 1 ± 0.14, over the benchmark's
rounding and saturation 99 % are below 5."""


def window_of(patches: Patches) -> Window:
    """The counts of the patches, in double precision."""
    return Window(
        patches.counts_BHW.astype(np.float64),
        patches.background_BHW.astype(np.float64),
        patches.usable_BHW,
    )


def with_refined(message: Unmixed, found: Refined, max_chi2: float = MAX_CHI2) -> Unmixed:
    """The message with the fitted targets, and MISFIT and UNCONVERGED groups flagged."""
    patches = message.patches
    flags = patches.flags.copy()
    flags[patches.group[found.reduced_chi2 > max_chi2]] |= np.uint16(Flag.MISFIT)
    flags[patches.group[~found.converged]] |= np.uint16(Flag.UNCONVERGED)
    patch = found.candidates.patch
    return replace(
        message,
        **found.candidates._asdict()
        | {
            "patches": replace(patches, flags=flags),
            "patch": patch.astype(np.int32),
            "xy_px": found.candidates.xy_px + patches.origin_px[patch],
            "joint_px2": found.joint_px2,
        },
    )
