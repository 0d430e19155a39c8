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

RUN = 64
"""Pixels that are looked at together: most hold nothing."""

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
    return Regions(*_regions(snr_HW, np.float32(threshold)))


@compiled
def _regions(snr_HW, threshold):
    """The columns of `Regions`."""
    bright = _bright(snr_HW.ravel(), threshold)
    label, number = _labelled(bright, snr_HW.shape[1])
    return _described(bright, label, number, snr_HW)


@compiled
def _bright(values, threshold):
    """Numbers of the values above the threshold; runs without any are passed over quickly."""
    bright, number = np.empty(len(values), np.int64), 0
    for begin in range(0, len(values), RUN):
        run = values[begin : begin + RUN]
        above = np.int32(0)
        for n in range(len(run)):
            above += np.int32(run[n] > threshold)
        if above > 0:
            for n in range(len(run)):
                if run[n] > threshold:
                    bright[number] = begin + n
                    number += 1
    return bright[:number]


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
    xy_px, box, members = _merged(
        regions.snr, regions.peak_xy, regions.bbox_px, regions.xy_px, pitch_px
    )
    kept = members > 0
    if kept.all():
        return regions, members
    return regions._replace(bbox_px=box, xy_px=xy_px).take(kept), members[kept]


@compiled
def _merged(snr, peak_xy, box_px, centroid_px, pitch_px):
    """Positions (N, 2), boxes (N, 4), numbers of members (N,): 0 of what another has taken in."""
    number, reach = len(snr), SIZE_PX // 2
    xy_px, box, members = centroid_px.copy(), box_px.copy(), np.ones(len(snr), np.int64)
    for row in range(number):
        if members[row] == 0:
            continue
        total, mean = float(snr[row]), snr[row] * centroid_px[row]
        for other in range(row + 1, number):
            if members[other] == 0 or not _in_one_window(box[row], box_px[other]):
                continue
            here, there = peak_xy[row], peak_xy[other]
            if pitch_px > 0 and (here // pitch_px != there // pitch_px).any():
                continue
            box[row, :2] = np.minimum(box[row, :2], box_px[other, :2])
            box[row, 2:] = np.maximum(box[row, 2:], box_px[other, 2:])
            members[other] = 0
            members[row] += 1
            total += snr[other]
            mean += snr[other] * centroid_px[other]
        if members[row] > 1:
            for axis in range(2):
                at = max(mean[axis] / total, box[row, 2 + axis] - 1 - reach)
                xy_px[row, axis] = min(at, box[row, axis] + reach)
    return xy_px, box, members


@compiled
def _in_one_window(one, other):
    """True if the union of two boxes fits into a window."""
    width = max(one[2], other[2]) - min(one[0], other[0])
    height = max(one[3], other[3]) - min(one[1], other[1])
    return max(width, height) <= SIZE_PX


def compile_regions() -> None:
    """Have this compiled, or read from its cache, now instead of with the first frame."""
    merge(find_regions(np.zeros((1, 1), np.float32), 0.0), 0)
