"""Patches → targets: counts to network units, the engine, and what its maps say."""

import logging
from collections.abc import Sequence
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
from pipeline.physics.finite import all_finite, compile_finite
from pipeline.physics.fit import compile_fit
from pipeline.physics.grid import Peaks, local_maxima
from pipeline.physics.lone import lone_targets, with_lone
from pipeline.physics.model_only import MODEL, unmix_by_model
from pipeline.physics.patch_input import Image, compile_input, patch_input
from pipeline.physics.sensor import Sensor

log = logging.getLogger(__name__)

MAX_PEAKS = 16
"""Peaks kept of a patch: over three times what a group is trained to hold, and no more, since
what follows takes time that grows with the cube of their number."""


class Unmix(Stage[Patches, Unmixed]):
    """Runs all patches of a frame, or of several frames, through the engine as one batch.

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
        self._engine_id = "" if engine is None else engine.manifest.engine_id
        measured = () if engine is None else engine.manifest.spreads
        self._spread = spread_at(measured, sensor.sigma_px)
        compile_input()
        compile_fit()
        compile_finite()
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
        patch, unit = self._input(message, self._engine.manifest)
        return self._unmixed(message, unit, self._engine.infer(patch), self._engine.manifest)

    def process_all(self, messages: Sequence[Patches]) -> list[Unmixed]:
        """The patches of all frames go through the engine together."""
        if self._engine is None:
            return super().process_all(messages)
        manifest = self._engine.manifest
        inputs = [self._input(message, manifest) for message in messages]
        maps = self._engine.infer(np.concatenate([patch for patch, _ in inputs]))
        ends = np.cumsum([len(unit) for _, unit in inputs])
        return [
            self._unmixed(message, unit, part, manifest)
            for message, (_, unit), part in zip(
                messages, inputs, np.split(maps, ends[:-1]), strict=True
            )
        ]

    def _input(self, message: Patches, manifest: Manifest) -> tuple[Image, Image]:
        """What the network is given, and its unit (B,) in counts."""
        return patch_input(
            message.counts_BHW,
            message.background_BHW,
            message.usable_BHW,
            self._sensor,
            manifest.scaling,
            manifest.planes,
        )

    def _unmixed(self, message: Patches, unit: Image, maps: Maps, manifest: Manifest) -> Unmixed:
        """What the maps of a frame's patches say."""
        if not all_finite(maps):
            raise PipelineError(f"engine {manifest.name}: its maps are not finite")
        found = Candidates.read(self._read(maps, manifest), unit)
        if message.counts_BHW.max(initial=0.0) >= self._sensor.full_scale:
            found = with_lone(found, lone_targets(window_of(message), self._sensor))
        return Unmixed(
            **in_frame(found, message),
            patches=message,
            joint_px2=np.empty((len(maps), 0, 0)),
            cell_px=1.0 / manifest.c,
            engine=self._engine_id,
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
                MAX_PEAKS,
            )
        config = self._config
        threshold = config.threshold or manifest.detection_threshold
        separate = manifest.separate if config.separate is None else config.separate
        peaks = local_maxima(maps, manifest.c, threshold, separate=separate)
        return strongest(peaks, MAX_PEAKS)

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
