"""A picture of one frame: boxes round its groups, and one group enlarged with its positions."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from pipeline.component import Source, Truth
from pipeline.errors import PipelineError
from pipeline.formats.writable import check_png, check_writable
from pipeline.messages import Flag, Frame
from pipeline.wire import TargetsMessage, check_wire

ENLARGE = 40
PANEL_PX = 13
MARGIN_PX = 2
NOT_UNMIXED = (Flag.EXTENDED | Flag.CLUTTER | Flag.OVERFLOW).names
GREEN, ORANGE, RED, WHITE = (80, 220, 80), (40, 160, 255), (80, 80, 255), (255, 255, 255)
BLUE = (255, 190, 90)
FONT = cv2.FONT_HERSHEY_SIMPLEX

Image = NDArray[np.uint8]


def draw(source: Source, targets: Path, out: Path, frame: int | None) -> int:
    """Write the PNG; returns the number of the frame drawn, by default that of the best group."""
    check_png(out)
    check_writable(out)
    messages = read_messages(targets)
    if frame is not None:
        if frame not in messages:
            raise PipelineError(f"{targets}: holds no frame {frame}; choose another --frame")
        messages = {frame: messages[frame]}
    number, group = _best_group(messages, source.truth)
    _check_recording(messages[number], source, targets)
    frames = (frame for frame in source.frames() if isinstance(frame, Frame))
    pixels = next((frame.pixels_HW for frame in frames if frame.info.seq == number), None)
    if pixels is None:
        raise PipelineError(f"{targets}: frame {number} is not in the recording; give its own")
    message = messages[number]
    truth = source.truth.of_frame(number) if source.truth is not None else np.empty((0, 2))
    left, right = _overview(pixels, message), _enlarged(pixels, message, group, truth)
    height = max(len(left), len(right))
    panels = [
        cv2.copyMakeBorder(panel, 0, height - len(panel), 0, 8, cv2.BORDER_CONSTANT)
        for panel in (left, right)
    ]
    _, png = cv2.imencode(".png", np.hstack(panels))
    try:
        out.write_bytes(png.tobytes())
    except OSError as error:
        raise PipelineError(f"{out}: cannot write the picture ({error.strerror})") from error
    return number


def _check_recording(message: dict[str, Any], source: Source, targets: Path) -> None:
    """Refuse targets of another sensor or of frames of another size."""
    of = f"{message['sensor_id']}, {_size(message['frame_shape'])}"
    own = f"{source.sensor.id}, {_size(source.shape)}"
    if of != own:
        raise PipelineError(
            f"{targets}: targets of {of} px, but the recording is of {own} px; give its own, and "
            "--config if it was replayed with one"
        )


def _size(shape: Sequence[int]) -> str:
    return f"{shape[1]}×{shape[0]}"


def read_messages(path: Path) -> dict[int, dict[str, Any]]:
    """Target messages by frame number; lines that hold other messages of a stream are left out.

    Raises PipelineError naming the first line that is no message.
    """
    messages = {}
    try:
        with path.open(encoding="utf-8", errors="replace") as lines:
            for number, line in enumerate(lines, start=1):
                message = _message(line, f"{path}: line {number}")
                if message["schema"] == "irst.targets/1":
                    messages[message["frame_seq"]] = message
    except OSError as error:
        raise PipelineError(f"{path}: cannot read target messages ({error.strerror})") from error
    if not messages:
        raise PipelineError(f"{path}: holds no target message; write them with replay --out")
    return messages


def _message(line: str, where: str) -> dict[str, Any]:
    """A line as a message that fits its schema and whose targets belong to its groups."""
    try:
        message = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise PipelineError(f"{where} is not JSON; write messages with replay --out") from error
    try:
        checked = check_wire(message)
    except ValueError as error:
        raise PipelineError(f"{where} is no message: {error}") from error
    if isinstance(checked, TargetsMessage):
        groups = len(checked.groups.id)
        if not all(0 <= group < groups for group in checked.targets.group):
            raise PipelineError(f"{where}: targets.group must name one of its {groups} groups")
    result: dict[str, Any] = message
    return result


def _best_group(messages: dict[int, dict[str, Any]], truth: Truth | None) -> tuple[int, int | None]:
    """Frame and row of the group to enlarge; (first frame, None) if there is no group at all.

    With truth it is the group with the most true targets in its box of those in which targets
    were found, else the one in which most were found, extended objects and clutter aside.
    """
    rows = [(number, group) for number in messages for group in range(_groups(messages[number]))]
    if not rows:
        return next(iter(messages)), None
    found = np.concatenate([_found(message) for message in messages.values()])
    if truth is not None:
        true = [_true(message, truth.of_frame(number)) for number, message in messages.items()]
        worth = np.where(found > 0, np.concatenate(true), 0)
        if worth.any():
            return rows[int(worth.argmax())]
    point_like = [_reason(messages[number], group) is None for number, group in rows]
    return rows[int(np.where(point_like, found, -1).argmax())]


def _groups(message: dict[str, Any]) -> int:
    return len(message["groups"]["id"])


def _found(message: dict[str, Any]) -> NDArray[np.int64]:
    """Number of targets found in each group (N,)."""
    group = np.array(message["targets"]["group"], dtype=np.int64)
    return np.bincount(group, minlength=_groups(message)).astype(np.int64)


def _true(message: dict[str, Any], true_xy_px: NDArray[np.float64]) -> NDArray[np.int64]:
    """Number of true targets in the box of each group (N,), the box grown by MARGIN_PX."""
    boxes = np.array(message["groups"]["bbox"], dtype=np.float64).reshape(-1, 1, 4)
    low, high = boxes[..., :2] - 0.5 - MARGIN_PX, boxes[..., 2:] - 0.5 + MARGIN_PX
    inside = (true_xy_px >= low) & (true_xy_px <= high)
    result: NDArray[np.int64] = inside.all(axis=2).sum(axis=1)
    return result


def _reason(message: dict[str, Any], group: int) -> str | None:
    """Why a group was not unmixed."""
    return next((flag for flag in message["groups"]["flags"][group] if flag in NOT_UNMIXED), None)


def _grey(pixels: NDArray[Any]) -> Image:
    low, high = np.percentile(pixels, [0.5, 99.9])
    scaled = np.clip((pixels.astype(np.float32) - low) / max(high - low, 1.0), 0.0, 1.0)
    grey = (scaled * 255).astype(np.uint8)
    return np.repeat(grey[:, :, None], 3, axis=2)


def _overview(pixels: NDArray[Any], message: dict[str, Any]) -> Image:
    """The frame, twice enlarged, with a box round each group."""
    image = cv2.resize(_grey(pixels), None, fx=2, fy=2, interpolation=cv2.INTER_NEAREST)
    counts = _found(message)
    for row, (x0, y0, x1, y1) in enumerate(message["groups"]["bbox"]):
        reason = _reason(message, row)
        colour = GREEN if reason is None else ORANGE
        cv2.rectangle(image, (2 * x0 - 8, 2 * y0 - 8), (2 * x1 + 8, 2 * y1 + 8), colour, 1)
        text = reason or str(counts[row])
        cv2.putText(image, text, (2 * x1 + 11, 2 * y0 + 2), FONT, 0.45, colour, 1, cv2.LINE_AA)
    _draw_boxes(image, message["groups"])
    text = f"frame {message['frame_seq']}: groups and their number of targets"
    text += "; blue: the detector's boxes, p of a point source" * ("fusion" in message)
    cv2.putText(image, text, (8, 20), FONT, 0.5, WHITE, 1, cv2.LINE_AA)
    return image.astype(np.uint8)


def _draw_boxes(image: NDArray[Any], groups: dict[str, Any]) -> None:
    """What a detector beside the flow saw, in the frame twice as large: label, p of a target."""
    columns = (groups.get(name) or [] for name in ("label", "box", "p_box"))
    for label, box, p in zip(*columns, strict=True):
        if not box:
            continue
        x0, y0, x1, y1 = (round(2.0 * side + 1.0) for side in box)
        cv2.rectangle(image, (x0, y0), (x1, y1), BLUE, 1)
        cv2.putText(image, f"{label} {p:.2f}", (x0, y1 + 12), FONT, 0.4, BLUE, 1, cv2.LINE_AA)


def _enlarged(
    pixels: NDArray[Any], message: dict[str, Any], group: int | None, truth: NDArray[np.float64]
) -> Image:
    """The window round a group: true positions as crosses, found ones as ellipses."""
    x0, y0, x1, y1 = (0, 0, 1, 1) if group is None else message["groups"]["bbox"][group]
    height, width = pixels.shape
    left = int(np.clip((x0 + x1) // 2 - PANEL_PX // 2, 0, max(0, width - PANEL_PX)))
    top = int(np.clip((y0 + y1) // 2 - PANEL_PX // 2, 0, max(0, height - PANEL_PX)))
    window = _grey(pixels[top : top + PANEL_PX, left : left + PANEL_PX])
    image = cv2.resize(window, None, fx=ENLARGE, fy=ENLARGE, interpolation=cv2.INTER_NEAREST)

    def place(x_px: float, y_px: float) -> tuple[int, int]:
        return round((x_px - left + 0.5) * ENLARGE), round((y_px - top + 0.5) * ENLARGE)

    for x_px, y_px in truth:
        cv2.drawMarker(image, place(x_px, y_px), RED, cv2.MARKER_CROSS, 16, 2, cv2.LINE_AA)
    columns = message["targets"]
    for x_px, y_px, (xx, xy, yy) in zip(
        columns["x_px"], columns["y_px"], columns["cov_px2"], strict=True
    ):
        variances, axes = np.linalg.eigh([[xx, xy], [xy, yy]])
        size = np.maximum(np.sqrt(variances) * ENLARGE, 2.0).round().astype(int)
        angle = float(np.degrees(np.arctan2(axes[1, 1], axes[0, 1])))
        box = (int(size[1]), int(size[0]))
        cv2.ellipse(image, place(x_px, y_px), box, angle, 0, 360, GREEN, 2, cv2.LINE_AA)
    legend = "cross: true, ellipse: found, 1 sigma" if len(truth) else "ellipse: found, 1 sigma"
    cv2.putText(image, legend, (8, 20), FONT, 0.5, WHITE, 1, cv2.LINE_AA)
    return image.astype(np.uint8)
