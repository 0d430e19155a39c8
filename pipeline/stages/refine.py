"""Off the grid: the targets of each patch fitted together on the censored likelihood."""

from dataclasses import replace

import numpy as np
from pydantic import Field

from pipeline.component import Settings, Stage
from pipeline.messages import Unmixed
from pipeline.physics.fit import Window
from pipeline.physics.refine import ADDITIONS, PENALTY, Candidates, refine


class Refine(Stage[Unmixed, Unmixed]):
    """Takes the network's targets as candidates; keeps, moves, merges or adds by the likelihood.

    Where a group's fit does not converge, or leaves the window, the network's answer is kept.
    """

    class Config(Settings):
        """penalty: what a target must add to twice the log-likelihood, see `select`.

        starts: how many times to fit what a network off the grid has found.
        """

        penalty: float = Field(PENALTY, ge=0.0)
        additions: int = Field(ADDITIONS, ge=0, le=8)
        starts: int = Field(1, ge=1, le=64)

    def process(self, message: Unmixed) -> Unmixed:
        """The same patches with targets off the grid."""
        patches = message.patches
        if len(message.patch) == 0:
            return message
        window = Window(
            patches.counts_BHW.astype(np.float64),
            patches.background_BHW.astype(np.float64),
            patches.usable_BHW,
        )
        candidates = Candidates(
            message.patch,
            message.xy_px - patches.origin_px[message.patch],
            message.intensity,
            message.refined,
            message.p_exist,
            message.cov_px2,
            message.intensity_sigma,
        )
        found = refine(window, candidates, self._sensor, **self._config.model_dump())
        return replace(
            message,
            **found._asdict()
            | {
                "patch": found.patch.astype(np.int32),
                "xy_px": found.xy_px + patches.origin_px[found.patch],
            },
        )
