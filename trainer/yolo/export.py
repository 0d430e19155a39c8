"""A trained detector, or anybody's ONNX of a YOLO, becomes an engine: model and manifest."""

import shutil
import tempfile
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch

from engines.base import Options
from engines.detector_manifest import DetectorManifest
from engines.detectors import load_detector
from engines.frame_detector import FrameDetector
from engines.manifest import sha256_of
from trainer.clutter import KINDS
from trainer.errors import TrainerError, TrainingFailed
from trainer.export import LIBRARIES, write_graph
from trainer.trained import weights_sha256
from trainer.yolo.calibrate import calibration, calibration_error, count_boxes
from trainer.yolo.fit import STRETCH, checked_fit, load_run, trained_network
from trainer.yolo.network import YoloNetwork
from trainer.yolo.scenes import CLASSES, MARGIN_PX, SceneDraw, draw_frames

HEIGHT, WIDTH = 512, 640
CALIBRATION_FRAMES = 300
CALIBRATION_SEED, HELD_OUT_SEED = 800_001, 800_002
"""Of frames; runs are trained with seeds below."""
CALIBRATION_DRAW = SceneDraw(height=256, width=320)
PARITY_TOLERANCE = 1e-3
"""Largest allowed difference from torch: boxes in px, scores."""


def export_yolo(
    checkpoint: Path, out_dir: Path, name: str, frames: int
) -> tuple[DetectorManifest, float]:
    """Write NAME.onnx and NAME.json from the averaged weights of a run, calibrated on `frames`.

    → the manifest and the largest difference from torch. Raises TrainerError for a checkpoint
    that cannot be used, TrainingFailed for an engine that differs; nothing is written then.
    """
    state = load_run(checkpoint)
    config = checked_fit(state["config"], str(checkpoint))
    trained = trained_network(state)
    record = state["records"][-1]
    with tempfile.TemporaryDirectory(dir=out_dir, prefix=".export.") as aside:
        model = Path(aside) / f"{name}.onnx"
        network = trained.as_engine()
        batch = {0: torch.export.Dim("batch", min=1, max=64)}
        write_graph(network, (torch.zeros(2, 1, HEIGHT, WIDTH),), ["patch"], (batch,), model)
        manifest = DetectorManifest(
            name=name,
            classes=CLASSES,
            point_sources=("point", "group"),
            channels=1,
            height=HEIGHT,
            width=WIDTH,
            candidates=sum((HEIGHT // s) * (WIDTH // s) for s in (4, 8)),
            box="xyxy",
            stretch=STRETCH,
            resize=False,
            margin_px=MARGIN_PX,
            max_batch=4,
            data=f"drawn frames over {', '.join(config.kinds)}",
            seed=config.seed,
            samples=int(record["samples"]),
            training_s=record["seconds"],
            loss=record["loss"],
            parameters=sum(parameter.numel() for parameter in network.parameters()),
            onnx_sha256=sha256_of(model),
            weights_sha256=weights_sha256(trained.state_dict()),
            versions={library: version(library) for library in (*LIBRARIES, "libreyolo")},
        )
        manifest = calibrated(manifest, model, frames, config.kinds)
        difference = _parity(model, network)
        if not difference <= PARITY_TOLERANCE:
            raise TrainingFailed(f"{name}: differs from torch by {difference:.1e}; nothing written")
        for suffix in (".onnx", ".json"):
            model.with_suffix(suffix).replace(out_dir / (name + suffix))
    return manifest, difference


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


def _parity(model: Path, network: YoloNetwork) -> float:
    """Largest difference of the engine's answer from torch's, on one drawn frame."""
    rng = np.random.default_rng(HELD_OUT_SEED)
    frame = np.arcsinh(rng.normal(0.0, 3.0, (1, 1, HEIGHT, WIDTH))).astype(np.float32)
    with torch.no_grad():
        wanted = network(torch.from_numpy(frame)).numpy()
    with load_detector(str(model.with_suffix(".json"))) as engine:
        return float(np.abs(engine.infer(frame) - wanted).max())


def import_detector(
    model: Path, out_dir: Path, classes: Sequence[str], frames: int, **fields: Any
) -> DetectorManifest:
    """Copy an ONNX of a YOLO to `out_dir` and write its manifest, calibrated if frames > 0.

    fields: of the manifest, where they are not its defaults. Raises TrainerError for a model that
    is none, EngineError for one the engine cannot run.
    """
    try:
        graph = onnx.load(str(model), load_external_data=False).graph
    except Exception as error:
        raise TrainerError(f"{model}: not a readable ONNX model ({error})") from error
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
        shutil.copyfile(model, path)
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
