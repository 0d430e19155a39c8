"""`trainer compile`: a portable model becomes an engine for one target, if it is as good there.

Several variants may be built (precisions, threads); each is compared with the reference on
held-out patches and timed, and of those that are good enough the fastest is kept. An interrupted
compilation leaves what was there before (trainer/aside.py).
"""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from engines.base import Options
from engines.build import SUFFIX, Batch, Build, Parity, Precision, Target
from engines.errors import EngineError
from engines.loader import misfits, open_engine
from engines.manifest import Manifest, read_manifest, sha256_of
from trainer.aside import aside, move_in
from trainer.errors import TrainerError, TrainingFailed
from trainer.parity import (
    PATCHES,
    HeldOut,
    Reference,
    calibration_patches,
    faults,
    held_out,
    parity,
    reference,
    weights_of,
)
from trainer.targets import BuildFacts
from trainer.timing import timed

CHOICES: dict[Target, tuple[Precision, ...]] = {
    "openvino": ("f32", "bf16", "int8"),
    "torch": ("f32", "bf16"),
    "tensorrt": ("f16",),
    "tensorrt-rtx": ("f16",),
}
"""Precisions tried if none is asked for."""

TAKES: dict[Target, tuple[Precision, ...]] = {
    "openvino": ("f32", "bf16", "int8"),
    "torch": ("f32", "f16", "bf16"),
    "tensorrt": ("f32", "f16", "bf16", "int8"),
    "tensorrt-rtx": ("f32", "f16", "bf16", "int8"),
}


class Variant(NamedTuple):
    """One way to build."""

    precision: Precision
    threads: int | None


class Candidate(NamedTuple):
    """What came of a variant."""

    variant: Variant
    manifest: Manifest
    wrong: list[str]  # why it is not good enough

    @property
    def parity(self) -> Parity | None:
        """None if it could not be run here."""
        assert self.manifest.build is not None  # noqa: S101, always so of a candidate
        return self.manifest.build.parity

    @property
    def p50_ms(self) -> float:
        """At the batch it is tuned for; infinite if it could not be run here."""
        build = self.manifest.build
        assert build is not None  # noqa: S101
        times = [found.p50_ms for found in build.latency if found.batch == build.batch.best]
        return times[0] if times else float("inf")


class Wish(NamedTuple):
    """What is asked for; None: whatever proves best."""

    target: Target
    precision: Precision | None = None
    threads: int | None = None
    batch: int = 16
    max_batch: int = 64
    optimisation_level: int = 3
    patches: int = PATCHES  # to compare on


def compile_model(
    model: Path, wish: Wish, out_dir: Path, tell: Callable[[str], None]
) -> tuple[Manifest, list[Candidate]]:
    """Write NAME.TARGET.json and its model file; → its manifest, and all that was tried.

    Raises EngineError for a model that cannot be used, TrainerError for a wish that cannot be,
    TrainingFailed if nothing was good enough: then nothing is written.
    """
    manifest = _portable(model)
    if wish.precision not in (None, *TAKES[wish.target]):
        raise TrainerError(
            f"--precision {wish.precision}: {wish.target} takes {', '.join(TAKES[wish.target])}"
        )
    name = f"{manifest.name}.{wish.target}"
    with aside(out_dir, name) as folder:
        held = held_out(manifest, wish.patches)
        tell(f"{len(held.patch)} held-out patches of {held.profile.name}")
        wanted = reference(model, manifest, held)
        tell(f"reference: {wanted.name}, CSO-mAP {wanted.cso_map:.4f}")
        candidates = []
        for place, variant in enumerate(_variants(wish)):
            tell(f"building {_said(variant)}")
            path = folder / str(place) / f"{name}.json"
            path.parent.mkdir()
            candidates.append(_candidate(model, manifest, variant, wish, path, held, wanted, tell))
        good = [candidate for candidate in candidates if not candidate.wrong]
        if not good:
            reasons = "; ".join(f"{_said(c.variant)}: {', '.join(c.wrong)}" for c in candidates)
            raise TrainingFailed(f"{name}: not good enough ({reasons}); nothing was written")
        best = min(good, key=lambda candidate: candidate.p50_ms)
        chosen = folder / str(candidates.index(best))
        move_in([chosen / (name + suffix) for suffix in (SUFFIX[wish.target], ".json")], out_dir)
    return best.manifest, candidates


