"""Between messages and the fit: what was measured in the patches, and what the fit made of it."""

from typing import Any

import numpy as np
from msgspec.structs import replace

from pipeline.messages import Flag, Patches, Unmixed
from pipeline.physics.candidates import Candidates
from pipeline.physics.fit import Window
from pipeline.physics.refine import MAX_CHI2, Refined


def window_of(patches: Patches) -> Window:
    """The counts of the patches, in double precision."""
    return Window(
        patches.counts_BHW.astype(np.float64),
        patches.background_BHW.astype(np.float64),
        patches.usable_BHW,
    )


def candidates_of(message: Unmixed) -> Candidates:
    """The message's targets, in patch coordinates."""
    values = {name: getattr(message, name) for name in Candidates._fields}
    origin_px = message.patches.origin_px[message.patch]
    return Candidates(**values | {"xy_px": message.xy_px - origin_px})


def in_frame(candidates: Candidates, patches: Patches) -> dict[str, Any]:
    """Candidates as the fields of `Unmixed`, in frame coordinates."""
    patch = candidates.patch
    return candidates._asdict() | {
        "patch": patch.astype(np.int32),
        "xy_px": candidates.xy_px + patches.origin_px[patch],
    }


def fitted(patches: Patches, found: Refined, max_chi2: float = MAX_CHI2) -> dict[str, Any]:
    """What a fit says, as fields of `Unmixed`; MISFIT and UNCONVERGED groups are flagged."""
    flags = patches.flags.copy()
    flags[patches.group[found.reduced_chi2 > max_chi2]] |= np.uint16(Flag.MISFIT)
    flags[patches.group[~found.converged]] |= np.uint16(Flag.UNCONVERGED)
    return in_frame(found.candidates, patches) | {
        "patches": replace(patches, flags=flags),
        "joint_px2": found.joint_px2,
    }
