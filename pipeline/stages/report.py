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

from pipeline.component import Context, Settings, Stage
from pipeline.imaging.judgement import compile_judgement, judge
from pipeline.messages import Angles, FrameInfo, TargetReport, Unmixed
from pipeline.physics.candidates import MIN_P_EXIST, MIN_SNR
from pipeline.physics.geometry import Geometry
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
        compile_judgement()

    @classmethod
    def build(cls, config: Config, context: Context) -> Self:
        """Needs the sensor, and its geometry if targets are to have angles."""
        return cls(config, context.sensor, context.geometry)

    def process(self, message: Unmixed) -> TargetReport:
        """All targets of the frame that are significant, with what is known of each.

        A group of more than groups are taken to have is CROWDED.
        """
        config = self._config
        rows, judged = judge(message, self._sensor, config.min_snr, config.min_p_exist)
        return TargetReport(
            info=message.info,
            engine=message.engine,
            source=message.source,
            bbox_px=message.patches.bbox_px,
            joint_px2=_joint(message, rows),
            angles=self._angles(message.info, judged.xy_px, judged.cov_px2),
            **judged._asdict(),
        )

    def _angles(self, info: FrameInfo, xy_px: Vector, cov_px2: Vector) -> Angles | None:
        if self._geometry is None:
            return None
        pose = info.pose
        boresight = None if pose is None else (pose.az_rad, pose.el_rad, pose.roll_rad)
        return Angles(*self._geometry.angles(xy_px, cov_px2, boresight))


def _joint(message: Unmixed, rows: NDArray[np.int64]) -> Vector:
    """Covariance (N, 2K, 2K) of the kept targets of each group; NaN unless all were fitted."""
    size, groups = message.joint_px2.shape[1], len(message.patches.bbox_px)
    if not size:
        return np.empty((groups, 0, 0))
    joint = np.full((groups, size, size), np.nan)
    keep = np.isin(np.arange(len(message.patch)), rows)
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
