"""From a network's maps to candidates, and from these to the detections that are scored.

Detections of an image are (n, 7): x px, y px, score, covariance xx, xy, yy px² (NaN where nothing
is known of it), intensity counts; the best score is where the system is surest.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from engines.manifest import Output
from pipeline.physics.cell_targets import read_cell_targets
from pipeline.physics.grid import grid_detections
from pipeline.physics.refine import Candidates
from pipeline.physics.score import THRESHOLDS_PX

Detections = NDArray[np.float64]


def read_maps(
    maps: NDArray[np.float32],
    unit_B: NDArray[np.floating],
    output: Output,
    c: int,
    threshold: float,
) -> Candidates:
    """What the maps hold. On the grid every cell ≥ threshold is a target, as published.

    maps and threshold in network units of `unit_B` counts.
    """
    if output == "intensity-map":
        peaks = grid_detections(maps, c, threshold)
    else:
        peaks = read_cell_targets(maps, c)
    unit = unit_B[peaks.image]
    return Candidates(
        peaks.image,
        peaks.xy_px,
        peaks.intensity * unit,
        np.zeros(len(unit), dtype=np.bool_),
        peaks.p_exist,
        peaks.cov_px2,
        peaks.intensity_sigma * unit,
    )


def detections(found: Candidates, images: int) -> list[Detections]:
    """One table for each image.

    The score is the intensity if nothing else is known of any, as published for networks on the
    grid; otherwise existence times how many of the metric's thresholds the position is expected
    to meet, one without covariance being good for the widest alone.
    """
    variance = (found.cov_px2[:, 0] + found.cov_px2[:, 2]) / 2.0
    if np.isnan(variance).all():
        score = found.intensity
    else:
        hits = expected_hits(np.nan_to_num(variance, nan=max(THRESHOLDS_PX) ** 2))
        score = np.nan_to_num(found.p_exist, nan=1.0) * hits
    table = np.column_stack([found.xy_px, score, found.cov_px2, found.intensity])
    return np.split(table, np.searchsorted(found.patch, np.arange(1, images)))


def expected_hits(
    variance_px2: NDArray[np.float64], thresholds_px: Sequence[float] = THRESHOLDS_PX
) -> NDArray[np.float64]:
    """Share of the distance thresholds that a position of this variance along each axis meets."""
    ratio = np.square(thresholds_px) / (2.0 * np.maximum(variance_px2, 1e-12)[:, None])
    share: NDArray[np.float64] = np.mean(1.0 - np.exp(-ratio), axis=1)
    return share
