"""What a detector's boxes are worth, and the lack of one, counted on frames it was not trained on.

A box holds a point source if the middle of a point target's or a group's box lies within NEAR_PX of
its own, and no better box has taken that one. For each class the log-odds of that are fitted as
a · log(s/(1 − s)) + b (Platt, by Newton's method, with his targets that keep away from 0 and 1).

What the lack of a box means is counted at places where something point-like is, as it is where
the pipeline has a target: local maxima of a matched filter.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from engines.detector_manifest import MAX_SCORE, DetectorManifest
from engines.frame_detector import FrameDetector
from pipeline.physics.groups import PROFILES
from trainer.yolo.scenes import GROUP, POINT, LabelledFrame, point_like

NEAR_PX = 3.0
SIGMA_PX, SIGMAS = PROFILES["field"].sensor.sigma_px, 5.0
FEWEST = 20
"""Boxes of a class that its own Platt scaling is fitted to; of fewer the score is believed."""
STEPS = 30
BINS = 10
Vector = NDArray[np.float64]


class Counted(NamedTuple):
    """All boxes a detector gave of some frames, and what it had no box for."""

    label: NDArray[np.int32]  # (K,)
    score: Vector  # (K,)
    is_target: NDArray[np.bool_]  # (K,)
    offset_px: Vector  # (T, 2) of the middles of boxes that hold a target
    boxless: NDArray[np.int64]  # point-like places that are a target, that are none: without a box
    places: NDArray[np.int64]  # of so many


def count_boxes(detector: FrameDetector, frames: Iterable[LabelledFrame]) -> Counted:
    """Run the detector over labelled frames."""
    label, score, is_target, offsets = [], [], [], []
    boxless, places = np.zeros(2, np.int64), np.zeros(2, np.int64)
    for frame in frames:
        found = detector.detect(frame.pixels_HW)
        middle = (found.box_px[:, :2] + found.box_px[:, 2:]) / 2.0
        targets = frame.box_px[np.isin(frame.label, (POINT, GROUP))].astype(np.float64)
        true = (targets[:, :2] + targets[:, 2:]) / 2.0
        right, offset = _matched(middle, true)
        label.append(found.label)
        score.append(found.score)
        is_target.append(right)
        offsets.append(offset)
        xy = point_like(frame.pixels_HW.astype(np.float64), frame.noise, SIGMA_PX, SIGMAS)
        xy = xy[:, None]  # (P, 1, 2)
        inside = np.all((xy >= found.box_px[:, :2]) & (xy <= found.box_px[:, 2:]), axis=2)
        boxed = np.any(inside, axis=1)
        real = np.any(np.sum((xy - true) ** 2, axis=2) <= NEAR_PX**2, axis=1)
        for row, mine in enumerate((real, ~real)):
            boxless[row] += (mine & ~boxed).sum()
            places[row] += mine.sum()
    return Counted(
        np.concatenate(label),
        np.concatenate(score),
        np.concatenate(is_target),
        np.concatenate(offsets),
        boxless,
        places,
    )


def _matched(middle: Vector, true: Vector) -> tuple[NDArray[np.bool_], Vector]:
    """Which boxes, best first, hold one of these, and by how much they are off."""
    right, offsets, taken = np.zeros(len(middle), np.bool_), [np.zeros((0, 2))], set()
    for row, place in enumerate(middle):
        distance = np.hypot(*(true - place).T)
        nearest = min(
            (n for n in range(len(true)) if n not in taken), key=lambda n: distance[n], default=None
        )
        if nearest is not None and distance[nearest] <= NEAR_PX:
            taken.add(nearest)
            right[row] = True
            offsets.append((place - true[nearest])[None])
    return right, np.concatenate(offsets)


def calibration(counted: Counted, classes: tuple[str, ...]) -> dict[str, Any]:
    """The fields of the manifest that say what scores are worth."""
    platt = {}
    for row, name in enumerate(classes):
        mine = counted.label == row
        if mine.sum() >= FEWEST:
            platt[name] = platt_scaling(counted.score[mine], counted.is_target[mine])
    share = (counted.boxless + 1) / (counted.places + 2)
    found: dict[str, Any] = {
        "calibration": platt,
        "prior": float((counted.is_target.sum() + 1) / (len(counted.is_target) + 2)),
        "missed": float(share[0] / share[1]),
    }
    if len(counted.offset_px) >= FEWEST:
        found["centre_sigma_px"] = float(np.sqrt(np.mean(counted.offset_px**2)))
    return found


def platt_scaling(score: Vector, is_target: NDArray[np.bool_]) -> tuple[float, float]:
    """a, b of log-odds a · logit(score) + b, most likely for these outcomes."""
    clipped = np.clip(score, 1.0 - MAX_SCORE, MAX_SCORE)
    design = np.stack([np.log(clipped / (1.0 - clipped)), np.ones_like(score)], axis=1)
    right = int(is_target.sum())
    wanted = np.where(is_target, (right + 1) / (right + 2), 1 / (len(score) - right + 2))
    weights = np.zeros(2)
    for _ in range(STEPS):
        p = 1.0 / (1.0 + np.exp(-design @ weights))
        hessian = (design * (p * (1.0 - p))[:, None]).T @ design + 1e-6 * np.eye(2)
        step = np.linalg.solve(hessian, design.T @ (wanted - p))
        weights += step * min(1.0, 5.0 / max(float(np.abs(step).max()), 1e-12))
    return float(weights[0]), float(weights[1])


def calibration_error(counted: Counted, manifest: DetectorManifest) -> float:
    """Expected calibration error: mean over boxes of |p − share right|, in bins of equal number."""
    p = 1.0 / (1.0 + np.exp(-manifest.target_odds(counted.label, counted.score)))
    order = np.argsort(p)
    bins = np.array_split(order, BINS)
    gaps = [abs(float(p[b].mean() - counted.is_target[b].mean())) * len(b) for b in bins if len(b)]
    return sum(gaps) / max(1, len(p))
