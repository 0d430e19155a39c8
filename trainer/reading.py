"""From a network's maps to detections, by what the network answers.

Detections of an image are (n, 5): x px, y px, score, variance of the position px², intensity
counts; the best score is where the system is surest. On the grid the score is the intensity, as
published; off it, how many of the metric's thresholds the detection is expected to meet.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from engines.manifest import Output
from pipeline.physics.cell_targets import read_cell_targets
from pipeline.physics.grid import grid_detections
from pipeline.physics.score import THRESHOLDS_PX

Detections = NDArray[np.float64]


def read_maps(
    maps: NDArray[np.float32],
    unit_B: NDArray[np.floating],
    output: Output,
    c: int,
    threshold: float,
) -> list[Detections]:
    """Detections of each image. On the grid every cell ≥ threshold is one, as published.

    maps and threshold in network units of `unit_B` counts.
    """
    if output == "intensity-map":
        peaks = grid_detections(maps, c, threshold)
        score = peaks.intensity * unit_B[peaks.image]
    else:
        peaks = read_cell_targets(maps, c)
        score = peaks.p_exist * expected_hits(peaks.variance_px2)
    intensity = peaks.intensity * unit_B[peaks.image]
    columns = (peaks.xy_px, score, peaks.variance_px2, intensity)
    return by_image(peaks.image, len(maps), *columns)


def by_image(
    image: NDArray[np.integer], images: int, *columns: NDArray[np.float64]
) -> list[Detections]:
    """Columns of all detections, in the order of their images, as one table for each image."""
    return np.split(np.column_stack(columns), np.searchsorted(image, np.arange(1, images)))


def expected_hits(
    variance_px2: NDArray[np.float64], thresholds_px: Sequence[float] = THRESHOLDS_PX
) -> NDArray[np.float64]:
    """Share of the distance thresholds that a position of this variance along each axis meets."""
    ratio = np.square(thresholds_px) / (2.0 * np.maximum(variance_px2, 1e-12)[:, None])
    share: NDArray[np.float64] = np.mean(1.0 - np.exp(-ratio), axis=1)
    return share
