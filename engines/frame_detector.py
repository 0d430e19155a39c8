"""Finds objects in whole frames with a network in the layout of YOLO."""

from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from engines.base import Engine
from engines.detector_manifest import DetectorManifest
from engines.frame_input import Image, stretched

TILE_OVERLAP_PX = 32
GREY = 114.0 / 255.0
"""What YOLO pads pictures with; a frame stretched about its noise has its median, 0."""


class Detections(NamedTuple):
    """Objects, the best score first."""

    box_px: NDArray[np.float64]  # (K, 4) x0, y0, x1, y1
    label: NDArray[np.int32]  # (K,) row of the manifest's classes
    score: NDArray[np.float64]  # (K,) as the network gives it

    def take(self, rows: Any) -> "Detections":
        """Some of them."""
        return Detections(self.box_px[rows], self.label[rows], self.score[rows])


class FrameDetector:
    """Runs an engine over frames; owns it.

    A frame is scaled to fit into the input and padded, or, if the network is to see it pixel by
    pixel, cut into as few tiles as cover it with TILE_OVERLAP_PX in common.
    """

    def __init__(self, engine: Engine[DetectorManifest], full_scale: int) -> None:
        self._engine, self._full_scale = engine, full_scale
        self.manifest = engine.manifest

    def detect(self, frame_HW: NDArray[Any]) -> Detections:
        """What is in a frame (H, W) of counts; boxes in its pixels, whose centres are integers.

        Raises ValueError if the network's answer is not finite.
        """
        manifest = self.manifest
        tiles, scale, origins = self._placed(frame_HW)
        output = self._engine.infer(tiles)
        if not np.isfinite(output).all():
            raise ValueError("the detector's answer is not finite; its engine is broken")
        found = [decode(answer, manifest) for answer in output]
        for detections, origin in zip(found, origins, strict=True):
            detections.box_px[:] = (detections.box_px + np.tile(origin, 2)) / scale - 0.5
        joined = Detections(*(np.concatenate(column) for column in zip(*found, strict=True)))
        if len(found) > 1 or manifest.output == "raw":
            joined = suppressed(joined, manifest)
        else:
            joined = joined.take(np.argsort(-joined.score, kind="stable"))
        kept = joined.take(slice(manifest.max_objects))
        high = np.tile(frame_HW.shape[::-1], 2) - 0.5
        kept.box_px[:] = np.clip(kept.box_px, -0.5, high)
        return kept

    def inputs(self, frame_HW: NDArray[Any]) -> Image:
        """What the network is given of a frame (B, C, H, W)."""
        return self._placed(frame_HW)[0]

    def _placed(self, frame_HW: NDArray[Any]) -> tuple[Image, float, list[NDArray[np.float64]]]:
        image_HW = stretched(frame_HW, self.manifest.stretch, self._full_scale)
        place = _letterbox if self.manifest.resize else _tiles
        return place(image_HW, self.manifest)

    def close(self) -> None:
        """Release the engine."""
        self._engine.close()


def decode(answer: NDArray[np.float32], manifest: DetectorManifest) -> Detections:
    """The boxes of one answer whose score is at least `min_score`, in pixels of the input."""
    if manifest.output == "nms":
        rows = answer[answer[:, 4] >= manifest.min_score].astype(np.float64)
        label = np.rint(rows[:, 5]).astype(np.int32)
        known = (label >= 0) & (label < len(manifest.classes))
        return Detections(rows[known, :4], label[known], rows[known, 4])
    scores_CN = answer[4:]
    best = scores_CN.max(axis=0)
    columns = np.flatnonzero(best >= manifest.min_score)
    box = answer[:4, columns].T.astype(np.float64)
    if manifest.box == "cxcywh":
        half = box[:, 2:] / 2.0
        box = np.concatenate([box[:, :2] - half, box[:, :2] + half], axis=1)
    label = scores_CN[:, columns].argmax(axis=0).astype(np.int32)
    return Detections(box, label, best[columns].astype(np.float64))


def suppressed(detections: Detections, manifest: DetectorManifest) -> Detections:
    """Without those that overlap a better one, of whatever class: one object has one box."""
    if not len(detections.score):
        return detections
    box = detections.box_px.copy()
    box[:, 2:] -= box[:, :2]
    scores = detections.score.tolist()
    kept = cv2.dnn.NMSBoxes(box.tolist(), scores, manifest.min_score, manifest.overlap)
    return detections.take(np.asarray(kept, np.int64))


def _letterbox(
    image_HW: Image, manifest: DetectorManifest
) -> tuple[Image, float, list[NDArray[np.float64]]]:
    """Inputs (1, C, H, W), the scale, and what to add to a box before dividing by the scale."""
    height, width = image_HW.shape
    scale = min(manifest.height / height, manifest.width / width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    if size != (width, height):
        how = cv2.INTER_AREA if scale < 1.0 else cv2.INTER_LINEAR
        image_HW = np.asarray(cv2.resize(image_HW, size, interpolation=how), np.float32)
    left, top = (manifest.width - size[0]) // 2, (manifest.height - size[1]) // 2
    return _padded(image_HW, left, top, manifest)[None], scale, [np.array([-left, -top], float)]


def _tiles(
    image_HW: Image, manifest: DetectorManifest
) -> tuple[Image, float, list[NDArray[np.float64]]]:
    """As `_letterbox`, of tiles at the frame's own scale."""
    height, width = image_HW.shape
    tops, lefts = _starts(height, manifest.height), _starts(width, manifest.width)
    corners = [(left, top) for top in tops for left in lefts]
    tiles = [
        _padded(image_HW[top : top + manifest.height, left : left + manifest.width], 0, 0, manifest)
        for left, top in corners
    ]
    return np.stack(tiles), 1.0, [np.array(corner, float) for corner in corners]


def _starts(length: int, tile: int) -> list[int]:
    """Where tiles begin that cover a side, the overlap the same between all."""
    if length <= tile:
        return [0]
    number = -(-(length - TILE_OVERLAP_PX) // max(tile - TILE_OVERLAP_PX, 1))
    return [round(start) for start in np.linspace(0, length - tile, number).tolist()]


def _padded(image_HW: Image, left: int, top: int, manifest: DetectorManifest) -> Image:
    """An input (C, H, W) with the image in it."""
    input_CHW = np.full(
        manifest.patch_shape, 0.0 if manifest.stretch == "noise" else GREY, np.float32
    )
    height, width = image_HW.shape
    input_CHW[:, top : top + height, left : left + width] = image_HW
    return input_CHW
