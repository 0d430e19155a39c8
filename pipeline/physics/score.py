"""How good are the targets? CSO-mAP, and matching at a gate for tracking-style figures."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

Rows = NDArray[np.floating]
THRESHOLDS_PX = (0.05, 0.10, 0.15, 0.20, 0.25)


@dataclass(frozen=True)
class CsoMap:
    """Average precision at each distance threshold (px), 0–1, and their mean, the CSO-mAP."""

    ap: dict[float, float]

    @property
    def mean(self) -> float:
        """CSO-mAP, 0–1."""
        return float(np.mean(list(self.ap.values())))


def cso_map(
    detections: Sequence[Rows],
    truths: Sequence[Rows],
    thresholds_px: Sequence[float] = THRESHOLDS_PX,
) -> CsoMap:
    """CSO-mAP of the CSIST benchmark (arXiv:2505.19148).

    detections: for each image (n, ≥3) x, y, score, …. truths: for each image (m, ≥2) x, y, … px.
    Detections are pooled over images, best score first; one may match only the truth nearest to
    it, at a distance ≤ threshold, if no better one took that truth. AP is the area under the
    precision-recall curve with precision made monotone. Equal scores enter the curve together, so
    the order of images does not matter. Without any truth AP is 1 if nothing was detected, else 0.
    """
    nearest, distance, score = nearest_truth(detections, truths)
    total = sum(len(truth) for truth in truths)
    order = np.argsort(-score, kind="stable")
    nearest, distance, score = nearest[order], distance[order], score[order]
    return CsoMap(
        {t: _average_precision(nearest, distance <= t, score, total) for t in thresholds_px}
    )


def nearest_truth(
    detections: Sequence[Rows], truths: Sequence[Rows]
) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.float64]]:
    """For each pooled detection: number of its nearest truth (−1: none), distance px, score.

    The number is that of the truth among all images, so two detections share it exactly when
    they are nearest to the same truth of the same image. Raises ValueError unless both are of as
    many images, detections are finite and truths without NaN.
    """
    if len(detections) != len(truths):
        raise ValueError(f"{len(detections)} images of detections but {len(truths)} of truths")
    width = max((len(truth) for truth in truths), default=0)
    padded = np.full((len(truths), max(width, 1), 2), np.inf)
    for row, truth in zip(padded, truths, strict=True):
        if len(truth):
            row[: len(truth)] = np.asarray(truth, dtype=np.float64)[:, :2]
    if np.isnan(padded).any():
        raise ValueError("truths hold NaN; leave padding out")
    image = np.repeat(np.arange(len(detections)), [len(d) for d in detections])
    rows = [np.asarray(d, dtype=np.float64)[:, :3] for d in detections if len(d)]
    pooled = np.concatenate(rows) if rows else np.empty((0, 3))
    if not np.isfinite(pooled).all():
        raise ValueError("detections hold values that are not finite")
    distances = np.hypot(*np.moveaxis(padded[image] - pooled[:, None, :2], -1, 0))  # (D, K)
    column = distances.argmin(axis=1)
    distance = np.take_along_axis(distances, column[:, None], axis=1)[:, 0]
    nearest = np.where(np.isfinite(distance), image * padded.shape[1] + column, -1)
    return nearest, distance, pooled[:, 2]


def _average_precision(
    nearest: NDArray[np.int64], close: NDArray[np.bool_], score: NDArray[np.float64], total: int
) -> float:
    if total == 0:
        return 0.0 if len(score) else 1.0
    if len(score) == 0:
        return 0.0
    hit = first_hits(nearest, close)
    ends = np.append(np.flatnonzero(np.diff(score)), len(score) - 1)  # last of each tied block
    true_positives = np.cumsum(hit)[ends]
    precision = np.maximum.accumulate((true_positives / (ends + 1))[::-1])[::-1]
    return float(np.sum(np.diff(true_positives, prepend=0.0) / total * precision))


def first_hits(nearest: NDArray[np.int64], close: NDArray[np.bool_]) -> NDArray[np.float64]:
    """1 for each detection, best score first, that is close enough and the first at its truth."""
    candidates = np.flatnonzero(close)
    hit = np.zeros(len(nearest))
    hit[candidates[np.unique(nearest[candidates], return_index=True)[1]]] = 1.0
    return hit


def expected_hits(
    variance_px2: NDArray[np.float64], thresholds_px: Sequence[float] = THRESHOLDS_PX
) -> NDArray[np.float64]:
    """Share of the distance thresholds that a position of this variance along each axis meets."""
    ratio = np.square(thresholds_px) / (2.0 * np.maximum(variance_px2, 1e-12)[:, None])
    share: NDArray[np.float64] = np.mean(1.0 - np.exp(-ratio), axis=1)
    return share


def match_at_gate(found_xy: Rows, true_xy: Rows, gate_px: float) -> NDArray[np.int64]:
    """One-to-one assignment of as many pairs within the gate as there can be, the nearest such.

    found_xy (n, 2), true_xy (m, 2) px → pairs (p, 2): row of found, row of true.
    """
    if len(found_xy) == 0 or len(true_xy) == 0:
        return np.empty((0, 2), dtype=np.int64)
    distance = np.hypot(*np.moveaxis(found_xy[:, None, :2] - true_xy[None, :, :2], -1, 0))
    # A pair beyond the gate costs more than all pairs within it can.
    beyond_px = gate_px * (1 + min(distance.shape))
    rows, columns = linear_sum_assignment(np.where(distance <= gate_px, distance, beyond_px))
    keep = distance[rows, columns] <= gate_px
    return np.stack([rows[keep], columns[keep]], axis=1)
