"""Whether errors are as large as they are said to be, and as small as they can be."""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.formats.csist import CsistDataset
from pipeline.physics.grid import cell_variance_px2
from pipeline.physics.groups import MAX_TARGETS
from trainer.metrics import group_bounds, nees
from trainer.reading import Detections

Array64 = NDArray[np.float64]

FEW = 3
"""Groups of up to so many targets are judged by themselves too: what a sensor can tell apart."""

WITHIN_95 = 5.991
"""Squared distance, in standard deviations, that 95 % of two-dimensional normal errors keep."""


def true_bounds(dataset: CsistDataset, true: list[Array64]) -> list[Array64]:
    """Cramér–Rao covariance (n, 2, 2) px² of the true positions of each image."""
    return group_bounds(true, dataset.sensor, dataset.image.shape[1], dataset.background)


def bound_figures(bounds: list[Array64]) -> dict[str, Any]:
    """The rms bound of an image's targets, median over images, in all and by number of targets."""
    rms = np.array(
        [math.sqrt(np.trace(b, axis1=1, axis2=2).mean()) if len(b) else math.nan for b in bounds]
    )
    count = np.array([len(b) for b in bounds])
    return {
        "crb_px": _median(rms[count > 0]),
        "crb_px_by_count": {
            str(number): _median(rms[count == number]) for number in np.unique(count[count > 0])
        },
    }


def stated_covariances(found: list[Detections], matched: NDArray[np.int64]) -> Array64:
    """Covariance (P, 2, 2) px² of each matched detection; NaN where the method states none."""
    stated = np.array([found[image][row, [3, 4, 4, 5]] for image, row, _ in matched])
    return stated.reshape(-1, 2, 2)


def published_covariances(
    dataset: CsistDataset, found: list[Detections], matched: NDArray[np.int64], c: int
) -> Array64:
    """Covariance (P, 2, 2) px² that the pipeline publishes of each matched detection.

    Its own, or, for a network on the grid, the bound at the estimated group plus the variance
    within a cell: NaN for images with over twice as many detections as there can be targets, where
    the bound says nothing but costs a lot.
    """
    covariance = stated_covariances(found, matched)
    if np.isnan(covariance).any():
        sane = [rows if len(rows) <= 2 * MAX_TARGETS else rows[:0] for rows in found]
        bounds = group_bounds(sane, dataset.sensor, dataset.image.shape[1], dataset.background)
        cell = cell_variance_px2(1.0 / c) * np.eye(2)
        known = np.full_like(covariance, np.nan)
        for place, (image, row, _) in enumerate(matched):
            if len(bounds[image]) > 0:
                known[place] = bounds[image][row] + cell
        covariance = np.where(np.isnan(covariance), known, covariance)
    return covariance


def honesty_figures(
    error: Array64,
    covariance: Array64,
    bounds: list[Array64],
    matched: NDArray[np.int64],
    found: list[Detections],
) -> dict[str, Any]:
    """nees, within_95 and rmse_over_bound of the matched; of some with a suffix.

    _few: those in images of up to FEW targets. _few_counted: of these images, those in which as
    many targets were found as there are, as the bound supposes.
    error (P, ≥2) px, covariance (P, 2, 2), matched (P, 3) image, detection and truth.
    """
    bound = np.array([bounds[image][truth] for image, _, truth in matched]).reshape(-1, 2, 2)
    few = np.array([len(bounds[image]) <= FEW for image, _, _ in matched], dtype=np.bool_)
    counted = np.array([len(bounds[i]) == len(found[i]) for i, _, _ in matched], dtype=np.bool_)
    distance2 = np.sum(error[:, :2] ** 2, axis=1)
    figures: dict[str, Any] = {}
    groups = {"": np.ones_like(few), "_few": few, "_few_counted": few & counted}
    for suffix, chosen in groups.items():
        kept = chosen & ~np.isnan(covariance).any(axis=(1, 2))
        squared = mahalanobis(error[kept, :2], covariance[kept])
        ratio2 = distance2[chosen] / np.trace(bound[chosen], axis1=1, axis2=2)
        figures |= {
            f"nees{suffix}": nees(error[kept, :2], covariance[kept]),
            f"within_95{suffix}": _mean(squared < WITHIN_95),
            f"rmse_over_bound{suffix}": math.sqrt(_mean(ratio2)),
        }
    return figures


def mahalanobis(error_px: Array64, covariance_px2: Array64) -> Array64:
    """Squared distance (P,) of errors (P, 2) in standard deviations of their covariances."""
    scaled = np.linalg.solve(covariance_px2, error_px[..., None])[..., 0]
    squared: Array64 = np.sum(error_px * scaled, axis=1)
    return squared


def _mean(values: NDArray[Any]) -> float:
    return float(values.mean()) if len(values) else math.nan


def _median(values: Array64) -> float | None:
    return float(np.median(values)) if len(values) else None
