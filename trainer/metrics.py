"""How good an unmixing is: CSO-mAP with its interval, counts, positions, intensities, and bounds.

Images are lists: detections (n, ≥3) x px, y px, score, and last, where intensities are judged,
intensity; truths (m, 3) x px, y px, intensity counts.
"""

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from pipeline.physics.bounds import cramer_rao, fisher_information
from pipeline.physics.score import (
    THRESHOLDS_PX,
    CsoMap,
    Rows,
    cso_map,
    first_hits,
    match_at_gate,
    nearest_truth,
)
from pipeline.physics.sensor import Sensor

__all__ = [
    "MATCH_GATE_PX",
    "CsoMap",
    "count_accuracy",
    "cso_map",
    "cso_map_by_count",
    "cso_map_difference_interval",
    "cso_map_interval",
    "group_bounds",
    "matched_errors",
    "nees",
]

MATCH_GATE_PX = 0.5
"""Pairs of found and true target farther apart are not matched; targets keep 0.494 px apart."""

_GROUPS_AT_ONCE = 2048
_RESAMPLES_AT_ONCE = 16


def cso_map_by_count(detections: Sequence[Rows], truths: Sequence[Rows]) -> dict[int, CsoMap]:
    """True number of targets, rising → CSO-mAP over the images with as many.

    Images without a target come under 0, whose AP is 1 if nothing was detected in them, else 0.
    """
    images: dict[int, list[tuple[Rows, Rows]]] = {}
    for found, true in zip(detections, truths, strict=True):
        images.setdefault(len(true), []).append((found, true))
    return {
        count: cso_map([found for found, _ in alike], [true for _, true in alike])
        for count, alike in sorted(images.items())
    }


def cso_map_interval(
    detections: Sequence[Rows],
    truths: Sequence[Rows],
    *,
    level: float = 0.95,
    resamples: int = 400,
    seed: int = 0,
    thresholds_px: Sequence[float] = THRESHOLDS_PX,
) -> tuple[float, float]:
    """Percentile bootstrap interval of the CSO-mAP, images drawn with replacement."""
    return _percentiles(_resampled(detections, truths, resamples, seed, thresholds_px), level)


def cso_map_difference_interval(
    detections_a: Sequence[Rows],
    detections_b: Sequence[Rows],
    truths: Sequence[Rows],
    *,
    level: float = 0.95,
    resamples: int = 400,
    seed: int = 0,
    thresholds_px: Sequence[float] = THRESHOLDS_PX,
) -> tuple[float, float]:
    """Percentile bootstrap interval of a's CSO-mAP less b's, paired: both on the same drawn images.

    Above 0, a is better at this level; what makes images hard for both does not widen it.
    """
    a, b = (
        _resampled(detections, truths, resamples, seed, thresholds_px)
        for detections in (detections_a, detections_b)
    )
    return _percentiles(a - b, level)


def _percentiles(values: NDArray[np.float64], level: float) -> tuple[float, float]:
    """The interval that leaves out equally many values on either side."""
    tail = 50.0 * (1.0 - level)
    low, high = np.percentile(values, [tail, 100.0 - tail])
    return float(low), float(high)


def _resampled(
    detections: Sequence[Rows],
    truths: Sequence[Rows],
    resamples: int,
    seed: int,
    thresholds_px: Sequence[float],
) -> NDArray[np.float64]:
    """CSO-mAP (R,) of resamples of the images; which are drawn depends on seed and number only.

    What matches within an image does not depend on which other images are drawn, so matching is
    done once and a resample only weighs images by how often it drew them.
    """
    number = len(truths)
    if number == 0:
        raise ValueError("there are no images to draw from")
    nearest, distance, score = nearest_truth(detections, truths)
    image = np.repeat(np.arange(len(detections)), [len(rows) for rows in detections])
    order = np.argsort(-score, kind="stable")
    nearest, distance, score, image = nearest[order], distance[order], score[order], image[order]
    hits = [first_hits(nearest, distance <= t) for t in thresholds_px]
    ends = np.flatnonzero(np.diff(score, append=-np.inf))  # last of each tied block
    targets = np.array([len(truth) for truth in truths], dtype=np.float64)
    rng = np.random.default_rng(seed)
    results: list[NDArray[np.float64]] = []
    for start in range(0, resamples, _RESAMPLES_AT_ONCE):
        some = min(_RESAMPLES_AT_ONCE, resamples - start)
        drawn = rng.multinomial(number, np.full(number, 1.0 / number), size=some)
        weight = drawn[:, image].astype(np.float64)  # (R, D)
        total = drawn @ targets  # (R,)
        seen = np.cumsum(weight, axis=1)[:, ends]
        aps = [_weighted_ap(np.cumsum(weight * hit, axis=1)[:, ends], seen, total) for hit in hits]
        results.append(np.mean(aps, axis=0))
    return np.concatenate(results)


