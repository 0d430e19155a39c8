"""Building one variant of an engine: its model file for a target, and its manifest."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Generic, NamedTuple

import numpy as np
from numpy.typing import NDArray

from engines.base import Kind
from engines.build import SUFFIX, Batch, Build, Precision, Target
from engines.cache import cache_folder
from engines.errors import EngineError
from engines.manifest import EngineManifest, Manifest, sha256_of
from trainer.errors import TrainerError
from trainer.parity import PATCHES, calibration_patches, weights_of
from trainer.targets import BuildFacts

TAKES: dict[Target, tuple[Precision, ...]] = {
    "openvino": ("f32", "bf16", "int8"),
    "torch": ("f32", "f16", "bf16"),
    "tensorrt": ("f32", "f16", "bf16", "int8"),
    "tensorrt-rtx": ("f32", "f16", "bf16", "int8"),
}
"""Precisions there are for a target."""


class Variant(NamedTuple):
    """One way to build."""

    precision: Precision
    streams: int
    most: int  # patches at a time
    threads: int | None

    def __str__(self) -> str:
        streams = f", {self.streams} streams" if self.streams > 1 else ""
        return f"{self.precision}{streams}, {self.most} patches at a time"


class Candidate(NamedTuple, Generic[Kind]):
    """What came of a variant."""

    variant: Variant
    path: Path  # of its manifest
    manifest: Kind
    build: Build
    wrong: tuple[str, ...] = ()  # why it is not good enough

    @property
    def p50_ms(self) -> float:
        """At the batch it is tuned for; infinite if it could not be run here."""
        times = [
            found.p50_ms for found in self.build.latency if found.batch == self.build.batch.best
        ]
        return times[0] if times else float("inf")

    def with_facts(self, **facts: Any) -> "Candidate[Kind]":
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


def check_portable(model: Path, manifest: EngineManifest) -> None:
    """Raise TrainerError if a model is built already, EngineError if it is not whole."""
    if manifest.build is not None:
        raise TrainerError(
            f"{model}: is built for {manifest.build.target} already, and nothing is made of what "
            "is built already; compile the portable model"
        )
    if not model.is_file() or sha256_of(model) != manifest.onnx_sha256:
        raise EngineError(
            f"{model}: missing, truncated or altered, its manifest says SHA-256 "
            f"{manifest.onnx_sha256[:12]}…; copy or export it again"
        )


def built(
    model: Path,
    manifest: Kind,
    variant: Variant,
    wish: Wish,
    path: Path,
    tell: Callable[[str], None],
) -> Candidate[Kind]:
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
    manifest: EngineManifest,
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


def _graph(model: Path, manifest: EngineManifest, precision: Precision, target: Target) -> bytes:
    """The ONNX model with the precision in it, as far as the target wants it there."""
    if precision == "f32" or (target == "openvino" and precision != "int8"):
        return model.read_bytes()
    try:
        from trainer.int8 import quantized
        from trainer.precision import read_model, with_precision
    except ImportError as error:
        raise TrainerError(
            f"--precision {precision}: needs what is not installed ({error}); pip install "
            '"irst-pipeline[train,compile]"'
        ) from error

    graph = read_model(model)
    if precision == "int8":
        if not isinstance(manifest, Manifest):
            raise TrainerError(f"{model}: int8 is for networks that unmix, which can be calibrated")
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
