"""A picture of one frame: boxes round its groups, and one group enlarged with its positions."""

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from pipeline.component import Source
from pipeline.errors import PipelineError

ENLARGE = 40
PANEL_PX = 13
GREEN, ORANGE, RED, WHITE = (80, 220, 80), (40, 160, 255), (80, 80, 255), (255, 255, 255)
FONT = cv2.FONT_HERSHEY_SIMPLEX

Image = NDArray[np.uint8]


def draw(source: Source, targets: Path, out: Path, frame: int | None) -> int:
    """Write the PNG; returns the number of the frame drawn, by default one with a large group."""
    messages = read_messages(targets)
    number = frame if frame is not None else max(messages, key=lambda n: _largest(messages[n])[1])
    if number not in messages:
        raise PipelineError(f"{targets}: holds no frame {number}; choose another --frame")
    pixels = next((f.pixels_HW for f in source.frames() if f.info.seq == number), None)
    if pixels is None:
        raise PipelineError(f"{targets}: frame {number} is not in the recording; give its own")
    message = messages[number]
    truth = source.truth.of_frame(number) if source.truth is not None else np.empty((0, 2))
    left, right = _overview(pixels, message), _enlarged(pixels, message, truth)
    height = max(len(left), len(right))
    panels = [
        cv2.copyMakeBorder(panel, 0, height - len(panel), 0, 8, cv2.BORDER_CONSTANT)
        for panel in (left, right)
    ]
    if not cv2.imwrite(str(out), np.hstack(panels)):
        raise PipelineError(f"{out}: cannot write the picture; give a path that ends in .png")
    return number


def read_messages(path: Path) -> dict[int, dict[str, Any]]:
    """Target messages by frame number; raises PipelineError if the file holds something else."""
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        messages = {line["frame_seq"]: line for line in lines}
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise PipelineError(
            f"{path}: not target messages as lines of JSON; write them with replay --out"
        ) from error
    if not messages:
        raise PipelineError(f"{path}: holds no target message")
    return messages


def _largest(message: dict[str, Any]) -> tuple[int, int]:
    """Group with the most targets, and how many it has."""
    counts = np.bincount(
        message["targets"]["group"], minlength=max(1, len(message["groups"]["id"]))
    )
    return int(counts.argmax()), int(counts.max())


def _grey(pixels: NDArray[Any]) -> Image:
    low, high = np.percentile(pixels, [0.5, 99.9])
    scaled = np.clip((pixels.astype(np.float32) - low) / max(high - low, 1.0), 0.0, 1.0)
    grey = (scaled * 255).astype(np.uint8)
    return np.repeat(grey[:, :, None], 3, axis=2)


def _overview(pixels: NDArray[Any], message: dict[str, Any]) -> Image:
    """The frame, twice enlarged, with a box round each group."""
    image = cv2.resize(_grey(pixels), None, fx=2, fy=2, interpolation=cv2.INTER_NEAREST)
    counts = np.bincount(message["targets"]["group"], minlength=len(message["groups"]["id"]))
    for row, (x0, y0, x1, y1) in enumerate(message["groups"]["bbox"]):
        extended = "extended" in message["groups"]["flags"][row]
        colour = ORANGE if extended else GREEN
        cv2.rectangle(image, (2 * x0 - 8, 2 * y0 - 8), (2 * x1 + 8, 2 * y1 + 8), colour, 1)
        text = "extended" if extended else str(counts[row])
        cv2.putText(image, text, (2 * x1 + 11, 2 * y0 + 2), FONT, 0.45, colour, 1, cv2.LINE_AA)
    text = f"frame {message['frame_seq']}: groups and their number of targets"
    cv2.putText(image, text, (8, 20), FONT, 0.5, WHITE, 1, cv2.LINE_AA)
    return image.astype(np.uint8)


def _enlarged(pixels: NDArray[Any], message: dict[str, Any], truth: NDArray[np.float64]) -> Image:
    """The window round the largest group: true positions as crosses, found ones as ellipses."""
    group, _ = _largest(message)
    x0, y0, x1, y1 = message["groups"]["bbox"][group] if message["groups"]["id"] else (0, 0, 1, 1)
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