def _weighted_ap(
    true: NDArray[np.float64], seen: NDArray[np.float64], total: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Average precision (R,) from cumulated true positives and detections (R, D)."""
    if true.shape[1] == 0:
        return np.where(total > 0.0, 0.0, 1.0)
    precision = true / np.maximum(seen, 1.0)
    precision = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
    gained = np.diff(true, prepend=0.0, axis=1)
    area = np.sum(gained * precision, axis=1) / np.maximum(total, 1.0)
    return np.where(total > 0.0, area, np.where(seen[:, -1] > 0.0, 0.0, 1.0))


def count_accuracy(detections: Sequence[Rows], truths: Sequence[Rows]) -> float:
    """Share of images with as many detections as targets."""
    return float(np.mean([len(d) == len(t) for d, t in zip(detections, truths, strict=True)]))


def matched_errors(
    detections: Sequence[Rows], truths: Sequence[Rows], gate_px: float = MATCH_GATE_PX
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Errors of the targets matched one to one within the gate.

    → (P, 3) image, row of the detection, row of the truth; (P, 3) error in x px, y px, and relative
    intensity.
    """
    which, errors = [np.empty((0, 3), np.int64)], [np.empty((0, 3))]
    for image, (found, true) in enumerate(zip(detections, truths, strict=True)):
        pairs = match_at_gate(found, true, gate_px)
        error = found[pairs[:, 0]][:, [0, 1, -1]] - true[pairs[:, 1], :3]
        error[:, 2] /= true[pairs[:, 1], 2]
        which.append(np.column_stack([np.full(len(pairs), image), pairs]))
        errors.append(error)
    return np.concatenate(which), np.concatenate(errors)


def group_bounds(
    groups: Sequence[Rows], sensor: Sensor, size_px: int, background: float
) -> list[NDArray[np.float64]]:
    """Cramér–Rao covariance (n, 2, 2) px² of the positions in each group (n, ≥3).

    Columns: x px, y px, …, last the intensity, counts.

    All intensities are unknown too, and so is the background unless it is 0; σ is the sensor's.
    """
    bounds = [np.empty((0, 2, 2))] * len(groups)
    for members in _of_equal_count(groups):
        rows = np.stack([groups[i] for i in members]).astype(np.float64)  # (G, n, ≥3)
        information = fisher_information(
            rows[..., :2],
            rows[..., -1],
            background,
            (size_px, size_px),
            sensor,
            with_background=background > 0.0,
        )
        covariance = cramer_rao(information)
        number = rows.shape[1]
        block = covariance[:, : 3 * number, : 3 * number].reshape(-1, number, 3, number, 3)
        own = np.einsum("gkakb->gkab", block)[..., :2, :2]
        for i, bound in zip(members, own, strict=True):
            bounds[i] = bound
    return bounds


def _of_equal_count(groups: Sequence[Rows]) -> Iterable[list[int]]:
    """Rows of `groups` with equally many targets, so many at a time; empty ones left out."""
    count = np.array([len(group) for group in groups], dtype=np.int64)
    for number in np.unique(count[count > 0]):
        members = np.flatnonzero(count == number)
        for start in range(0, len(members), _GROUPS_AT_ONCE):
            yield members[start : start + _GROUPS_AT_ONCE].tolist()


def nees(error_px: NDArray[np.float64], covariance_px2: NDArray[np.float64]) -> float:
    """Normalised estimation error squared, mean per dimension; 1 for honest covariances.

    error_px (P, 2), covariance_px2 (P, 2, 2) → mean of eᵀ C⁻¹ e / 2, NaN without any pair.
    """
    if len(error_px) == 0:
        return float("nan")
    scaled = np.linalg.solve(covariance_px2, error_px[..., None])[..., 0]
    return float(np.mean(np.sum(error_px * scaled, axis=1)) / 2.0)
