"""Frame → objects: what a detector in the layout of YOLO sees, beside the flow; for `fuse`."""

import math
from typing import Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from engines.base import Options
from engines.detectors import load_detector
from engines.frame_detector import FrameDetector
from pipeline.component import Context, Settings, Stage
from pipeline.imaging.bad_pixels import Repair, compile_repair
from pipeline.messages import Frame, Objects
from pipeline.physics.sensor import Sensor


class Recognise(Stage[Frame, Objects]):
    """Runs the detector over whole frames; bad pixels are mended first."""

    class Config(Settings):
        """engine: a shipped detector, or the path of a manifest, NAME.json, or of its model.

        threads: of this process, None = all cores.
        """

        engine: str = "yolo"
        threads: int | None = Field(1, ge=1, le=256)

    def __init__(
        self,
        config: Config,
        sensor: Sensor,
        detector: FrameDetector,
        bad_pixels_HW: NDArray[np.bool_] | None = None,
    ) -> None:
        super().__init__(config, sensor)
        self._detector = detector
        self._repair = None if bad_pixels_HW is None else Repair(bad_pixels_HW)
        compile_repair()

    @classmethod
    def build(cls, config: Config, context: Context) -> Self:
        """Load the detector; raises EngineError if it cannot be used."""
        engine = load_detector(config.engine, options=Options(threads=config.threads))
        detector = FrameDetector(engine, context.sensor.full_scale)
        return cls(config, context.sensor, detector, context.bad_pixels_HW)

    def process(self, message: Frame) -> Objects:
        """The objects of the frame, the best score first; none is a valid answer."""
        pixels_HW = message.pixels_HW
        found = self._detector.detect(
            pixels_HW if self._repair is None else self._repair(pixels_HW)
        )
        manifest = self._detector.manifest
        return Objects(
            info=message.info,
            box_px=found.box_px,
            label=found.label,
            score=found.score,
            point_source=manifest.is_point_source(found.label),
            odds=manifest.target_odds(found.label, found.score),
            labels=manifest.classes,
            prior_odds=manifest.prior_odds,
            missed_odds=math.log(manifest.missed),
            margin_px=manifest.margin_px,
            centre_sigma_px=manifest.centre_sigma_px,
            engine=manifest.engine_id,
        )

    def close(self) -> None:
        """Release the engine."""
        self._detector.close()
