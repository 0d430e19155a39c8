"""`trainer compile` of a detector of frames: built for a target, if it boxes as well there."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from engines.base import Options
from engines.build import SUFFIX, Batch, Build, Parity, Precision, Target
from engines.detector_manifest import DetectorManifest, read_detector_manifest
from engines.detectors import load_detector
from engines.errors import EngineError
from engines.frame_detector import FrameDetector
from engines.loader import misfits
from engines.manifest import sha256_of
from trainer.aside import aside, move_in
from trainer.build import Wish
from trainer.errors import TrainerError, TrainingFailed
from trainer.parity import TOLERANCE
from trainer.targets import BuildFacts
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

    path: Path  # of its manifest
    build: Build
    right: int  # boxes that hold a point source
    wrong: str  # why it is not good enough

    @property
    def p50_ms(self) -> float:
        """Of a frame; infinite where it could not be run here."""
        return self.build.latency[0].p50_ms if self.build.latency else float("inf")

    def __str__(self) -> str:
        parity, build = self.build.parity, self.build
        if parity is None:
            return f"{build.precision}: not run here"
        verdict = self.wrong or "good"
        return (
            f"{build.precision}: {self.p50_ms:.1f} ms a frame, error {parity.error:.1e}, "
            f"{self.right} right boxes: {verdict}"
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
    if manifest.build is not None:
        raise TrainerError(f"{model}: is built already; compile the portable model")
    if not model.is_file() or sha256_of(model) != manifest.onnx_sha256:
        raise EngineError(f"{model}: missing, truncated or altered; export or import it again")
    choices = CHOICES.get(wish.target, ())
    if not choices or wish.precision not in (None, "f32", *choices):
        raise TrainerError(
            f"--target {wish.target} --precision {wish.precision}: detectors of frames are built "
            f"for {', '.join(CHOICES)}, in f32, {', '.join(choices)}"
        )
    frames = draw_frames(CALIBRATION_DRAW, FRAMES, HELD_OUT_SEED)
    wanted, reference = _answers(model, frames)
    name = f"{manifest.name}.{wish.target}"
    with aside(out_dir, name) as folder:
        tried = []
        for precision in (wish.precision,) if wish.precision else choices:
            (folder / precision).mkdir()
            path = folder / precision / f"{name}.json"
            made = _made(model, manifest, precision, wish, path, tell)
            tried.append(_tried(path, made, frames, wanted, reference))
            tell(str(tried[-1]))
        good = [one for one in tried if not one.wrong]
        if not good:
            raise TrainingFailed(
                f"{name}: not good enough ({'; '.join(map(str, tried))}); nothing was written"
            )
        best = min(good, key=lambda one: one.p50_ms).path
        chosen = read_detector_manifest(best)
        move_in([best.with_suffix(SUFFIX[wish.target]), best], out_dir)
    return chosen


def _answers(model: Path, frames: list[LabelledFrame]) -> tuple[NDArray[np.float32], Counted]:
    """The network's raw answers to these frames, and what its boxes are worth."""
    with load_detector(str(model), options=Options(threads=1)) as engine:
        detector = FrameDetector(engine, CALIBRATION_DRAW.sensor.full_scale)
        raw = [engine.infer(detector.inputs(frame.pixels_HW)) for frame in frames]
        return np.concatenate(raw), count_boxes(detector, frames)


def _made(
    model: Path,
    manifest: DetectorManifest,
    precision: Precision,
    wish: Wish,
    path: Path,
    tell: Callable[[str], None],
) -> DetectorManifest:
    """Build beside `path`, where its manifest goes."""
    batch = Batch(best=1, most=manifest.max_batch)
    file = path.with_suffix(SUFFIX[wish.target])
    facts = _built(model, precision, wish, batch, file, tell)
    build = Build(
        target=wish.target,
        model_sha256=sha256_of(file),
        precision=precision,
        batch=batch,
        threads=wish.threads,
        **facts._asdict(),
    )
    made = manifest.model_copy(update={"name": path.stem, "build": build})
    made.write(path)
    return made


def _tried(
    path: Path,
    made: DetectorManifest,
    frames: list[LabelledFrame],
    wanted: NDArray[np.float32],
    reference: Counted,
) -> Tried:
    """Run and compare what was built, if that can be done here."""
    build = made.build
    assert build is not None  # noqa: S101, it was just made
    if unfit := misfits(build):
        return Tried(path, build, 0, "" if build.target != "openvino" else unfit[0])
    answers, counted = _answers(path, frames)
    error = float(np.sqrt(np.mean((answers - wanted) ** 2) / np.mean(wanted**2)))
    with load_detector(str(path)) as engine:
        latency = timed(engine, 1, np.zeros((1, *made.patch_shape), np.float32))
    parity = Parity(reference="the portable model, OpenVINO f32", patches=len(answers), error=error)
    build = build.model_copy(update={"parity": parity, "latency": (latency,)})
    made.model_copy(update={"build": build}).write(path)
    right, before = int(counted.is_target.sum()), int(reference.is_target.sum())
    wrong = ""
    if not error <= TOLERANCE[build.precision]:
        wrong = f"answers differ by {error:.1e}, allowed is {TOLERANCE[build.precision]:.0e}"
    elif right < (1.0 - FEWER) * before:
        wrong = f"{before} boxes were right before"
    return Tried(path, build, right, wrong)


def _built(
    model: Path,
    precision: Precision,
    wish: Wish,
    batch: Batch,
    file: Path,
    tell: Callable[[str], None],
) -> BuildFacts:
    onnx = model.read_bytes()
    if wish.target == "openvino":
        from trainer.targets.openvino import build as build_openvino

        return build_openvino(onnx, file)
    from trainer.precision import read_model, with_precision
    from trainer.targets.tensorrt import build as build_tensorrt

    if precision == "f16" or precision == "bf16":
        changed = with_precision(read_model(model), precision)
        onnx = bytes(changed.SerializeToString(deterministic=True))
    return build_tensorrt(
        onnx,
        file,
        batch,
        library="tensorrt" if wish.target == "tensorrt" else "tensorrt_rtx",
        optimisation_level=wish.optimisation_level,
        progress=tell,
    )
