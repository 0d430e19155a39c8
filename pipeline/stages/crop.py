"""Blobs → patches: a window round each group that can be unmixed, and its local background."""

from pydantic import Field

from pipeline.component import Settings, Stage
from pipeline.errors import PipelineError
from pipeline.imaging.windows import compile_windows, cut_windows
from pipeline.messages import Blobs, Patches
from pipeline.physics.groups import SIZE_PX
from pipeline.physics.sensor import Sensor


class Crop(Stage[Blobs, Patches]):
    """Windows of 11 × 11 px centred on the blobs' pixels, moved where frame or tile ends (EDGE).

    EXTENDED and OVERFLOW blobs stay as groups without a window, and so do those in CLUTTER: where
    what surrounds the blob deviates from a plane by far more than the sensor's noise, nothing
    could be told apart. Blobs of the same window become one group, MERGED. Where a pixel is not
    usable, `counts_BHW` holds the background.
    """

    class Config(Settings):
        """max_clutter: rms about the background plane over the sensor's noise, at most.

        Over clouds the scene's targets stay below 1.5; on a horizon it is 10 and more.
        """

        max_clutter: float = Field(5.0, gt=1.0)

    def __init__(self, config: Config, sensor: Sensor) -> None:
        super().__init__(config, sensor)
        compile_windows()

    def process(self, message: Blobs) -> Patches:
        """One patch for each group that has a window, groups in the order of the blobs.

        Raises PipelineError if not even one window fits into the frame or tile.
        """
        tiling = message.info.tiling
        height, width = message.pixels_HW.shape if tiling is None else [tiling.size_px] * 2
        if min(height, width) < SIZE_PX:
            raise PipelineError(
                f"crop: {width}×{height} px is smaller than the {SIZE_PX}×{SIZE_PX} window; "
                "use larger frames or tiles"
            )
        return cut_windows(message, self._sensor, self._config.max_clutter)
