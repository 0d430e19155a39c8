"""Detections against masks: probability of detection and false alarms, as in the literature.

Regions are 8-connected. Each true one, in the order of their labels, takes the first predicted one
not taken yet whose centroid is nearer than GATE_PX. Pd = taken / true; what is not taken is false
(B. Li et al., "Dense nested attention network for infrared small target detection", IEEE TIP 2023).
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from pipeline.imaging.regions import Image, Regions

GATE_PX = 3.0
MASK_SHARE = 0.6
"""A detection's pixels are those connected with its peak above this share of it."""
GROUP_PX = 3.0
"""True targets of a recording nearer than this are one group: telling them apart is unmixing."""

Positions = NDArray[np.float64]


class Regioned(NamedTuple):
    """Centroids (N, 2) x, y px and numbers of pixels (N,) of a mask's regions."""

    xy_px: Positions
    pixels: NDArray[np.int64]


def regions_of(mask_HW: NDArray[np.bool_]) -> Regioned:
    """8-connected regions of a mask, in the order of their labels."""
    _, _, stats, centres = cv2.connectedComponentsWithStats(
        mask_HW.astype(np.uint8), connectivity=8
    )
    return Regioned(
        np.asarray(centres[1:], np.float64), np.asarray(stats[1:, cv2.CC_STAT_AREA], np.int64)
    )


def predicted_mask(snr_HW: Image, points: Regions) -> NDArray[np.bool_]:
    """Pixels (H, W) of the detections: see MASK_SHARE."""
    filled = np.zeros((snr_HW.shape[0] + 2, snr_HW.shape[1] + 2), np.uint8)
    flags = 8 | cv2.FLOODFILL_FIXED_RANGE | cv2.FLOODFILL_MASK_ONLY
    for (x, y), peak in zip(points.peak_xy.tolist(), points.snr.tolist(), strict=True):
        cv2.floodFill(snr_HW, filled, (x, y), 0, (1.0 - MASK_SHARE) * peak, 1e9, flags)
    return filled[1:-1, 1:-1] > 0


def groups_of(xy_px: Positions) -> Positions:
    """Mean positions (G, 2) of true targets (M, 2), those chained by GROUP_PX joined."""
    near = np.hypot(*np.moveaxis(xy_px[:, None] - xy_px[None], -1, 0)) < GROUP_PX
    label = np.arange(len(xy_px))
    for row in near:
        label[np.isin(label, label[row])] = label[row].min(initial=len(xy_px))
    means = [xy_px[label == number].mean(axis=0) for number in np.unique(label)]
    return np.array(means).reshape(-1, 2)


@dataclass
class DetectionScore:
    """Sums over frames."""

    frames: int = 0
    targets: int = 0
    found: int = 0
    false_alarms: int = 0
    false_pixels: int = 0
    pixels: int = 0
    seconds: float = 0.0

    def add(self, true_xy_px: Positions, predicted: Regioned, pixels: int, seconds: float) -> None:
        """Take in one frame of so many pixels that took so long."""
        taken = np.zeros(len(predicted.xy_px), np.bool_)
        for place in true_xy_px:
            near = np.hypot(*(predicted.xy_px - place).T) < GATE_PX
            free = np.flatnonzero(near & ~taken)
            if len(free):
                taken[free[0]] = True
        self.frames += 1
        self.targets += len(true_xy_px)
        self.found += int(taken.sum())
        self.false_alarms += int((~taken).sum())
        self.false_pixels += int(predicted.pixels[~taken].sum())
        self.pixels += pixels
        self.seconds += seconds

    def to_json(self) -> dict[str, Any]:
        """Pd (null without any target), false alarms by pixel and by frame, time."""
        return {
            "pd": self.found / self.targets if self.targets else None,
            "fa_pixels": self.false_pixels / self.pixels,
            "false_alarms_per_frame": self.false_alarms / self.frames,
            "seconds_per_frame": self.seconds / self.frames,
            "frames": self.frames,
            "targets": self.targets,
        }
