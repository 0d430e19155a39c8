"""What flows: Frame → Blobs → Patches → Unmixed → TargetReport, and the maps sent to subscribers.

The first five are frozen dataclasses of numpy arrays, passed from stage to stage; the last are
plain types any language reads from MessagePack, described by the pydantic models at the end.
Axes: H, W pixels; N groups (one a blob); B patches; M targets. x is the column, y the row.
"""

from dataclasses import dataclass
from enum import IntFlag
from functools import cache
from typing import Annotated, Any, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, model_validator

MAX_COUNT = 5
"""Count posteriors run over 0, 1, …, 4 and "5 or more"."""


class Flag(IntFlag):
    """What a user of a target or group should know about it."""

    EDGE = 1  # its window is cut by the edge of the frame or tile
    SATURATED = 2  # its window holds a pixel at full scale
    BAD_PIXEL = 4  # its window holds a pixel marked bad
    EXTENDED = 8  # wider than any group of point sources: never unmixed
    MERGED = 16  # several blobs, one window
    OVERFLOW = 32  # left out: more blobs in the frame than detect.max_blobs
    CLUTTER = 64  # its surroundings are no plane (horizon, building): never unmixed
    CROWDED = 128  # more targets in its window than networks are made for: rather one thing
    MISFIT = 256  # no group of point sources explains its counts
    UNCONVERGED = 512  # its fit found no maximum; the network's answer is given
    UNCONFIRMED = 1024  # the detector beside the flow looked and has no box there
    CONFLICT = 2048  # that detector says it is no point source
    DETECTOR_ONLY = 4096  # only that detector saw it

    @property
    def names(self) -> list[str]:
        """Lower-case names of the flags that are set."""
        return [str(flag.name).lower() for flag in self]


@dataclass(frozen=True)
class Tiling:
    """A frame that is a mosaic of independent square tiles; no window may straddle two."""

    size_px: int
    pitch_px: int


@dataclass(frozen=True)
class Pose:
    """Where a camera looks: azimuth clockwise from north, elevation up, roll clockwise; radians."""

    az_rad: float
    el_rad: float
    roll_rad: float


@dataclass(frozen=True)
class FrameInfo:
    """What every message keeps of the frame it came from.

    t_exposure_ns: middle of the exposure, on the clock named `clock`. flags: remarks of the
    source, such as "compressed". pose: of this frame, where the source knows it.
    """

    seq: int
    sensor_id: str
    t_exposure_ns: int
    clock: str
    shape: tuple[int, int]
    flags: tuple[str, ...] = ()
    tiling: Tiling | None = None
    pose: Pose | None = None


@dataclass(frozen=True)
class SentFrame:
    """A frame as another program sent it (`irst.frame/1`): its number is the sender's."""

    seq: int
    t_exposure_ns: int
    clock: str
    pixels_HW: NDArray[Any]
    flags: tuple[str, ...]
    pose: Pose | None


@dataclass(frozen=True)
class BadMessage:
    """What another program sent is no frame, and why; seq is the sender's if it could be read."""

    seq: int | None
    reason: str


@dataclass(frozen=True)
class Frame:
    """One exposure in counts."""

    info: FrameInfo
    pixels_HW: NDArray[Any]


@dataclass(frozen=True)
class Blobs:
    """Connected bright regions of a frame, one a group of targets."""

    info: FrameInfo
    pixels_HW: NDArray[Any]
    usable_HW: NDArray[np.bool_]  # False: bad pixel
    xy_px: NDArray[np.float64]  # (N, 2) where the window is to be centred
    bbox_px: NDArray[np.int32]  # (N, 4) x0, y0, x1, y1, the last two one past the end
    snr: NDArray[np.float32]  # (N,) of the matched filter's peak
    flags: NDArray[np.uint16]  # (N,)


@dataclass(frozen=True)
class Patches:
    """Windows round the groups that can be unmixed; the others (EXTENDED, CLUTTER…) have none."""

    info: FrameInfo
    counts_BHW: NDArray[np.float32]
    background_BHW: NDArray[np.float32]  # local plane, counts
    usable_BHW: NDArray[np.bool_]
    origin_px: NDArray[np.int32]  # (B, 2) x, y of the window's first pixel
    group: NDArray[np.int32]  # (B,) row among the groups below
    bbox_px: NDArray[np.int32]  # (N, 4)
    snr: NDArray[np.float32]  # (N,)
    flags: NDArray[np.uint16]  # (N,)


