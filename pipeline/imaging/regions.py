"""Connected bright regions of an image: finding them, and joining those one window covers."""

from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from pipeline.physics.groups import SIZE_PX

CORE_SHARE = 0.2
"""A region's core is what reaches this share of its peak."""

Image = NDArray[np.float32]
Integers = NDArray[np.int64]


class Regions(NamedTuple):
    """Connected bright pixels, one row a region."""

    peak_xy: Integers  # (N, 2) of the strongest pixel
    snr: Image  # (N,) there
    bbox_px: Integers  # (N, 4) of the core: x0, y0, x1, y1, the last two one past the end
    xy_px: NDArray[np.float64]  # (N, 2) centroid of the core, weighted by SNR

    def take(self, rows: NDArray[Any] | slice) -> "Regions":
        """Some of the rows, by index or mask."""
        return Regions(self.peak_xy[rows], self.snr[rows], self.bbox_px[rows], self.xy_px[rows])

    def join(self, other: "Regions") -> "Regions":
        """These and then the others."""
        return Regions(
            np.concatenate([self.peak_xy, other.peak_xy]),
            np.concatenate([self.snr, other.snr]),
            np.concatenate([self.bbox_px, other.bbox_px]),
            np.concatenate([self.xy_px, other.xy_px]),
        )


def find_regions(snr_HW: Image, threshold: float) -> Regions:
    """Regions of 8-connected pixels above the threshold."""
    bright_HW = snr_HW > threshold
    number, label_HW = cv2.connectedComponents(bright_HW.view(np.uint8), connectivity=8)
    number -= 1
    if number == 0:
        none = np.empty((0, 2))
        return Regions(
            none.astype(np.int64), np.empty(0, np.float32), np.empty((0, 4), np.int64), none
        )
    flat = np.flatnonzero(bright_HW)
    region = label_HW.ravel()[flat] - 1
    order = np.argsort(region, kind="stable")
    flat, region = flat[order], region[order]
    snr = snr_HW.ravel()[flat]
    rows = np.arange(number)
    peak = np.maximum.reduceat(snr, np.searchsorted(region, rows))
    at_peak = np.flatnonzero(snr == peak[region])
    first = flat[at_peak[np.searchsorted(region[at_peak], rows)]]

    core = snr >= CORE_SHARE * peak[region]
    snr, region = snr[core].astype(np.float64), region[core]
    y, x = np.divmod(flat[core], snr_HW.shape[1])
    begin = np.searchsorted(region, rows)
    least, most, total = (np.minimum.reduceat, np.maximum.reduceat, np.add.reduceat)
    return Regions(
        peak_xy=np.stack([first % snr_HW.shape[1], first // snr_HW.shape[1]], axis=1),
        snr=peak,
        bbox_px=np.stack(
            [least(x, begin), least(y, begin), most(x, begin) + 1, most(y, begin) + 1], axis=1
        ),
        xy_px=np.stack([total(snr * x, begin), total(snr * y, begin)], axis=1)
        / total(snr, begin)[:, None],
    )


def merge(regions: Regions, pitch_px: int) -> tuple[Regions, Integers]:
    """Join regions, given strongest first, that fit into one window; how many went into each.

    pitch_px: of the tiles, which are never joined; 0 without tiles. A joined region has the peak
    of its strongest, the union of the boxes, and the mean position weighted by SNR, moved as far
    as its window must be to cover the box.
    """
    number = len(regions.snr)
    members = np.ones(number, np.int64)
    box = regions.bbox_px.copy()
    tile = regions.peak_xy // (pitch_px or np.iinfo(np.int64).max)
    low = np.minimum(box[:, None, :2], box[None, :, :2])
    high = np.maximum(box[:, None, 2:], box[None, :, 2:])
    fits = (high - low <= SIZE_PX).all(axis=-1) & (tile[:, None] == tile[None]).all(axis=-1)
    if np.count_nonzero(fits) <= number:  # each with itself only
        return regions, members
    xy_px = regions.xy_px.copy()
    for row in range(number):
        joined = [row] if members[row] else []
        for other in np.flatnonzero(fits[row]).tolist() if joined else []:
            union = np.append(
                np.minimum(box[row, :2], box[other, :2]), np.maximum(box[row, 2:], box[other, 2:])
            )
            if other > row and members[other] and (union[2:] - union[:2] <= SIZE_PX).all():
                box[row] = union
                members[other] = 0
                joined.append(other)
        if len(joined) > 1:
            mean = np.average(regions.xy_px[joined], axis=0, weights=regions.snr[joined])
            reach = SIZE_PX // 2
            xy_px[row] = np.clip(mean, box[row, 2:] - 1 - reach, box[row, :2] + reach)
            members[row] = len(joined)
    kept = members > 0
    return regions._replace(bbox_px=box, xy_px=xy_px).take(kept), members[kept]
