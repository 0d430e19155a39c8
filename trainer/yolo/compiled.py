"""`trainer compile` of a detector of frames: built for a target, if it boxes as well there."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from engines.base import Options
from engines.build import SUFFIX, Parity, Precision, Target
from engines.detector_manifest import DetectorManifest, read_detector_manifest
from engines.detectors import load_detector
from engines.frame_detector import FrameDetector
from engines.loader import misfits
from trainer.aside import aside, move_in
from trainer.build import Candidate, Variant, Wish, built, check_portable
from trainer.errors import TrainerError, TrainingFailed
from trainer.parity import faults
from trainer.timing import timed
from trainer.yolo.calibrate import Counted, count_boxes
from trainer.yolo.imported import CALIBRATION_DRAW, HELD_OUT_SEED
from trainer.yolo.scenes import LabelledFrame, draw_frames

CHOICES: dict[Target, tuple[Precision, ...]] = {
    "openvino": ("f32", "bf16"),
    "tensorrt": ("f16",),
    "tensorrt-rtx": ("f16",),
}
FRAMES = 24
FEWER = 0.01
"""Share of the reference's right boxes that a build may miss."""


class Tried(NamedTuple):
    """A build, and what came of it."""

    candidate: Candidate[DetectorManifest]
    right: int = 0  # boxes that hold a point source

    def __str__(self) -> str:
        candidate, build = self.candidate, self.candidate.build
        if build.parity is None:
            return f"{build.precision}: not run here"
        verdict = "; ".join(candidate.wrong) or "good"
        return (
            f"{build.precision}: {candidate.p50_ms:.1f} ms a frame, error "
            f"{build.parity.error:.1e}, {self.right} right boxes: {verdict}"
        )


def is_detector(model: Path) -> bool:
    """True if the manifest beside a model is that of a detector of frames."""
    try:
        format_ = json.loads(model.with_suffix(".json").read_bytes())["format"]
        return bool(format_ == DetectorManifest.model_fields["format"].default)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def compile_detector(
    model: Path, wish: Wish, out_dir: Path, tell: Callable[[str], None]
) -> DetectorManifest:
    """Write NAME.TARGET.json and its model file, the fastest precision that is good enough.

    Compared with the portable model in f32 on drawn frames: answers, and boxes that are right.
    Raises as `compile_model` does.
    """
    manifest = read_detector_manifest(model.with_suffix(".json"))
    check_portable(model, manifest)
    choices = CHOICES.get(wish.target, ())
    if not choices or wish.precision not in (None, "f32", *choices):
        offered = ", ".join(dict.fromkeys(("f32", *choices))) if choices else "none"
        raise TrainerError(
            f"--target {wish.target} --precision {wish.precision}: detectors of frames are built "
            f"for {', '.join(CHOICES)}; there in {offered} (int8 was slower, docs/fusion.md)"
        )
    frames = draw_frames(CALIBRATION_DRAW, FRAMES, HELD_OUT_SEED)
    wanted, reference = _answers(model, frames)
    name = f"{manifest.name}.{wish.target}"
    with aside(out_dir, name) as folder:
        tried = []
        for precision in (wish.precision,) if wish.precision else choices:
            (folder / precision).mkdir()
            path = folder / precision / f"{name}.json"
            variant = Variant(precision, 1, manifest.max_batch, wish.threads)
            made = built(model, manifest, variant, wish._replace(batch=1), path, tell)
            tried.append(_tried(made, frames, wanted, reference))
            tell(str(tried[-1]))
        good = [one.candidate for one in tried if not one.candidate.wrong]
        if not good:
            raise TrainingFailed(
                f"{name}: not good enough ({'; '.join(map(str, tried))}); nothing was written"
            )
        best = min(good, key=lambda one: one.p50_ms)
        move_in([best.path.with_suffix(SUFFIX[wish.target]), best.path], out_dir)
    return best.manifest


def _answers(model: Path, frames: list[LabelledFrame]) -> tuple[NDArray[np.float32], Counted]:
    """The network's raw answers to these frames, and what its boxes are worth."""
    with load_detector(str(model), options=Options(threads=1)) as engine:
        detector = FrameDetector(engine, CALIBRATION_DRAW.sensor.full_scale)
        raw = [engine.infer(detector.inputs(frame.pixels_HW)) for frame in frames]
        return np.concatenate(raw), count_boxes(detector, frames)


def _tried(
    made: Candidate[DetectorManifest],
    frames: list[LabelledFrame],
    wanted: NDArray[np.float32],
    reference: Counted,
) -> Tried:
    """Run and compare what was built, if that can be done here."""
    if unfit := misfits(made.build):
        return Tried(made._replace(wrong=tuple(unfit) if made.build.target == "openvino" else ()))
    answers, counted = _answers(made.path, frames)
    error = float(np.sqrt(np.mean((answers - wanted) ** 2) / np.mean(wanted**2)))
    with load_detector(str(made.path)) as engine:
        latency = timed(engine, 1, np.zeros((1, *made.manifest.patch_shape), np.float32))
    parity = Parity(reference="the portable model, OpenVINO f32", patches=len(answers), error=error)
    wrong = tuple(faults(parity, made.build.precision))
    right, before = int(counted.is_target.sum()), int(reference.is_target.sum())
    if not wrong and right < (1.0 - FEWER) * before:
        wrong = (f"{before} boxes were right before",)
    return Tried(made.with_facts(parity=parity, latency=(latency,))._replace(wrong=wrong), right)