@dataclass(frozen=True)
class Unmixed:
    """Targets found in the patches, in frame coordinates; a refining stage gives them anew."""

    patches: Patches
    patch: NDArray[np.int32]  # (M,) row among the patches
    xy_px: NDArray[np.float64]  # (M, 2)
    intensity: NDArray[np.float64]  # (M,) counts
    refined: NDArray[np.bool_]  # (M,) fitted to the counts, no longer on the network's grid
    p_exist: NDArray[np.float64]  # (M,) this and the next three: NaN where it is not said
    p_count: NDArray[np.float64]  # (M,) that the patch holds this and those before it, at least
    cov_px2: NDArray[np.float64]  # (M, 3) xx, xy, yy
    intensity_sigma: NDArray[np.float64]  # (M,) counts
    joint_px2: NDArray[np.float64]  # (B, 2K, 2K) of x, y of a patch's refined targets, NaN: unsaid
    cell_px: float  # what a position is good for where there is no covariance
    engine: str  # hash of the engine that found them
    source: str  # name of the method the positions come from

    @property
    def info(self) -> FrameInfo:
        """Of the frame."""
        return self.patches.info


@dataclass(frozen=True)
class Angles:
    """Where targets are seen, for a sensor whose geometry is known."""

    az_rad: NDArray[np.float64]  # (M,) clockwise from north, −π…π
    el_rad: NDArray[np.float64]  # (M,) up
    cov_rad2: NDArray[np.float64]  # (M, 3) az az, az el, el el


@dataclass(frozen=True)
class Objects:
    """What a detector of whole frames, beside the flow, saw in a frame."""

    info: FrameInfo
    box_px: NDArray[np.float64]  # (K, 4) x0, y0, x1, y1
    label: NDArray[np.int32]  # (K,) row of labels
    score: NDArray[np.float64]  # (K,) as the network gives it
    point_source: NDArray[np.bool_]  # (K,) of a class that is a target
    odds: NDArray[np.float64]  # (K,) log-odds that a point source is in the box, calibrated
    labels: tuple[str, ...]
    prior_odds: float  # the same before a box's score is known
    missed_odds: float  # what having no box adds to the log-odds of a point source
    margin_px: float  # of a box round its targets
    centre_sigma_px: float  # error of a box's middle along an axis
    engine: str  # hash of the engine that found them


@dataclass(frozen=True)
class Fusion:
    """What came of a detector's word: its labels and boxes, a row a group."""

    engine: str  # hash of the detector, "" where it said nothing
    missing: str  # why it said nothing, "" where it did
    label: tuple[str, ...]  # (N,) "" where there is no box
    box_px: NDArray[np.float64]  # (N, 4) NaN where there is none
    p_box: NDArray[np.float64]  # (N,) that a point source is in the box; NaN where there is none


@dataclass(frozen=True)
class TargetReport:
    """The targets of a frame as published, without what only the running system knows."""

    info: FrameInfo
    engine: str
    source: str
    refined: NDArray[np.bool_]  # (M,) fitted to the counts
    group: NDArray[np.int32]  # (M,) row among the groups
    xy_px: NDArray[np.float64]  # (M, 2)
    cov_px2: NDArray[np.float64]  # (M, 3) xx, xy, yy
    intensity: NDArray[np.float64]  # (M,) counts
    intensity_sigma: NDArray[np.float64]  # (M,) counts
    p_exist: NDArray[np.float64]  # (M,)
    snr: NDArray[np.float64]  # (M,)
    flags: NDArray[np.uint16]  # (M,)
    bbox_px: NDArray[np.int32]  # (N, 4)
    count_posterior: NDArray[np.float64]  # (N, 6) over 0, 1, …, 4, 5 or more
    joint_px2: NDArray[np.float64]  # (N, 2K, 2K) of x, y of a group's targets, NaN: not known
    group_flags: NDArray[np.uint16]  # (N,)
    angles: Angles | None = None
    fusion: Fusion | None = None


@dataclass(frozen=True)
class Dropped:
    """A frame that will not be published, where it was lost and why."""

    seq: int
    stage: str
    reason: str


