"""Patches → targets: counts to network units, the engine, and what its maps say."""

import logging
from typing import Self

import numpy as np
from pydantic import Field

from engines.base import Engine, Maps, Options
from engines.errors import NoEngineFits
from engines.loader import load
from engines.manifest import Manifest
from engines.spread import spread_at
from pipeline.component import Context, Settings, Stage
from pipeline.errors import PipelineError
from pipeline.imaging.fitting import fitted, in_frame, window_of
from pipeline.messages import Patches, Unmixed
from pipeline.physics.candidates import Candidates
from pipeline.physics.cell_targets import compile_reading, read_cell_targets
from pipeline.physics.fit import compile_fit
from pipeline.physics.grid import Peaks, local_maxima
from pipeline.physics.lone import lone_targets, with_lone
from pipeline.physics.model_only import MODEL, unmix_by_model
from pipeline.physics.patch_input import compile_input, patch_input
from pipeline.physics.sensor import Sensor

log = logging.getLogger(__name__)

MAX_PEAKS = 16
"""Peaks kept of a patch: over three times what a group is trained to hold, and no more, since
what follows takes time that grows with the cube of their number."""


class Unmix(Stage[Patches, Unmixed]):
    """Runs all patches of a frame through the engine as one batch.

    Without an engine (`engine: model`, or none is shipped for the sensor) the imaging model alone
    unmixes them, which is slower and tells close targets apart less well.
    """

    class Config(Settings):
        """threshold (network units), separate: see `local_maxima`; None = the engine's own.

        They are for engines that answer on the grid.

        threads: of one process, None = all cores; with several replicas, share the cores out.
        """

        threshold: float | None = Field(None, gt=0.0)
        separate: float | None = Field(None, ge=0.0, le=1.0)
        threads: int | None = Field(None, ge=1, le=256)

    def __init__(self, config: Config, sensor: Sensor, engine: Engine | None) -> None:
        super().__init__(config, sensor)
        self._engine = engine
        measured = () if engine is None else engine.manifest.spreads
        self._spread = spread_at(measured, sensor.sigma_px)
        compile_input()
        compile_fit()
        compile_reading()

    @classmethod
    def build(cls, config: Config, context: Context) -> Self:
        """Load the engine the context names; raises EngineError if it does not fit the sensor."""
        if context.engine == MODEL:
            return cls(config, context.sensor, None)
        options = Options(threads=config.threads)
        try:
            engine = load(context.engine, context.sensor, options=options)
        except NoEngineFits as none:
            log.warning("%s. Going on with the imaging model alone, slower", none)
            engine = None
        return cls(config, context.sensor, engine)

    def process(self, message: Patches) -> Unmixed:
        """Positions in frame coordinates, in the order of the patches; bad pixels are filled.

        Of a patch with more than MAX_PEAKS peaks the strongest are kept.
        """
        if self._engine is None:
            return self._by_model(message)
        return self._by_network(message, self._engine)

    def _by_network(self, message: Patches, engine: Engine) -> Unmixed:
        manifest = engine.manifest
        patch, unit = patch_input(
            message.counts_BHW,
            message.background_BHW,
            message.usable_BHW,
            self._sensor,
            manifest.scaling,
            manifest.planes,
        )
        maps = engine.infer(patch)
        if not np.isfinite(maps).all():
            raise PipelineError(f"engine {manifest.name}: its maps are not finite")
        peaks = self._read(maps, manifest)
        if np.bincount(peaks.image, minlength=1).max() > MAX_PEAKS:
            peaks = strongest(peaks, MAX_PEAKS)
        found = Candidates.read(peaks, unit)
        if (message.counts_BHW >= self._sensor.full_scale).any():
            found = with_lone(found, lone_targets(window_of(message), self._sensor))
        return Unmixed(
            **in_frame(found, message),
            patches=message,
            joint_px2=np.full((len(maps), 0, 0), np.nan),
            cell_px=1.0 / manifest.c,
            engine=manifest.engine_id,
            source=manifest.name,
        )

    def _read(self, maps: Maps, manifest: Manifest) -> Peaks:
        if manifest.output == "cell-targets":
            spread = self._spread
            return read_cell_targets(
                maps,
                manifest.c,
                self._sensor.sigma_px,
                spread.count,
                spread.position,
                spread.intensity,
            )
        config = self._config
        threshold = config.threshold or manifest.detection_threshold
        separate = manifest.separate if config.separate is None else config.separate
        return local_maxima(maps, manifest.c, threshold, separate=separate)

    def _by_model(self, message: Patches) -> Unmixed:
        found = unmix_by_model(window_of(message), self._sensor)
        return Unmixed(**fitted(message, found), cell_px=0.0, engine="", source=MODEL)

    def close(self) -> None:
        """Release the engine."""
        if self._engine is not None:
            self._engine.close()


def strongest(peaks: Peaks, number: int) -> Peaks:
    """At most `number` peaks of each image, those of the largest value, in the order they had."""
    order = np.lexsort((-peaks.value, peaks.image))
    rank = np.arange(len(order)) - np.searchsorted(peaks.image, peaks.image)
    return peaks.take(np.sort(order[rank < number]))
