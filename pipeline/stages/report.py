"""Unmixed targets → what is published: significance, a first covariance, counts, flags, angles.

A covariance that the method states itself, a fit or a network off the grid, is published. Where it
states none, it is the Cramér-Rao bound of the whole group at the estimate, local background
unknown, plus the variance of a uniform error over the grid cell, cell²/12 along each axis: a
network that answers in cells knows a position no better than that.
"""

from typing import Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from scipy.special import ndtr

from pipeline.component import Context, Settings, Stage
from pipeline.messages import MAX_COUNT, Angles, Flag, FrameInfo, TargetReport, Unmixed
from pipeline.physics.candidates import (
    MIN_P_EXIST,
    MIN_SNR,
    count_probabilities,
    crowded,
    significant,
)
from pipeline.physics.geometry import Geometry
from pipeline.physics.grid import cell_variance_px2
from pipeline.physics.group_bounds import Bounds, compile_bounds, group_bounds
from pipeline.physics.sensor import Sensor

Vector = NDArray[np.float64]


class Report(Stage[Unmixed, TargetReport]):
    """Judges each target by the imaging model."""

    class Config(Settings):
        """A target whose matched-filter SNR, its fellows known, is lower than min_snr is left out.

        So is one beyond the most probable count, and one less probable than min_p_exist, by a
        method that says so.
        """

        min_snr: float = Field(MIN_SNR, ge=0.0)
        min_p_exist: float = Field(MIN_P_EXIST, ge=0.0, le=1.0)

    def __init__(self, config: Config, sensor: Sensor, geometry: Geometry | None = None) -> None:
        super().__init__(config, sensor)
        self._geometry = geometry
        compile_bounds()

    @classmethod
    def build(cls, config: Config, context: Context) -> Self:
        """Needs the sensor, and its geometry if targets are to have angles."""
        return cls(config, context.sensor, context.geometry)

    def process(self, message: Unmixed) -> TargetReport:
        """All targets of the frame that are significant, with what is known of each.

        A group of more than groups are taken to have is CROWDED.
        """
        patches = message.patches
        snr, cov_px2, intensity_sigma = self._information(message)
        least = self._config.min_snr, self._config.min_p_exist
        keep = significant(snr, message.p_exist, message.p_count, *least)
        group = patches.group[message.patch[keep]]
        many = crowded(message.patch, message.p_count, keep, len(patches.group))
        flags = patches.flags.copy()
        flags[patches.group[many]] |= np.uint16(Flag.CROWDED)
        intensity, sigma = message.intensity[keep], intensity_sigma[keep]
        said = message.p_exist[keep]
        p_exist = np.where(np.isnan(said), ndtr(intensity / sigma), said)
        return TargetReport(
            info=message.info,
            engine=message.engine,
            source=message.source,
            refined=message.refined[keep],
            group=group,
            xy_px=message.xy_px[keep],
            cov_px2=cov_px2[keep],
            intensity=intensity,
            intensity_sigma=sigma,
            p_exist=p_exist,
            snr=snr[keep],
            flags=flags[group],
            bbox_px=patches.bbox_px,
            count_posterior=_count_posterior(message, group, p_exist),
            joint_px2=_joint(message, keep),
            group_flags=flags,
            angles=self._angles(message.info, message.xy_px[keep], cov_px2[keep]),
        )

    def _angles(self, info: FrameInfo, xy_px: Vector, cov_px2: Vector) -> Angles | None:
        if self._geometry is None:
            return None
        pose = info.pose
        boresight = None if pose is None else (pose.az_rad, pose.el_rad, pose.roll_rad)
        return Angles(*self._geometry.angles(xy_px, cov_px2, boresight))

    def _information(self, message: Unmixed) -> Bounds:
        """What the imaging model says of the targets, and the method where it says more."""
        patches = message.patches
        bounds = group_bounds(
            message.patch,
            message.xy_px - patches.origin_px[message.patch],
            message.intensity,
            patches.background_BHW.mean(axis=(1, 2), dtype=np.float64),
            patches.usable_BHW,
            self._sensor,
        )
        cell = cell_variance_px2(message.cell_px)
        gridded = bounds.cov_px2 + np.array([cell, 0.0, cell])
        return Bounds(
            bounds.snr,
            np.where(np.isnan(message.cov_px2), gridded, message.cov_px2),
            np.where(
                np.isnan(message.intensity_sigma), bounds.intensity_sigma, message.intensity_sigma
            ),
        )


def _count_posterior(message: Unmixed, group: NDArray[np.int32], p_exist: Vector) -> Vector:
    """Probability (N, 6) of 0, 1, …, 4 and 5 or more targets in each group.

    Where the method says of each target how probable it and those before it are, from all that it
    has considered; otherwise from the targets kept, taken as independent.
    """
    groups = len(message.patches.bbox_px)
    if len(message.patch) == 0 or np.isnan(message.p_count).any():
        return independent_count(group, p_exist, groups)
    at_least = np.zeros((groups, MAX_COUNT))
    rank = _rank(message.patch)
    counted = rank < MAX_COUNT
    row = message.patches.group[message.patch[counted]]
    at_least[row, rank[counted]] = message.p_count[counted]
    return count_probabilities(at_least)


def independent_count(group: NDArray[np.int32], p_exist: Vector, groups: int) -> Vector:
    """Probability (N, 6) of 0, 1, …, 4 and 5 or more targets in each group.

    Targets taken as independent, each real with its own probability (Poisson-binomial).
    """
    posterior = np.zeros((groups, MAX_COUNT + 1))
    posterior[:, 0] = 1.0
    for row, p in zip(group, p_exist, strict=True):
        before = posterior[row].copy()
        posterior[row, 1:] = before[1:] * (1.0 - p) + before[:-1] * p
        posterior[row, 0] = before[0] * (1.0 - p)
        posterior[row, -1] += before[-1] * p
    return np.clip(posterior, 0.0, 1.0)


def _joint(message: Unmixed, keep: NDArray[np.bool_]) -> Vector:
    """Covariance (N, 2K, 2K) of the kept targets of each group; NaN unless all were fitted."""
    columns = message.joint_px2.shape[1] // 2
    joint = np.full((len(message.patches.bbox_px), 2 * columns, 2 * columns), np.nan)
    if not columns:
        return joint
    fitted = np.flatnonzero(message.refined)
    place = _rank(message.patch[fitted])  # within the patch's joint covariance
    for patch in np.unique(message.patch[keep]):
        here = message.patch == patch
        if not message.refined[here & keep].all():
            continue
        kept = place[keep[fitted] & here[fitted]]
        rows = (2 * kept[:, None] + np.arange(2)).ravel()
        number = len(rows)
        group = message.patches.group[patch]
        joint[group, :number, :number] = message.joint_px2[patch][np.ix_(rows, rows)]
    return joint


def _rank(patch: NDArray[np.int32]) -> NDArray[np.int64]:
    """Of each target among those of its patch (M,), which come one after another."""
    rank: NDArray[np.int64] = np.arange(len(patch)) - np.searchsorted(patch, patch)
    return rank
