"""Patches → targets: counts to network units, the engine, and what its maps say."""

from dataclasses import replace
from typing import Self

import numpy as np
from pydantic import Field

from engines.base import Engine, Maps, Options
from engines.loader import load
from engines.scaling import network_input, network_unit
from pipeline.component import Context, Settings, Stage
from pipeline.messages import Flag, Patches, Unmixed
from pipeline.physics.cell_targets import read_cell_targets
from pipeline.physics.grid import Peaks, local_maxima
from pipeline.physics.noise import pixel_noise
from pipeline.physics.sensor import Sensor

MAX_PEAKS = 16
"""Peaks kept of a patch: over three times what a group is trained to hold, and no more, since
what follows takes time that grows with the cube of their number."""


class Unmix(Stage[Patches, Unmixed]):
    """Runs all patches of a frame through the engine as one batch."""

    class Config(Settings):
        """threshold (network units), separate: see `local_maxima`; None = the engine's own.

        They are for engines that answer on the grid.

        threads: of one process, None = all cores; with several replicas, share the cores out.
        """

        threshold: float | None = Field(None, gt=0.0)
        separate: float | None = Field(None, ge=0.0, le=1.0)
        threads: int | None = Field(None, ge=1, le=256)

    def __init__(self, config: Config, sensor: Sensor, engine: Engine) -> None:
        self._sensor, self._engine = sensor, engine
        manifest = engine.manifest
        self._threshold = config.threshold or manifest.detection_threshold
        self._separate = manifest.separate if config.separate is None else config.separate

    @classmethod
    def build(cls, config: Config, context: Context) -> Self:
        """Load the engine the context names; raises EngineError if it does not fit the sensor."""
        options = Options(threads=config.threads)
        return cls(config, context.sensor, load(context.engine, context.sensor, options=options))

    def process(self, message: Patches) -> Unmixed:
        """Positions in frame coordinates, in the order of the patches; bad pixels are filled.

        Of a patch with more than MAX_PEAKS peaks the strongest are kept and its group is CROWDED.
        """
        manifest = self._engine.manifest
        signal = np.where(message.usable_BHW, message.counts_BHW - message.background_BHW, 0.0)
        signal = signal.astype(np.float32)
        noise = pixel_noise(message.counts_BHW.astype(np.float32), message.usable_BHW, self._sensor)
        unit = network_unit(signal, manifest.scaling, self._sensor.full_scale)
        patch = network_input(signal, noise, self._sensor.sigma_px, unit, manifest.planes)
        maps = self._engine.infer(patch)
        peaks = self._read(maps)
        number = np.bincount(peaks.image, minlength=len(maps))
        if (number > MAX_PEAKS).any():
            peaks = strongest(peaks, MAX_PEAKS)
            flags = message.flags.copy()
            flags[message.group[number > MAX_PEAKS]] |= np.uint16(Flag.CROWDED)
            message = replace(message, flags=flags)
        return Unmixed(
            patches=message,
            patch=peaks.image.astype(np.int32),
            xy_px=peaks.xy_px + message.origin_px[peaks.image],
            intensity=peaks.intensity * unit[peaks.image],
            refined=np.zeros(len(peaks.image), dtype=np.bool_),
            p_exist=peaks.p_exist,
            cov_px2=peaks.cov_px2,
            intensity_sigma=peaks.intensity_sigma * unit[peaks.image],
            joint_px2=np.full((len(maps), 0, 0), np.nan),
            cell_px=1.0 / manifest.c,
            engine=manifest.onnx_sha256[:12],
            source=manifest.name,
        )

    def _read(self, maps: Maps) -> Peaks:
        manifest = self._engine.manifest
        if manifest.output == "cell-targets":
            return read_cell_targets(maps, self._sensor.sigma_px, manifest.count_spread)
        return local_maxima(maps, manifest.c, self._threshold, separate=self._separate)

    def close(self) -> None:
        """Release the engine."""
        self._engine.close()


def strongest(peaks: Peaks, number: int) -> Peaks:
    """At most `number` peaks of each image, those of the largest value, in the order they had."""
    order = np.lexsort((-peaks.value, peaks.image))
    rank = np.arange(len(order)) - np.searchsorted(peaks.image, peaks.image)
    return peaks.take(np.sort(order[rank < number]))