def _portable(model: Path) -> Manifest:
    manifest = read_manifest(model.with_suffix(".json"))
    if manifest.build is not None:
        raise TrainerError(
            f"{model}: is built for {manifest.build.target} already; compile the portable model"
        )
    if not model.is_file() or sha256_of(model) != manifest.onnx_sha256:
        raise EngineError(
            f"{model}: missing, truncated or altered, its manifest says SHA-256 "
            f"{manifest.onnx_sha256[:12]}…; copy or export it again"
        )
    return manifest


def _variants(wish: Wish) -> Sequence[Variant]:
    precisions = (wish.precision,) if wish.precision else CHOICES[wish.target]
    threads: tuple[int | None, ...] = (wish.threads,)
    if wish.threads is None and wish.target == "openvino" and (os.cpu_count() or 1) > 1:
        threads = (None, 1)
    return [Variant(precision, count) for precision in precisions for count in threads]


def _candidate(
    model: Path,
    manifest: Manifest,
    variant: Variant,
    wish: Wish,
    path: Path,
    held: HeldOut,
    wanted: Reference,
    tell: Callable[[str], None],
) -> Candidate:
    """Build a variant beside `path`, its manifest, compare it and time it."""
    batch = Batch(best=min(wish.batch, wish.max_batch), most=wish.max_batch)
    file = path.with_suffix(SUFFIX[wish.target])
    facts = _build(model, manifest, variant, wish, batch, file, tell)
    build = Build(
        target=wish.target,
        model_sha256=sha256_of(file),
        precision=variant.precision,
        batch=batch,
        threads=variant.threads,
        **facts._asdict(),
    )
    made = manifest.model_copy(
        update={"name": path.stem, "max_batch": wish.max_batch, "build": build}
    )
    made.write(path)
    if unfit := misfits(build):
        # A machine without the device may build for it; what it does there is not known yet.
        wrong = [] if wish.target.startswith("tensorrt") else unfit
        tell(f"cannot be run here: {unfit[0]}")
        return Candidate(variant, made, wrong)
    told = Options(sigma_px=held.profile.sensor.sigma_px)
    with open_engine(path, options=told) as engine:
        found = parity(engine, wanted, held)
        times = tuple(timed(engine, size, held.patch) for size in sorted({1, *_sizes(batch)}))
    made = made.model_copy(
        update={"build": build.model_copy(update={"parity": found, "latency": times})}
    )
    made.write(path)
    return Candidate(variant, made, faults(found, variant.precision))


def _build(
    model: Path,
    manifest: Manifest,
    variant: Variant,
    wish: Wish,
    batch: Batch,
    file: Path,
    tell: Callable[[str], None],
) -> BuildFacts:
    if wish.target == "torch":
        from trainer.targets.torch_program import build as build_program
        from trainer.trained import load_weights

        weights = weights_of(model, manifest)
        if weights is None:
            raise TrainerError(
                f"{model}: a torch program is made of the weights; put {model.stem}.pt of "
                "`trainer export` beside it"
            )
        return build_program(load_weights(weights).network, variant.precision, file)
    onnx = _graph(model, manifest, variant.precision, wish.target)
    if wish.target == "openvino":
        from trainer.targets.openvino import build as build_openvino

        return build_openvino(onnx, file)
    from trainer.targets.tensorrt import build as build_tensorrt

    return build_tensorrt(
        onnx,
        file,
        batch,
        library="tensorrt" if wish.target == "tensorrt" else "tensorrt_rtx",
        optimisation_level=wish.optimisation_level,
        progress=tell,
    )


def _graph(model: Path, manifest: Manifest, precision: Precision, target: Target) -> bytes:
    """The ONNX model with the precision in it, as far as the target wants it there."""
    if precision == "f32" or (target == "openvino" and precision != "int8"):
        return model.read_bytes()
    from trainer.precision import quantized, read_model, with_precision

    graph = read_model(model)
    if precision == "int8":
        changed = quantized(graph, _inputs(manifest))
    else:
        changed = with_precision(graph, precision)
    return bytes(changed.SerializeToString(deterministic=True))


def _inputs(manifest: Manifest) -> dict[str, NDArray[np.float32]]:
    """What to calibrate with: the inputs of the graph by name."""
    patch = calibration_patches(manifest)
    told = {"sigma_px": np.array([manifest.sigma_px], np.float32)}
    return {"patch": patch} | {name: told[name] for name in manifest.conditions}


def _sizes(batch: Batch) -> tuple[int, int]:
    return batch.best, batch.most


def _said(variant: Variant) -> str:
    threads = "" if variant.threads is None else f", {variant.threads} thread"
    return variant.precision + threads
