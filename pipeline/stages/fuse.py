"""Targets and the boxes of a detector beside the flow → targets that know of both.

A box goes with a group if one of its targets lies within the gate: the Mahalanobis distance of
target and middle of the box, by the sum of their covariances. A box is as uncertain as the middles
of this detector's boxes are, and uniform over what is left of it without its margin round a target;
a group without targets counts as uniform over its own box.

The group's log-odds of existence L, of P = 1 − P(no target), and the box's:

    L' = L + L_box − L_prior                     with a box
    L' = L + log(P(no box | target)/P(no box | clutter))     without one

L_box is calibrated log-odds given the score, and holds the prior of the boxes it was calibrated on;
the group has its own prior in L, so that of the boxes is taken off, once. L is at most that of
`surest`: the imaging model knows noise and other targets, but no clutter, and is all too sure of
that. Each target keeps its probability given that its group exists: p' = p · P'/P. A box of a class
that is no point source never raises L.

What unmixing alone saw stays, UNCONFIRMED; what the detector alone saw is published as a group
without targets, DETECTOR_ONLY; a group of which it says that it is no point source is a CONFLICT.
Where it said nothing in time the targets are as they were, and the message says why.
"""

import math
from typing import NamedTuple

import numpy as np
from msgspec.structs import replace
from numpy.typing import NDArray
from pydantic import Field
from scipy.special import expit, logit

from pipeline.component import Settings, Stage
from pipeline.messages import Dropped, Flag, Fusion, Objects, Seen, TargetReport

NEVER = 1e-9
"""Probabilities are kept so far from 0 and 1 when their odds are taken."""
NO_BOX = -1
Vector = NDArray[np.float64]
Rows = NDArray[np.int64]


class Fuse(Stage[Seen, TargetReport]):
    """Puts existence, labels and boxes of both together, group by group."""

    class Config(Settings):
        """gate: share of true pairs within it. surest: existence unmixing is believed, at most.

        min_p: of a point source only the detector saw. min_score: of any other object only it saw;
        those of the classes in `ignore` are left out.
        """

        gate: float = Field(0.999, gt=0.0, lt=1.0)
        surest: float = Field(0.9, gt=0.5, lt=1.0)
        min_p: float = Field(0.5, ge=0.0, le=1.0)
        min_score: float = Field(0.5, ge=0.0, le=1.0)
        ignore: tuple[str, ...] = ("clutter",)

    def process(self, message: Seen) -> TargetReport:
        """The report with what the detector says of each group."""
        report, objects = message.report, message.objects
        if isinstance(objects, Dropped):
            return replace(report, fusion=_nothing_said(len(report.bbox_px), objects.reason))
        box_N = associated(report, objects, -2.0 * math.log1p(-self._config.gate))
        weighed = _reweighed(report, objects, box_N, self._config.surest)
        fused = _with_boxes(weighed, objects, box_N)
        return _with_unseen(fused, objects, self._alone(objects, box_N))

    def _alone(self, objects: Objects, box_N: Rows) -> Rows:
        """Boxes of no group that are worth telling of."""
        alone: Rows = np.setdiff1d(np.arange(len(objects.label)), box_N)
        ignored = [label in self._config.ignore for label in objects.labels]
        likely = expit(objects.odds) >= self._config.min_p
        clear = (objects.score >= self._config.min_score) & ~np.array(ignored)[objects.label]
        telling = np.where(objects.point_source, likely, clear)
        kept: Rows = alone[telling[alone]]
        return kept


class _Places(NamedTuple):
    """What boxes are compared with: targets, and groups that have none."""

    xy_px: Vector  # (P, 2)
    cov_px2: Vector  # (P, 2, 2)
    group: Rows  # (P,)


def associated(report: TargetReport, objects: Objects, gate: float) -> Rows:
    """The box (N,) of each group, NO_BOX without one; gate: of the squared distance.

    Pairs are made nearest first. A box of a point source goes with one group, any other with all
    that it holds.
    """
    box_N = np.full(len(report.bbox_px), NO_BOX, np.int64)
    places = _places(report)
    if not len(places.group) or not len(objects.label):
        return box_N
    side = objects.box_px[:, 2:] - objects.box_px[:, :2]
    inner = np.maximum(side - 2.0 * objects.margin_px, 0.0)
    variance = inner**2 / 12.0 + objects.centre_sigma_px**2  # (K, 2)
    middle = (objects.box_px[:, :2] + objects.box_px[:, 2:]) / 2.0
    offset = places.xy_px[:, None] - middle  # (P, K, 2)
    cov = places.cov_px2[:, None] + variance[None, :, :, None] * np.eye(2)
    distance = np.einsum("pki,pki->pk", offset, np.linalg.solve(cov, offset[..., None])[..., 0])
    taken: set[int] = set()
    order = np.argsort(distance, axis=None, kind="stable")
    for place, box in zip(*np.unravel_index(order, distance.shape), strict=True):
        if distance[place, box] > gate:
            break
        group = places.group[place]
        if box_N[group] == NO_BOX and box not in taken:
            box_N[group] = box
            if objects.point_source[box]:
                taken.add(box)
    return box_N


