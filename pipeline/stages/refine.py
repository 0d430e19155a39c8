"""Off the grid: the targets of each patch fitted together on the censored likelihood."""

from dataclasses import replace
from typing import Self

import numpy as np
from pydantic import Field

from pipeline.component import Context, Settings, Stage
from pipeline.messages import Unmixed
from pipeline.physics.fit import Groups, Window
from pipeline.physics.select import select
from pipeline.physics.sensor import Sensor


class Refine(Stage[Unmixed, Unmixed]):
    """Takes the network's targets as candidates; keeps, moves, merges or adds by the likelihood.

    Where a group's fit does not converge, or leaves the window, the network's answer is kept.
    """

    class Config(Settings):
        """penalty: what a target must add to twice the log-likelihood, see `select`."""

        penalty: float = Field(20.0, ge=0.0)
        additions: int = Field(2, ge=0, le=8)

    def __init__(self, config: Config, sensor: Sensor) -> None:
        self._config, self._sensor = config, sensor

    @classmethod
    def build(cls, config: Config, context: Context) -> Self:
        """Needs the sensor's imaging model only."""
        return cls(config, context.sensor)

    def process(self, message: Unmixed) -> Unmixed:
        """The same patches with targets off the grid."""
        patches = message.patches
        batch = len(patches.group)
        if len(message.patch) == 0:
            return message
        count = np.bincount(message.patch, minlength=batch)
        first = np.cumsum(count) - count
        column = np.arange(len(message.patch)) - first[message.patch]
        width = count.max() + self._config.additions
        xy_px, intensity = np.zeros((batch, width, 2)), np.zeros((batch, width))
        local = message.xy_px - patches.origin_px[message.patch]
        xy_px[message.patch, column] = local
        intensity[message.patch, column] = message.intensity
        window = Window(
            patches.counts_BHW.astype(np.float64),
            patches.background_BHW.astype(np.float64),
            patches.usable_BHW,
        )
        start = Groups.start(xy_px, intensity, np.arange(width) < count[:, None])
        found = select(window, start, self._sensor, self._config.penalty, self._config.additions)
        size = np.array(patches.counts_BHW.shape[:0:-1])
        inside = ((found.xy_px >= -0.5) & (found.xy_px <= size - 0.5)).all(axis=2)
        good = found.converged & (inside | ~found.present).all(axis=1)
        present = np.where(good[:, None], found.present, start.present)
        patch, column = np.nonzero(present)
        refined = good[patch]
        where = np.where(refined[:, None], found.xy_px[patch, column], xy_px[patch, column])
        return replace(
            message,
            patch=patch.astype(np.int32),
            xy_px=where + patches.origin_px[patch],
            intensity=np.where(refined, found.intensity[patch, column], intensity[patch, column]),
            refined=refined,
        )
