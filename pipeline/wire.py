"""The maps sent to subscribers: plain types that any language reads from MessagePack."""

import sys
from functools import cache
from typing import Annotated, Any, TypeVar

import numpy as np
from msgspec import Meta, Struct, ValidationError, convert
from numpy.typing import NDArray

from pipeline.messages import MAX_COUNT, Flag, Fusion, TargetReport, misfit

LARGEST = sys.float_info.max
Finite = Annotated[float, Meta(ge=-LARGEST, le=LARGEST)]
NonNegative = Annotated[float, Meta(ge=0.0, le=LARGEST)]
Probability = Annotated[float, Meta(ge=0.0, le=1.0)]
Symmetric = Annotated[list[Finite], Meta(min_length=3, max_length=3)]
Box = Annotated[list[int], Meta(min_length=4, max_length=4)]
Model = TypeVar("Model", bound="Map")
Posterior = Annotated[list[Probability], Meta(min_length=MAX_COUNT + 1, max_length=MAX_COUNT + 1)]


class Map(Struct, frozen=True, forbid_unknown_fields=True):
    """A map of plain types; unknown keys and values of another type are errors."""


class Wire(Map, frozen=True, tag_field="schema"):
    """A message to subscribers."""


class Columns(Map, frozen=True):
    """Lists of one length, or None."""

    def __post_init__(self) -> None:
        columns = {name: getattr(self, name) for name in self.__struct_fields__}
        lengths = {name: len(column) for name, column in columns.items() if column is not None}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"columns differ in length: {lengths}")


class TargetColumns(Columns, frozen=True):
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


class GroupColumns(Columns, frozen=True):
    """One entry a group in every column.

    joint_cov_px2: upper triangle, row by row, of the covariance of x, y of its first target, x, y
    of its second, …; empty where the method does not say. A group may be without targets: its
    flags say that it was not unmixed (extended, clutter, overflow) or that only a detector beside
    the flow saw it (detector_only), otherwise nothing significant was found in it.

    label, box (x0, y0, x1, y1 px; empty: none) and p_box, the probability that a point source is
    in the box, are there where targets are fused with such a detector.
    """

    id: list[int]
    bbox: list[Box]
    count_posterior: list[Posterior]
    joint_cov_px2: list[list[Finite]]
    flags: list[list[str]]
    label: list[str] | None = None
    box: list[Annotated[list[Finite], Meta(max_length=4)]] | None = None
    p_box: list[Probability | None] | None = None


class FusionState(Map, frozen=True):
    """Which detector targets were fused with; `missing` says why with none, "" if they were."""

    detector: str
    missing: str


class TargetsMessage(Wire, frozen=True, tag="irst.targets/1"):
    """`irst.targets/1`: the targets of one frame."""

    sensor_id: str
    frame_seq: int
    t_exposure_ns: int
    clock: str
    frame_shape: Annotated[list[int], Meta(min_length=2, max_length=2)]
    frame_flags: list[str]
    targets: TargetColumns
    groups: GroupColumns
    stage_ns: dict[str, int]
    age_ns: int
    gap: list[int]
    engine: str
    config: str
    fusion: FusionState | None = None


class StartMessage(Wire, frozen=True, tag="irst.start/1"):
    """`irst.start/1`: a run begins."""

    sensor_id: str
    config: str


class GapMessage(Wire, frozen=True, tag="irst.gap/1"):
    """`irst.gap/1`: a frame that will not come."""

    sensor_id: str
    frame_seq: int
    stage: str
    reason: str


class HeartbeatMessage(Wire, frozen=True, tag="irst.heartbeat/1"):
    """`irst.heartbeat/1`: alive, though there may be no frames."""

    sensor_id: str
    published: int
    t_monotonic_ns: int


class DropCount(Map, frozen=True):
    """Frames lost at one stage for one reason."""

    stage: str
    reason: str
    frames: int


class EndMessage(Wire, frozen=True, tag="irst.eos/1"):
    """`irst.eos/1`: the stream is over; frames in = published + Σ dropped."""

    sensor_id: str
    frames_in: int
    published: int
    dropped: list[DropCount]


WIRE_MODELS: dict[str, type[Wire]] = {
    str(model.__struct_config__.tag): model
    for model in (TargetsMessage, StartMessage, GapMessage, HeartbeatMessage, EndMessage)
}


def check_wire(message: Any) -> Wire:
    """The model of a decoded message; raises ValueError naming what does not fit."""
    schema = message.get("schema") if isinstance(message, dict) else None
    if not isinstance(schema, str) or schema not in WIRE_MODELS:
        raise ValueError(f"unknown schema {schema!r}; known: {', '.join(WIRE_MODELS)}")
    return read_map(message, WIRE_MODELS[schema], schema)


def read_map(message: Any, model: type[Model], name: str) -> Model:
    """A decoded map as `model`; raises ValueError saying what of `name` does not fit, and where."""
    try:
        return convert(message, model)
    except ValidationError as error:
        raise ValueError(misfit(name, error)) from error


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