def _places(report: TargetReport) -> _Places:
    number = len(report.bbox_px)
    empty = np.setdiff1d(np.arange(number), report.group)
    box = report.bbox_px[empty].astype(np.float64)
    middle = (box[:, :2] + box[:, 2:] - 1.0) / 2.0
    uniform = (box[:, 2:] - box[:, :2]) ** 2 / 12.0
    xx, xy, yy = report.cov_px2.T
    target_cov = np.stack([np.stack([xx, xy], -1), np.stack([xy, yy], -1)], -2)
    return _Places(
        np.concatenate([report.xy_px, middle]),
        np.concatenate([target_cov, uniform[:, :, None] * np.eye(2)]),
        np.concatenate([report.group.astype(np.int64), empty]),
    )


def fused_odds(own: Vector, box: Vector, prior: float) -> Vector:
    """Log-odds of existence from two that were told of the same prior: it counts once."""
    return own + box - prior


def _reweighed(report: TargetReport, objects: Objects, box_N: Rows, surest: float) -> TargetReport:
    """Existence and flags by what the boxes say."""
    exists = 1.0 - report.count_posterior[:, 0]
    own = logit(np.clip(exists, NEVER, surest))
    found = box_N != NO_BOX
    odds = own + objects.missed_odds
    odds[found] = fused_odds(own[found], objects.odds[box_N[found]], objects.prior_odds)
    other = np.zeros(len(box_N), np.bool_)
    other[found] = ~objects.point_source[box_N[found]]
    odds[other] = np.minimum(odds[other], own[other])
    ratio = np.divide(expit(odds), exists, out=np.ones_like(exists), where=exists > 0.0)
    has_targets = np.isin(np.arange(len(box_N)), report.group)
    flags = report.group_flags.copy()
    flags[~found & has_targets] |= np.uint16(Flag.UNCONFIRMED)
    flags[other & has_targets] |= np.uint16(Flag.CONFLICT)
    posterior = report.count_posterior * np.where(has_targets, ratio, 1.0)[:, None]
    posterior = np.clip(posterior, 0.0, 1.0)
    posterior[:, 0] = np.clip(1.0 - posterior[:, 1:].sum(axis=1), 0.0, 1.0)
    marks = flags & ~report.group_flags
    return replace(
        report,
        p_exist=np.clip(report.p_exist * ratio[report.group], 0.0, 1.0),
        count_posterior=posterior,
        flags=report.flags | marks[report.group],
        group_flags=flags,
    )


def _nothing_said(groups: int, reason: str) -> Fusion:
    nan = np.full(groups, np.nan)
    return Fusion("", reason, ("",) * groups, np.full((groups, 4), np.nan), nan)


def _with_boxes(report: TargetReport, objects: Objects, box_N: Rows) -> TargetReport:
    said = _nothing_said(len(box_N), "")
    found = np.flatnonzero(box_N != NO_BOX)
    said.box_px[found] = objects.box_px[box_N[found]]
    said.p_box[found] = expit(objects.odds[box_N[found]])
    label = tuple(objects.labels[objects.label[k]] if k != NO_BOX else "" for k in box_N.tolist())
    return replace(report, fusion=replace(said, engine=objects.engine, label=label))


def _with_unseen(report: TargetReport, objects: Objects, alone: Rows) -> TargetReport:
    """A group without targets for each of these boxes; how many it holds is not known, 0 or 1."""
    number, fusion = len(alone), report.fusion
    if not number or fusion is None:
        return report
    box_px, p = objects.box_px[alone], expit(objects.odds[alone])
    posterior = np.zeros((number, report.count_posterior.shape[1]))
    posterior[:, 1] = np.where(objects.point_source[alone], p, 0.0)
    posterior[:, 0] = 1.0 - posterior[:, 1]
    bbox_px = np.floor(box_px + 0.5)  # the last two one past the end
    bbox_px[:, 2:] = np.maximum(bbox_px[:, 2:], bbox_px[:, :2] + 1.0)
    joint = np.full((number, *report.joint_px2.shape[1:]), np.nan)
    labels = tuple(objects.labels[row] for row in objects.label[alone].tolist())
    return replace(
        report,
        bbox_px=np.concatenate([report.bbox_px, bbox_px.astype(np.int32)]),
        count_posterior=np.concatenate([report.count_posterior, posterior]),
        joint_px2=np.concatenate([report.joint_px2, joint]),
        group_flags=np.append(report.group_flags, np.full(number, Flag.DETECTOR_ONLY, np.uint16)),
        fusion=Fusion(
            fusion.engine,
            "",
            fusion.label + labels,
            np.concatenate([fusion.box_px, box_px]),
            np.append(fusion.p_box, p),
        ),
    )
