"""Frame → frame: raw counts made uniform, before anything looks at them."""

from typing import Any, Literal, Self

import numpy as np
from msgspec.structs import replace
from numpy.typing import NDArray

from pipeline.component import Context, Settings, Stage
from pipeline.errors import PipelineError
from pipeline.formats.calibration import Calibration
from pipeline.imaging.correction import (
    Image,
    to_counts,
    two_point,
    without_columns,
    without_rows,
)
from pipeline.messages import Frame
from pipeline.physics.sensor import Sensor


class Calibrate(Stage[Frame, Frame]):
    """Applies `sensor.calibration`; removes column and row patterns frame by frame if asked to.

    Saturated pixels stay at full scale. Bad pixels of the calibration are left as they are: they
    go to detection as `sensor.bad_pixels` do, which replaces them, and to refinement, which leaves
    them out. Raises PipelineError on a frame that is not raw counts of the calibration's shape.
    """

    class Config(Settings):
        """remove: which patterns; it takes them from the frame itself."""

        remove: Literal["none", "columns", "rows", "both"] = "none"

    def __init__(self, config: Config, sensor: Sensor, calibration: Calibration | None) -> None:
        if calibration is None and config.remove == "none":
            raise PipelineError(
                "calibrate: nothing to do; give sensor.calibration, or set calibrate.remove"
            )
        super().__init__(config, sensor)
        self._calibration = calibration

    @classmethod
    def build(cls, config: Config, context: Context) -> Self:
        """Needs the sensor and its calibration, if there is one."""
        return cls(config, context.sensor, context.calibration)

    def process(self, message: Frame) -> Frame:
        """The frame in uniform counts, of the same dtype."""
        raw_HW, full_scale = message.pixels_HW, self._sensor.full_scale
        if raw_HW.dtype not in (np.uint8, np.uint16):
            raise PipelineError(f"calibrate: frames must be uint8 or uint16, got {raw_HW.dtype}")
        image_HW = self._two_point(raw_HW)
        if self._config.remove in ("columns", "both"):
            image_HW = without_columns(image_HW)
        if self._config.remove in ("rows", "both"):
            image_HW = without_rows(image_HW)
        counts_HW = to_counts(image_HW, full_scale, raw_HW.dtype)
        counts_HW[raw_HW >= full_scale] = full_scale
        return replace(message, pixels_HW=counts_HW)

    def _two_point(self, raw_HW: NDArray[Any]) -> Image:
        if self._calibration is None:
            return raw_HW.astype(np.float32)
        (height, width), (rows, columns) = raw_HW.shape, self._calibration.gain_HW.shape
        if (height, width) != (rows, columns):
            raise PipelineError(
                f"calibrate: the frame is {width}×{height}, the calibration {columns}×{rows}; "
                "calibrate this sensor"
            )
        return two_point(raw_HW, self._calibration)
