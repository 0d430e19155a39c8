"""A trained detector becomes an engine: ONNX model and manifest."""

import tempfile
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

from engines.detector_manifest import DetectorManifest
from engines.detectors import load_detector
from engines.manifest import sha256_of
from trainer.errors import TrainingFailed
from trainer.export import LIBRARIES, write_graph
from trainer.trained import weights_sha256
from trainer.yolo.fit import STRETCH, checked_fit, load_run, trained_network
from trainer.yolo.imported import HELD_OUT_SEED, calibrated
from trainer.yolo.network import STRIDES, YoloNetwork
from trainer.yolo.scenes import CLASSES, MARGIN_PX

HEIGHT, WIDTH = 512, 640
CALIBRATION_FRAMES = 300
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
            candidates=sum((HEIGHT // s) * (WIDTH // s) for s in STRIDES),
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


def _parity(model: Path, network: YoloNetwork) -> float:
    """Largest difference of the engine's answer from torch's, on one drawn frame."""
    rng = np.random.default_rng(HELD_OUT_SEED)
    frame = np.arcsinh(rng.normal(0.0, 3.0, (1, 1, HEIGHT, WIDTH))).astype(np.float32)
    with torch.no_grad():
        wanted = network(torch.from_numpy(frame)).numpy()
    with load_detector(str(model.with_suffix(".json"))) as engine:
        return float(np.abs(engine.infer(frame) - wanted).max())
