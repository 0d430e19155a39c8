"""Off the grid: the targets of each patch fitted together on the censored likelihood."""

from dataclasses import replace

import numpy as np
from pydantic import Field

from pipeline.component import Settings, Stage
from pipeline.messages import Unmixed
from pipeline.physics.fit import Window
from pipeline.physics.select import ADDITIONS, PENALTY, Candidates, refine


class Refine(Stage[Unmixed, Unmixed]):
    """Takes the network's targets as candidates; keeps, moves, merges or adds by the likelihood.

    Where a group's fit does not converge, or leaves the window, the network's answer is kept.
    """

    class Config(Settings):
        """penalty: what a target must add to twice the log-likelihood, see `select`."""

        penalty: float = Field(PENALTY, ge=0.0)
        additions: int = Field(ADDITIONS, ge=0, le=8)

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
        )
        settings = self._config
        found = refine(window, candidates, self._sensor, settings.penalty, settings.additions)
        # What the network said holds for the groups that were given back as they were.
        given_back = ~np.isin(message.patch, found.patch[found.refined])
        p_exist = np.full(len(found.patch), np.nan)
        variance_px2 = np.zeros(len(found.patch))
        p_exist[~found.refined] = message.p_exist[given_back]
        variance_px2[~found.refined] = message.variance_px2[given_back]
        return replace(
            message,
            p_exist=p_exist,
            variance_px2=variance_px2,
            patch=found.patch.astype(np.int32),
            xy_px=found.xy_px + patches.origin_px[found.patch],
            intensity=found.intensity,
            refined=found.refined,
        )
