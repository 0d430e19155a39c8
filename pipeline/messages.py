"""What flows: Frame → Blobs → Patches → Unmixed → TargetReport, from stage to stage.

Frozen structs of numpy arrays; what subscribers are sent of them is in wire.py. Axes: H, W
pixels; N groups (one a blob); B patches; M targets. x is the column, y the row.
"""

import re
from enum import IntFlag
from typing import Annotated, Any

import numpy as np
from msgspec import Meta, Struct
from numpy.typing import NDArray

MAX_COUNT = 5
"""Count posteriors run over 0, 1, …, 4 and "5 or more"."""


Text = Annotated[str, Meta(max_length=4096)]
Texts = Annotated[tuple[Text, ...], Meta(max_length=4096)]


class Message(Struct, frozen=True, forbid_unknown_fields=True):
    """Like a frozen dataclass; those that go to another process are checked there, by their types.

    `msgspec.structs.replace` makes another with some fields changed.
    """


SAID = 120  # letters of the beginning and of the end of what msgspec says: it quotes what it found


def misfit(name: str, error: Exception) -> str:
    """What is wrong with what is called `name`, as msgspec found, and where in it."""
    said = "".join(letter if letter.isprintable() else "?" for letter in str(error))
    if len(said) > 2 * SAID:
        said = f"{said[:SAID]}…{said[-SAID:]}"
    said = re.sub(r"`float` [<>]= -?1\.79\S+", "a finite `float`", said)
    return f"{name}: {said}".replace("`$", f"`{name}")  # "Expected `int`, got … - at `$.info.seq`"


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


class Tiling(Message, frozen=True):
    """A frame that is a mosaic of independent square tiles; no window may straddle two."""

    size_px: int
    pitch_px: int


class Pose(Message, frozen=True):
    """Where a camera looks: azimuth clockwise from north, elevation up, roll clockwise; radians."""

    az_rad: float
    el_rad: float
    roll_rad: float


class FrameInfo(Message, frozen=True):
    """What every message keeps of the frame it came from.

    t_exposure_ns: middle of the exposure, on the clock named `clock`. flags: remarks of the
    source, such as "compressed". pose: of this frame, where the source knows it.
    """

    seq: int
    sensor_id: Text
    t_exposure_ns: int
    clock: Text
    shape: tuple[int, int]
    flags: Texts = ()
    tiling: Tiling | None = None
    pose: Pose | None = None


class SentFrame(Message, frozen=True):
    """A frame as another program sent it (`irst.frame/1`): its number is the sender's.

    parts: of the message it came in.
    """

    seq: int
    t_exposure_ns: int
    clock: Text
    pixels_HW: NDArray[Any]
    flags: Texts
    pose: Pose | None
    parts: tuple[Any, ...] = ()


class BadMessage(Message, frozen=True):
    """What another program sent is no frame, and why; seq is the sender's if it could be read."""

    seq: int | None
    reason: Text
    parts: tuple[Any, ...] = ()


class Frame(Message, frozen=True, tag=True):
    """One exposure in counts."""

    info: FrameInfo
    pixels_HW: NDArray[Any]


class Blobs(Message, frozen=True, tag=True):
    """Connected bright regions of a frame, one a group of targets."""

    info: FrameInfo
    pixels_HW: NDArray[Any]
    usable_HW: NDArray[np.bool_]  # False: bad pixel
    xy_px: NDArray[np.float64]  # (N, 2) where the window is to be centred
    bbox_px: NDArray[np.int32]  # (N, 4) x0, y0, x1, y1, the last two one past the end
    snr: NDArray[np.float32]  # (N,) of the matched filter's peak
    flags: NDArray[np.uint16]  # (N,)


class Patches(Message, frozen=True, tag=True):
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


class Unmixed(Message, frozen=True, tag=True):
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
    engine: Text  # hash of the engine that found them
    source: Text  # name of the method the positions come from

    @property
    def info(self) -> FrameInfo:
        """Of the frame."""
        return self.patches.info


class Angles(Message, frozen=True):
    """Where targets are seen, for a sensor whose geometry is known."""

    az_rad: NDArray[np.float64]  # (M,) clockwise from north, −π…π
    el_rad: NDArray[np.float64]  # (M,) up
    cov_rad2: NDArray[np.float64]  # (M, 3) az az, az el, el el


class Objects(Message, frozen=True, tag=True):
    """What a detector of whole frames, beside the flow, saw in a frame."""

    info: FrameInfo
    box_px: NDArray[np.float64]  # (K, 4) x0, y0, x1, y1
    label: NDArray[np.int32]  # (K,) row of labels
    score: NDArray[np.float64]  # (K,) as the network gives it
    point_source: NDArray[np.bool_]  # (K,) of a class that is a target
    odds: NDArray[np.float64]  # (K,) log-odds that a point source is in the box, calibrated
    labels: Texts
    prior_odds: float  # the same before a box's score is known
    missed_odds: float  # what having no box adds to the log-odds of a point source
    margin_px: float  # of a box round its targets
    centre_sigma_px: float  # error of a box's middle along an axis
    engine: Text  # hash of the engine that found them


class Fusion(Message, frozen=True):
    """What came of a detector's word: its labels and boxes, a row a group."""

    engine: Text  # hash of the detector, "" where it said nothing
    missing: Text  # why it said nothing, "" where it did
    label: Texts  # (N,) "" where there is no box
    box_px: NDArray[np.float64]  # (N, 4) NaN where there is none
    p_box: NDArray[np.float64]  # (N,) that a point source is in the box; NaN where there is none


class TargetReport(Message, frozen=True, tag=True):
    """The targets of a frame as published, without what only the running system knows."""

    info: FrameInfo
    engine: Text
    source: Text
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


class Dropped(Message, frozen=True, tag=True):
    """A frame that will not be published, where it was lost and why."""

    seq: int
    stage: Text
    reason: Text


class Malformed(Dropped, frozen=True, tag=True):
    """Of a source: what came in place of the frame made none; its bytes, if they are to be kept."""

    parts: tuple[Any, ...] = ()


class Seen(Message, frozen=True):
    """A frame's targets and what a detector beside the flow saw in it, or why it said nothing."""

    report: TargetReport
    objects: Objects | Dropped

    @property
    def info(self) -> FrameInfo:
        """Of the frame."""
        return self.report.info


class Trace(Message, frozen=True):
    """When a frame entered, on the monotonic clock, and what each stage and hop took since."""

    t_ingest_ns: int
    stage_ns: Annotated[dict[Text, int], Meta(max_length=256)]