@dataclass(frozen=True)
class Seen:
    """A frame's targets and what a detector beside the flow saw in it, or why it said nothing."""

    report: TargetReport
    objects: Objects | Dropped

    @property
    def info(self) -> FrameInfo:
        """Of the frame."""
        return self.report.info


@dataclass(frozen=True)
class Trace:
    """When a frame entered, on the monotonic clock, and what each stage and hop took since."""

    t_ingest_ns: int
    stage_ns: dict[str, int]


# --- on the wire ---------------------------------------------------------------------------

Finite = Annotated[float, Field(allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
Probability = Annotated[float, Field(ge=0.0, le=1.0)]


class Wire(BaseModel):
    """A map of plain types; unknown keys and values of another type are errors."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class _Columns(Wire):
    @model_validator(mode="after")
    def _equally_long(self) -> Self:
        columns = {name: getattr(self, name) for name in type(self).model_fields}
        lengths = {name: len(column) for name, column in columns.items() if column is not None}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"columns differ in length: {lengths}")
        return self


Symmetric = Annotated[list[Finite], Field(min_length=3, max_length=3)]


class TargetColumns(_Columns):
    """One entry a target in every column; angles only from a sensor that has them."""

    id: list[int]
    group: list[int]
    x_px: list[Finite]
    y_px: list[Finite]
    cov_px2: list[Symmetric]
    intensity: list[Finite]
    intensity_sigma: list[NonNegative]
    p_exist: list[Probability]
    snr: list[Finite]
    source: list[str]
    label: list[str]
    flags: list[list[str]]
    az_rad: list[Finite] | None = None
    el_rad: list[Finite] | None = None
    cov_rad2: list[Symmetric] | None = None


class GroupColumns(_Columns):
    """One entry a group in every column.

    joint_cov_px2: upper triangle, row by row, of the covariance of x, y of its first target, x, y
    of its second, …; empty where the method does not say. A group may be without targets: its
    flags say that it was not unmixed (extended, clutter, overflow) or that only a detector beside
    the flow saw it (detector_only), otherwise nothing significant was found in it.

    label, box (x0, y0, x1, y1 px; empty: none) and p_box, the probability that a point source is
    in the box, are there where targets are fused with such a detector.
    """

    id: list[int]
    bbox: list[Annotated[list[int], Field(min_length=4, max_length=4)]]
    count_posterior: list[
        Annotated[list[Probability], Field(min_length=MAX_COUNT + 1, max_length=MAX_COUNT + 1)]
    ]
    joint_cov_px2: list[list[Finite]]
    flags: list[list[str]]
    label: list[str] | None = None
    box: list[Annotated[list[Finite], Field(max_length=4)]] | None = None
    p_box: list[Probability | None] | None = None


class FusionState(Wire):
    """Which detector targets were fused with; `missing` says why with none, "" if they were."""

    detector: str
    missing: str


class TargetsMessage(Wire):
    """`irst.targets/1`: the targets of one frame."""

    schema_: Literal["irst.targets/1"] = Field(alias="schema")
    sensor_id: str
    frame_seq: int
    t_exposure_ns: int
    clock: str
    frame_shape: Annotated[list[int], Field(min_length=2, max_length=2)]
    frame_flags: list[str]
    targets: TargetColumns
    groups: GroupColumns
    stage_ns: dict[str, int]
    age_ns: int
    gap: list[int]
    engine: str
    config: str
    fusion: FusionState | None = None


class StartMessage(Wire):
    """`irst.start/1`: a run begins."""

    schema_: Literal["irst.start/1"] = Field(alias="schema")
    sensor_id: str
    config: str


class GapMessage(Wire):
    """`irst.gap/1`: a frame that will not come."""

    schema_: Literal["irst.gap/1"] = Field(alias="schema")
    sensor_id: str
    frame_seq: int
    stage: str
    reason: str


class HeartbeatMessage(Wire):
    """`irst.heartbeat/1`: alive, though there may be no frames."""

    schema_: Literal["irst.heartbeat/1"] = Field(alias="schema")
    sensor_id: str
    published: int
    t_monotonic_ns: int


class DropCount(Wire):
    """Frames lost at one stage for one reason."""

    stage: str
    reason: str
    frames: int


class EndMessage(Wire):
    """`irst.eos/1`: the stream is over; frames in = published + Σ dropped."""

    schema_: Literal["irst.eos/1"] = Field(alias="schema")
    sensor_id: str
    frames_in: int
    published: int
    dropped: list[DropCount]


WIRE_MODELS: dict[str, type[Wire]] = {
    "irst.targets/1": TargetsMessage,
    "irst.start/1": StartMessage,
    "irst.gap/1": GapMessage,
    "irst.heartbeat/1": HeartbeatMessage,
    "irst.eos/1": EndMessage,
}


def check_wire(message: Any) -> Wire:
    """The model of a decoded message; raises ValueError naming what does not fit."""
    schema = message.get("schema") if isinstance(message, dict) else None
    if not isinstance(schema, str) or schema not in WIRE_MODELS:
        raise ValueError(f"unknown schema {schema!r}; known: {', '.join(WIRE_MODELS)}")
    return WIRE_MODELS[schema].model_validate(message)


@cache
def _flag_names(flags: int) -> tuple[str, ...]:
    return tuple(Flag(flags).names)


def _upper_triangle(joint_px2: NDArray[np.float64]) -> list[float]:
    """Row by row, what is known of a covariance padded with NaN."""
    if not joint_px2.size:
        return []
    number = int(np.sum(~np.isnan(np.diagonal(joint_px2))))
    values: list[float] = joint_px2[np.triu_indices(number)].tolist()
    return values


def targets_message(
    report: TargetReport, *, stage_ns: dict[str, int], age_ns: int, gap: list[int], config: str
) -> dict[str, Any]:
    """A report as the plain map of `irst.targets/1`."""
    info, angles, fusion = report.info, report.angles, report.fusion
    number = len(report.group)
    label = [""] * len(report.bbox_px) if fusion is None else list(fusion.label)
    seen = (
        {}
        if angles is None
        else {
            "az_rad": angles.az_rad.tolist(),
            "el_rad": angles.el_rad.tolist(),
            "cov_rad2": angles.cov_rad2.tolist(),
        }
    )
    return {
        "schema": "irst.targets/1",
        "sensor_id": info.sensor_id,
        "frame_seq": info.seq,
        "t_exposure_ns": info.t_exposure_ns,
        "clock": info.clock,
        "frame_shape": list(info.shape),
        "frame_flags": list(info.flags),
        "targets": {
            "id": list(range(number)),
            "group": report.group.tolist(),
            "x_px": report.xy_px[:, 0].tolist(),
            "y_px": report.xy_px[:, 1].tolist(),
            "cov_px2": report.cov_px2.tolist(),
            "intensity": report.intensity.tolist(),
            "intensity_sigma": report.intensity_sigma.tolist(),
            "p_exist": report.p_exist.tolist(),
            "snr": report.snr.tolist(),
            "source": [report.source + "+refine" * fitted for fitted in report.refined.tolist()],
            "label": [label[group] for group in report.group.tolist()],
            "flags": [list(_flag_names(flags)) for flags in report.flags.tolist()],
            **seen,
        },
        "groups": {
            "id": list(range(len(report.bbox_px))),
            "bbox": report.bbox_px.tolist(),
            "count_posterior": report.count_posterior.tolist(),
            "joint_cov_px2": [_upper_triangle(joint) for joint in report.joint_px2],
            "flags": [list(_flag_names(flags)) for flags in report.group_flags.tolist()],
            **({} if fusion is None else _group_boxes(fusion)),
        },
        "stage_ns": stage_ns,
        "age_ns": age_ns,
        "gap": gap,
        "engine": report.engine,
        "config": config,
        **(
            {}
            if fusion is None
            else {"fusion": {"detector": fusion.engine, "missing": fusion.missing}}
        ),
    }


def _group_boxes(fusion: Fusion) -> dict[str, Any]:
    """Columns of the groups, only there when targets are to be fused."""
    has = ~np.isnan(fusion.p_box)
    return {
        "label": list(fusion.label),
        "box": [
            box if there else [] for box, there in zip(fusion.box_px.tolist(), has, strict=True)
        ],
        "p_box": [
            p if there else None for p, there in zip(fusion.p_box.tolist(), has, strict=True)
        ],
    }
