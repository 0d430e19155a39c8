# mypy: allow-untyped-defs, allow-untyped-calls
# ruff: noqa: ANN001, ANN202
"""Connected bright regions of an image: finding them, and joining those one window covers."""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.physics.compiled import compiled
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
    """Regions of 8-connected pixels above the threshold, in the order of their first pixels."""
    bright = np.flatnonzero(snr_HW > threshold)
    label, number = _labelled(bright, snr_HW.shape[1])
    return Regions(*_described(bright, label, number, snr_HW))


@compiled
def _labelled(bright, width):
    """Region (N,) of each of the pixels, numbered row by row and sorted, and how many there are.

    A pixel joins the regions of its neighbours seen before: on its left and in the row above.
    """
    root = np.arange(len(bright))
    above = 0
    for n, here in enumerate(bright):
        x = here % width
        while bright[above] < here - width - 1:
            above += 1
        if x > 0 and n > 0 and bright[n - 1] == here - 1:
            _join(root, n, n - 1)
        for other in range(above, n):
            if bright[other] > here - width + 1:
                break
            if abs(bright[other] % width - x) <= 1:
                _join(root, n, other)
    number = 0
    for n in range(len(bright)):
        if root[n] == n:
            root[n] = number
            number += 1
        else:  # numbered already, since a root is the first of its region
            root[n] = root[root[n]]
    return root, number


@compiled
def _join(root, one, other):
    """Make two pixels' regions one."""
    while root[one] != one:
        root[one] = root[root[one]]
        one = root[one]
    while root[other] != other:
        root[other] = root[root[other]]
        other = root[other]
    root[max(one, other)] = min(one, other)


@compiled
def _described(bright, label, number, snr_HW):
    """The columns of `Regions`."""
    width = snr_HW.shape[1]
    peak_xy, peak = np.zeros((number, 2), np.int64), np.zeros(number, np.float32)
    for n, region in enumerate(label):
        y, x = divmod(bright[n], width)
        if snr_HW[y, x] > peak[region]:
            peak_xy[region, 0], peak_xy[region, 1], peak[region] = x, y, snr_HW[y, x]
    box, xy_px, total = np.zeros((number, 4), np.int64), np.zeros((number, 2)), np.zeros(number)
    box[:, :2] = snr_HW.size
    for n, region in enumerate(label):
        y, x = divmod(bright[n], width)
        snr = snr_HW[y, x]
        if snr < np.float32(CORE_SHARE) * peak[region]:
            continue
        box[region, 0], box[region, 1] = min(box[region, 0], x), min(box[region, 1], y)
        box[region, 2], box[region, 3] = max(box[region, 2], x + 1), max(box[region, 3], y + 1)
        xy_px[region, 0] += x * float(snr)
        xy_px[region, 1] += y * float(snr)
        total[region] += snr
    for region in range(number):
        xy_px[region] /= total[region]
    return peak_xy, peak, box, xy_px


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
