"""From a network's maps to candidates, and from these to the detections that are scored.

Detections of an image are (n, 7): x px, y px, score, covariance xx, xy, yy px² (NaN where nothing
is known of it), intensity counts; the best score is where the system is surest.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from engines.manifest import Manifest, Output
from engines.spread import Spread, spread_at
from pipeline.physics.candidates import Candidates
from pipeline.physics.cell_targets import read_cell_targets
from pipeline.physics.grid import grid_detections
from pipeline.physics.score import THRESHOLDS_PX, expected_hits
from pipeline.physics.sensor import Sensor
from trainer.fit_config import DETECTION_THRESHOLD

Detections = NDArray[np.float64]


class Reading(NamedTuple):
    """How maps are to be read: of what kind they are, and of which sensor's patches."""

    output: Output
    c: int
    sigma_px: float
    threshold: float = DETECTION_THRESHOLD  # network units, of maps of intensity
    spread: Spread | None = None  # None: not measured

    @classmethod
    def of(cls, manifest: Manifest, sensor: Sensor) -> "Reading":
        """As the engine's manifest says."""
        return cls(
            manifest.output,
            manifest.c,
            sensor.sigma_px,
            manifest.detection_threshold,
            spread_at(manifest.spreads, sensor.sigma_px),
        )


def read_maps(
    maps: NDArray[np.float32], unit_B: NDArray[np.floating], reading: Reading
) -> Candidates:
    """What the maps hold. On the grid every cell at the threshold is a target, as published.

    maps and threshold in network units of `unit_B` counts.
    """
    if reading.output == "intensity-map":
        peaks = grid_detections(maps, reading.c, reading.threshold)
    else:
        spread = reading.spread or Spread(sigma_px=reading.sigma_px)
        peaks = read_cell_targets(
            maps, reading.c, reading.sigma_px, spread.count, spread.position, spread.intensity
        )
    return Candidates.read(peaks, unit_B)


def detections(found: Candidates, images: int) -> list[Detections]:
    """One table for each image, of as many targets as are most probable.

    The score is the intensity if nothing else is known of any, as published for networks on the
    grid; otherwise existence times how many of the metric's thresholds the position is expected
    to meet, one without covariance being good for the widest alone.
    """
    found = found.likely
    variance = (found.cov_px2[:, 0] + found.cov_px2[:, 2]) / 2.0
    if np.isnan(variance).all():
        score = found.intensity
    else:
        hits = expected_hits(np.nan_to_num(variance, nan=max(THRESHOLDS_PX) ** 2))
        score = np.nan_to_num(found.p_exist, nan=1.0) * hits
    table = np.column_stack([found.xy_px, score, found.cov_px2, found.intensity])
    return np.split(table, np.searchsorted(found.patch, np.arange(1, images)))
