"""Targets as a method proposes them, of many patches at once, and with what it says of each."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.physics.grid import Peaks
from pipeline.physics.groups import MAX_TARGETS

Array64 = NDArray[np.float64]

LIKELY = 0.5
"""A candidate whose p_count is at least this is a target; others only say how sure the count is."""


MIN_SNR = 4.0
MIN_P_EXIST = 0.5
"""A target is published if its matched-filter SNR, its fellows known, and its existence are these
at least, and it is within the most probable count."""


def significant(
    snr: Array64,
    p_exist: Array64,
    p_count: Array64,
    min_snr: float = MIN_SNR,
    min_p_exist: float = MIN_P_EXIST,
) -> NDArray[np.bool_]:
    """Which targets (M,) are published; probabilities that are NaN, unsaid, speak against none."""
    unlikely = (p_count < LIKELY) | (p_exist < min_p_exist)
    keep: NDArray[np.bool_] = (snr >= min_snr) & ~unlikely
    return keep


class Candidates(NamedTuple):
    """Targets of many patches, in the order of the patches; positions in patch coordinates.

    p_exist: that there is a target thereabouts. p_count: that its patch holds it and those before
    it at least, so it falls within a patch. NaN where nothing is known of existence, count,
    covariance or sigma.
    """

    patch: NDArray[np.integer]  # (M,) which patch
    xy_px: Array64  # (M, 2)
    intensity: Array64  # (M,) counts
    refined: NDArray[np.bool_]  # (M,) fitted to the counts
    p_exist: Array64  # (M,)
    p_count: Array64  # (M,)
    cov_px2: Array64  # (M, 3) xx, xy, yy
    intensity_sigma: Array64  # (M,) counts

    @classmethod
    def unsure(cls, patch: NDArray[np.integer], xy_px: Array64, intensity: Array64) -> "Candidates":
        """Of which nothing more is known, as from a network on the grid."""
        unknown = np.full(len(patch), np.nan)
        refined = np.zeros(len(patch), dtype=np.bool_)
        cov_px2 = np.full((len(patch), 3), np.nan)
        return cls(patch, xy_px, intensity, refined, unknown, unknown, cov_px2, unknown)

    @classmethod
    def read(cls, peaks: Peaks, unit_B: NDArray[np.floating]) -> "Candidates":
        """As a network's maps say, in counts; unit_B: counts in a network unit of each map."""
        unit = unit_B[peaks.image]
        return cls(
            peaks.image,
            peaks.xy_px,
            peaks.intensity * unit,
            np.zeros(len(unit), dtype=np.bool_),
            peaks.p_exist,
            peaks.p_count,
            peaks.cov_px2,
            peaks.intensity_sigma * unit,
        )

    @property
    def likely(self) -> "Candidates":
        """Those within the most probable number of their patch; all where no number is known."""
        return self.take(~(self.p_count < LIKELY))

    @property
    def counted(self) -> bool:
        """Whether the method says how many there are."""
        return len(self.patch) > 0 and not np.isnan(self.p_count).any()

    def take(self, rows: NDArray[np.bool_] | NDArray[np.int64]) -> "Candidates":
        """Some of them."""
        return self._replace(**{name: getattr(self, name)[rows] for name in self._fields})


class Table(NamedTuple):
    """Candidates as one row a patch, padded with zero, the two probabilities with NaN."""

    present: NDArray[np.bool_]  # (B, K)
    parameters: Array64  # (B, K, 3) x, y, intensity
    p_exist: Array64  # (B, K)
    p_count: Array64  # (B, K)
    cov_px2: Array64  # (B, K, 3)
    intensity_sigma: Array64  # (B, K)

    @property
    def variance(self) -> Array64:
        """Of x, y and intensity (B, K, 3), as the method says."""
        return np.concatenate([self.cov_px2[..., ::2], self.intensity_sigma[..., None] ** 2], 2)


def table(candidates: Candidates, patches: int, spare: int = 0) -> Table:
    """A row for each of the patches, with `spare` columns more than the fullest needs."""
    patch = candidates.patch
    count = np.bincount(patch, minlength=patches)
    column = np.arange(len(patch)) - (np.cumsum(count) - count)[patch]
    columns = int(count.max(initial=0)) + spare
    values = np.zeros((patches, columns, 9))
    values[..., 3:5] = np.nan
    values[patch, column] = np.column_stack(
        [
            candidates.xy_px,
            candidates.intensity,
            candidates.p_exist,
            candidates.p_count,
            candidates.cov_px2,
            candidates.intensity_sigma,
        ]
    )
    present = np.arange(columns) < count[:, None]
    p_exist, p_count = values[..., 3], values[..., 4]
    return Table(present, values[..., :3], p_exist, p_count, values[..., 5:8], values[..., 8])


def crowded(
    patch: NDArray[np.integer], p_count: Array64, published: NDArray[np.bool_], patches: int
) -> NDArray[np.bool_]:
    """Patches (B,) of more targets than a group is taken to have: many, or one extended thing.

    Counted are the targets of the most probable number; where that is unsaid, those published.
    """
    targets = patch[np.where(np.isnan(p_count), published, p_count >= LIKELY)]
    result: NDArray[np.bool_] = np.bincount(targets, minlength=patches) > MAX_TARGETS
    return result


def count_probabilities(at_least_BK: Array64) -> Array64:
    """Probability (B, K + 1) of 0, 1, …, K − 1 and of K or more, of those of at least 1, …, K."""
    rows, columns = at_least_BK.shape
    bounded = np.zeros((rows, columns + 2))
    bounded[:, 0] = 1.0
    bounded[:, 1:-1] = at_least_BK
    probability: Array64 = np.clip(bounded[:, :-1] - bounded[:, 1:], 0.0, 1.0)
    return probability


def at_least(candidates: Candidates, patches: int, most: int) -> Array64:
    """Probability (B, most) that a patch has at least 1, 2, … targets, of candidates counted."""
    rows = table(candidates, patches, spare=most)
    result: Array64 = np.where(rows.present, rows.p_count, 0.0)[:, :most]
    return result
