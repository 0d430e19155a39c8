"""`trainer compile`: a portable model becomes an engine for one target, if it is as good there.

Several variants are built (precisions, streams, patches at a time) and timed. From the fastest on
they are compared with the reference on held-out patches, and the first that is good enough is kept.
An interrupted compilation leaves what was there before (trainer/aside.py).
"""

import os
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from engines.base import Options
from engines.build import SUFFIX, Batch, Build, Precision, Target
from engines.cache import cache_folder
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


TILES = (4, 8, 16)
"""Patches at a time tried on a CPU: few keep what a layer hands to the next in its cache."""

MANY = 64
"""Patches that are timed besides one and the batch it is tuned for."""

TIMED_S = 0.3
"""For each of them, of each variant."""


class Variant(NamedTuple):
    """One way to build."""

    precision: Precision
    streams: int
    most: int  # patches at a time
    threads: int | None

    def __str__(self) -> str:
        streams = f", {self.streams} streams" if self.streams > 1 else ""
        return f"{self.precision}{streams}, {self.most} patches at a time"


class Candidate(NamedTuple):
    """What came of a variant."""

    variant: Variant
    path: Path  # of its manifest
    manifest: Manifest
    build: Build
    wrong: tuple[str, ...] = ()  # why it is not good enough

    @property
    def p50_ms(self) -> float:
        """At the batch it is tuned for; infinite if it could not be run here."""
        times = [
            found.p50_ms for found in self.build.latency if found.batch == self.build.batch.best
        ]
        return times[0] if times else float("inf")

    def with_facts(self, **facts: Any) -> "Candidate":
        """With what was found out about the build, in its manifest too."""
        build = self.build.model_copy(update=facts)
        manifest = self.manifest.model_copy(update={"build": build})
        manifest.write(self.path)
        return self._replace(build=build, manifest=manifest)


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
        candidates = []
        for place, variant in enumerate(_variants(wish)):
            path = folder / str(place) / f"{name}.json"
            path.parent.mkdir()
            candidates.append(_timed(built(model, manifest, variant, wish, path, tell), held, tell))
        tell("comparing with the reference")
        wanted = reference(model, manifest, held)
        tell(f"{wanted.name}: CSO-mAP {wanted.cso_map:.4f} on {len(held.patch)} patches")
        candidates.sort(key=lambda candidate: candidate.p50_ms)
        best = _first_good(candidates, wanted, held)
        if best is None:
            reasons = dict.fromkeys(
                f"{c.variant.precision}: {'; '.join(c.wrong)}" for c in candidates
            )
            raise TrainingFailed(
                f"{name}: not good enough ({', '.join(reasons)}); nothing was written"
            )
        files = [best.path.with_suffix(suffix) for suffix in (SUFFIX[wish.target], ".json")]
        move_in(files, out_dir)
    return best.manifest, candidates


def _first_good(candidates: list[Candidate], wanted: Reference, held: HeldOut) -> Candidate | None:
    """The first of them that is as good as the reference; what was found of each is put in.

    One that fails speaks for all of its precision: their maps are the same.
    """
    failed: dict[Precision, tuple[str, ...]] = {}
    for place, candidate in enumerate(candidates):
        precision = candidate.variant.precision
        if precision not in failed:
            compared = candidates[place] = _compared(candidate, wanted, held)
            if not compared.wrong:
                return compared
            failed[precision] = compared.wrong
        candidates[place] = candidates[place]._replace(wrong=failed[precision])
    return None


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


def _variants(wish: Wish) -> list[Variant]:
    precisions = (wish.precision,) if wish.precision else CHOICES[wish.target]
    streams, sizes = [1], [wish.max_batch]
    if wish.target == "openvino":
        streams = [1, 2] if (wish.threads or os.cpu_count() or 1) > 1 else [1]
        sizes = [size for size in TILES if size < wish.max_batch] + [wish.max_batch]
    return [Variant(*each, wish.threads) for each in product(precisions, streams, sizes)]


def _timed(candidate: Candidate, held: HeldOut, tell: Callable[[str], None]) -> Candidate:
    """With its latency, if it can be run here."""
    if unfit := misfits(candidate.build):
        tell(f"cannot be run here: {unfit[0]}")
        # A machine without the device may build for it; what it does there is not known yet.
        builds_blind = candidate.build.target.startswith("tensorrt")
        return candidate._replace(wrong=() if builds_blind else tuple(unfit))
    batch = candidate.build.batch
    with open_engine(candidate.path, options=_told(held)) as engine:
        sizes = sorted({1, batch.best, MANY})
        return candidate.with_facts(
            latency=tuple(timed(engine, size, held.patch, TIMED_S) for size in sizes)
        )


def _compared(candidate: Candidate, wanted: Reference, held: HeldOut) -> Candidate:
    """With its parity, and what is wrong with it, if it can be run here."""
    if not candidate.build.latency:
        return candidate
    with open_engine(candidate.path, options=_told(held)) as engine:
        found = parity(engine, wanted, held)
    wrong = tuple(faults(found, candidate.build.precision))
    return candidate.with_facts(parity=found)._replace(wrong=wrong)


def _told(held: HeldOut) -> Options:
    return Options(sigma_px=held.profile.sensor.sigma_px)


def built(
    model: Path,
    manifest: Manifest,
    variant: Variant,
    wish: Wish,
    path: Path,
    tell: Callable[[str], None],
) -> Candidate:
    """Write a model file and its manifest, NAME.TARGET.json, neither timed nor compared yet."""
    tell(f"building {variant}")
    batch = Batch(best=wish.batch, most=max(variant.most, wish.batch))
    file = path.with_suffix(SUFFIX[wish.target])
    facts = _build(model, manifest, variant, wish, batch, file, tell)
    build = Build(
        target=wish.target,
        model_sha256=sha256_of(file),
        precision=variant.precision,
        batch=batch,
        threads=variant.threads,
        streams=variant.streams,
        **facts._asdict(),
    )
    made = manifest.model_copy(
        update={"name": path.stem, "max_batch": variant.most, "build": build}
    )
    made.write(path)
    return Candidate(variant, path, made, build)


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
        cache=cache_folder(wish.target),
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
        if target.startswith("tensorrt"):  # what is not int8 need not be float32
            changed = with_precision(changed, "f16")
    else:
        changed = with_precision(graph, precision)
    return bytes(changed.SerializeToString(deterministic=True))


def _inputs(manifest: Manifest) -> dict[str, NDArray[np.float32]]:
    """What to calibrate with: the inputs of the graph by name."""
    patch = calibration_patches(manifest)
    told = {"sigma_px": np.array([manifest.sigma_px], np.float32)}
    return {"patch": patch} | {name: told[name] for name in manifest.conditions}
