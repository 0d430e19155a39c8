"""Anybody's ONNX of a YOLO becomes an engine, and what the scores of any detector are worth."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx.external_data_helper import uses_external_data

from engines.base import Options
from engines.detector_manifest import DetectorManifest
from engines.detectors import load_detector
from engines.frame_detector import FrameDetector
from engines.manifest import sha256_of
from trainer.clutter import KINDS
from trainer.errors import TrainerError
from trainer.yolo.calibrate import calibration, calibration_error, count_boxes
from trainer.yolo.scenes import SceneDraw, draw_frames

CALIBRATION_SEED, HELD_OUT_SEED = 800_001, 800_002
"""Of frames; no run is trained with such seeds."""
CALIBRATION_DRAW = SceneDraw(height=256, width=320)


def calibrated(
    manifest: DetectorManifest, model: Path, frames: int, kinds: Sequence[str] = tuple(KINDS)
) -> DetectorManifest:
    """The manifest with what its scores are worth, written beside the model.

    Counted on `frames` drawn frames, the calibration error on as many others.
    """
    path = model.with_suffix(".json")
    manifest.write(path)
    draw = SceneDraw(CALIBRATION_DRAW.height, CALIBRATION_DRAW.width, tuple(kinds))
    with load_detector(str(path), options=Options(threads=1)) as engine:
        detector = FrameDetector(engine, draw.sensor.full_scale)
        counted = count_boxes(detector, draw_frames(draw, frames, CALIBRATION_SEED))
        held_out = count_boxes(detector, draw_frames(draw, frames, HELD_OUT_SEED))
    if not len(counted.label):
        raise TrainerError(
            f"{model}: no box of score {manifest.min_score} or more in {frames} drawn frames; "
            "check its classes, box and stretch, or import it without --calibrate"
        )
    found = manifest.model_copy(update=calibration(counted, manifest.classes))
    found = found.model_copy(update={"ece": calibration_error(held_out, found)})
    found.write(path)
    return found


def import_detector(
    model: Path, out_dir: Path, classes: Sequence[str], frames: int, **fields: Any
) -> DetectorManifest:
    """Put an ONNX of a YOLO into `out_dir`, in one file, with its manifest.

    frames: to calibrate on, 0: scores are believed.

    fields: of the manifest, where they are not its defaults. Raises TrainerError for a model that
    is none, EngineError for one the engine cannot run.
    """
    try:
        outline = onnx.load(str(model), load_external_data=False)
        whole = onnx.load(str(model))  # with weights that lie in a file beside it
    except Exception as error:
        raise TrainerError(f"{model}: not a readable ONNX model ({error})") from error
    graph = whole.graph
    if not (graph.input and graph.output):
        raise TrainerError(f"{model}: has no inputs or outputs; export it again")
    taken, given = _shape(graph.input[0]), _shape(graph.output[0])
    if len(graph.input) != 1 or len(taken) != 4 or None in taken[1:]:
        raise TrainerError(
            f"{model}: takes {taken}, wanted is (batch, channels, height, width) of fixed size; "
            "export it again without dynamic height and width"
        )
    if len(given) != 3 or None in given[1:]:
        raise TrainerError(
            f"{model}: gives {given}, wanted is (batch, 4 + classes, N) or, with NMS in it, "
            "(batch, N, 6), N fixed; export it again"
        )
    nms = given[2] == 6 and given[1] != 4 + len(classes)
    if not nms and given[1] != 4 + len(classes):
        raise TrainerError(
            f"{model}: gives {given[1]} rows, {len(classes)} classes need {4 + len(classes)}; "
            "name all its classes with --classes"
        )
    out_dir.mkdir(parents=True, exist_ok=True)
    path = out_dir / model.name
    if path.resolve() != model.resolve():
        path.write_bytes(whole.SerializeToString())
    elif any(map(uses_external_data, outline.graph.initializer)):
        raise TrainerError(f"{model}: its weights lie beside it; name another folder with --out")
    digest = sha256_of(path)
    manifest = DetectorManifest(
        name=model.stem,
        classes=tuple(classes),
        channels=taken[1],
        height=taken[2],
        width=taken[3],
        candidates=given[1] if nms else given[2],
        output="nms" if nms else "raw",
        max_batch=4 if taken[0] is None else 1,
        data="imported",
        seed=0,
        samples=0,
        training_s=0.0,
        loss=0.0,
        parameters=sum(int(np.prod(tensor.dims)) for tensor in graph.initializer),
        onnx_sha256=digest,
        weights_sha256=digest,
        versions={},
        **fields,
    )
    if frames:
        return calibrated(manifest, path, frames)
    manifest.write(path.with_suffix(".json"))
    with load_detector(str(path)) as engine:
        return engine.manifest


def _shape(value: onnx.ValueInfoProto) -> tuple[int | None, ...]:
    """Of an input or output; None where it is dynamic."""
    sides = value.type.tensor_type.shape.dim
    return tuple(side.dim_value if side.HasField("dim_value") else None for side in sides)
