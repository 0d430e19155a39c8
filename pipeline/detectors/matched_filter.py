"""The PSF-matched filter over a median background, with local noise: the default.

1. Background: a 5 × 5 median of cells of 2 × 2 px (more for a wide PSF). A group covers less than
   half of the cells, so it leaves no trace there, and an edge stays an edge.
2. Matched filter: the pixel-integrated PSF over what is left, the mean of which is zero; of unit
   norm, so that white noise keeps its deviation.
3. Noise: what 68 % of the values in a block of `block_px` stay below, which targets hardly move,
   and never less than the sensor's own noise on such a background.

The statistic is that of Gaussian noise by construction, nothing is calibrated.
"""

from typing import Any

from numpy.typing import NDArray
from pydantic import Field

from pipeline.component import Settings
from pipeline.detector import Detector, Signal
from pipeline.imaging.noise_blocks import BLOCK_SAMPLES
from pipeline.imaging.point_filter import PointFilter
from pipeline.imaging.sampling import Integers
from pipeline.physics.sensor import Sensor


class MatchedFilter(Detector):
    """Likelihood-ratio test for one point source in white noise of locally estimated level."""

    class Config(Settings):
        """block_px: side of the blocks whose noise is estimated."""

        block_px: int = Field(32, ge=BLOCK_SAMPLES, le=1024)

    def __init__(self, config: Config, sensor: Sensor) -> None:
        super().__init__(config, sensor)
        self._filter = PointFilter(sensor)

    def signal(self, clean_HW: NDArray[Any]) -> Signal:
        """SNR of the matched filter."""
        background = self._filter.background(clean_HW)
        residual_HW, snr_HW = self._filter.over(background, clean_HW)
        sigma_HW = self._filter.in_sigmas(snr_HW, background, self._config.block_px)
        return Signal(residual_HW, snr_HW, sigma_HW)

    def mended(self, signal: Signal, clean_HW: NDArray[Any], xy: Integers) -> Signal:  # noqa: ARG002
        """The same arrays, changed round the mended pixels only."""
        self._filter.replaced(*signal, xy)
        return signal
