"""What a detector is: a frame → a statistic that stands out where point sources are.

Detectors are plug-ins, one file each in `pipeline/detectors`; the stage `detect` holds the one its
configuration names and does what is common to all: thresholds, regions, shape tests, flags.
"""

from abc import ABC, abstractmethod
from typing import Any, ClassVar, NamedTuple, Self

from numpy.typing import NDArray

from pipeline.component import Settings
from pipeline.imaging.regions import Image
from pipeline.imaging.sampling import Integers
from pipeline.physics.sensor import Sensor


class Signal(NamedTuple):
    """What a detector makes of a frame, (H, W) each."""

    residual_HW: Image  # counts without background
    snr_HW: Image  # the statistic, in sigmas
    sigma_HW: Image  # noise of the residual, counts


class Detector(ABC):
    """Turns frames into statistics of which one threshold has the same meaning for all.

    `snr_HW` is given in *equivalent sigmas*: a value k is exceeded, where there is no target, as
    often as Gaussian noise exceeds k sigma. So a false-alarm rate becomes a threshold by the
    normal distribution, whatever the detector. Each says on what it was calibrated: noise, or
    clutter.

    judges_shape: the detector itself tells extended clutter from targets, of whatever size; the
    stage then does not compare regions with the sensor's PSF.
    """

    Config: ClassVar[type[Settings]]
    judges_shape: ClassVar[bool] = False

    def __init__(self, config: Any, sensor: Sensor) -> None:
        self._config, self._sensor = config, sensor

    @classmethod
    def build(cls, config: Any, sensor: Sensor) -> Self:
        """Make the detector from its settings and the sensor's imaging model."""
        return cls(config, sensor)

    @abstractmethod
    def signal(self, clean_HW: NDArray[Any]) -> Signal:
        """The statistic of the next frame: uint8, uint16 or float32 counts without bad pixels.

        All zero where the frame says nothing, so for a constant frame everywhere.
        """

    def mended(self, signal: Signal, clean_HW: NDArray[Any], xy: Integers) -> Signal:
        """The statistic of the same frame, given again with hot pixels at `xy` (N, 2) replaced.

        A detector that remembers frames has to make its own of this, and learn the frame once.
        """
        del signal, xy
        return self.signal(clean_HW)
