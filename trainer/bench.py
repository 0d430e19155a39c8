"""`trainer bench`: how fast a network is on every backend and precision this machine has.

Method. All in one run, one after another: the network in plain eager PyTorch float32, as its file
in trainer/networks writes it, on the GPU if there is one; then each target and precision that runs
here, built as `trainer compile` builds them, but not compared for parity. Each is called for some
seconds with every batch size; p50 and p99 are of one call, patches/s from p50. The rival is the
plain network at the same batch size.
"""

import os
import platform
import tempfile
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch

from engines.base import Engine, Options
from engines.errors import EngineError
from engines.loader import MODELS, misfits, open_engine, resolve
from engines.manifest import Manifest, read_manifest, sha256_of
from pipeline.physics.sensor import Sensor
from trainer.build import TAKES, Variant, Wish, built
from trainer.errors import TrainerError
from trainer.export import write_onnx
from trainer.parity import held_out, weights_of
from trainer.targets import cpu_name
from trainer.timing import timed
from trainer.trained import (
    TrainedNetwork,
    load_untrained,
    load_weights,
    weights_sha256,
    write_weights,
)

PLAIN = "plain PyTorch f32"
TILE = 16
"""Patches at a time where a CPU computes two batches side by side."""

BATCHES = (1, 4, 16, 64, 256, 1024)
Show = Callable[[str], None]


class Row(NamedTuple):
    """One measurement."""

    network: str
    runs: str  # PLAIN, or target and precision
    batch: int
    p50_ms: float
    p99_ms: float
    patches_per_s: float
    ratio: float  # of patches/s to PLAIN at the same batch


class Subject(NamedTuple):
    """A network to measure: its portable model, and itself."""

    model: Path
    manifest: Manifest
    network: TrainedNetwork


def shipped(name: str) -> Subject:
    """A shipped engine by name; raises TrainerError if its weights are not there."""
    path = resolve(name, Sensor(), MODELS)
    manifest = read_manifest(path)
    weights = weights_of(path.with_suffix(".onnx"), manifest)
    if manifest.build is not None or weights is None:
        raise TrainerError(f"--engine {name}: has no weights of its own; name the portable one")
    return Subject(path.with_suffix(".onnx"), manifest, load_weights(weights))


def untrained(name: str, folder: Path) -> Subject:
    """A network at its full size as it begins: how fast it is does not depend on its weights."""
    network = load_untrained(name, {})
    model = folder / f"{name}.onnx"
    write_onnx(network.network, model)
    state = network.network.state_dict()
    facts = {"onnx_sha256": sha256_of(model), "weights_sha256": weights_sha256(state)}
    manifest = network.manifest.model_copy(update={"profile": "csist-100k", **facts})
    manifest.write(model.with_suffix(".json"))
    write_weights(model.with_suffix(".pt"), manifest, state)
    return Subject(model, manifest, network)


def bench(
    subjects: Sequence[Subject], batches: Sequence[int], seconds: float, show: Show
) -> list[Row]:
    """Every subject on everything that runs here."""
    rows = []
    for subject in subjects:
        patch = held_out(subject.manifest, 64).patch
        plain: dict[int, float] = {}
        for runs, engine in _engines(subject, max(batches), show):
            with engine:
                for batch in batches:
                    found = timed(engine, batch, patch, seconds)
                    rate = batch / found.p50_ms * 1e3
                    plain.setdefault(batch, rate)
                    ratio = rate / plain[batch]
                    name = subject.manifest.name
                    rows.append(Row(name, runs, batch, found.p50_ms, found.p99_ms, rate, ratio))
                    show(f"{name}, {runs}, B = {batch}: {rate:.0f} patches/s, × {ratio:.2f}")
    return rows


def _engines(subject: Subject, most: int, show: Show) -> Iterator[tuple[str, Engine]]:
    """What runs the subject here, the plain network first."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    network = subject.network.network
    yield PLAIN, TrainedNetwork(subject.manifest, network, device=device, max_batch=most)
    network.cpu()
    told = Options(sigma_px=subject.manifest.sigma_px)
    with tempfile.TemporaryDirectory(prefix="irst-") as folder:
        for target, precisions in TAKES.items():
            streams = (1, 2) if target == "openvino" and (os.cpu_count() or 1) > 1 else (1,)
            for precision, number in product(precisions, streams):
                runs = f"{target} {precision}" + (f", {number} streams" if number > 1 else "")
                path = (
                    Path(folder)
                    / f"{subject.manifest.name}.{len(list(Path(folder).iterdir()))}.json"
                )
                wish = Wish(target, precision, batch=min(16, most), max_batch=most)
                variant = Variant(precision, number, min(TILE, most) if number > 1 else most, None)
                try:
                    made = built(subject.model, subject.manifest, variant, wish, path, show)
                    if unfit := misfits(made.build):
                        show(f"{runs}: not here: {unfit[0]}")
                        if target.startswith("tensorrt"):
                            break  # nor any other precision
                        continue
                    engine = open_engine(path, options=told)
                except (EngineError, TrainerError) as error:
                    show(f"{runs}: not here: {error}")
                    continue
                yield runs, engine


def machine() -> dict[str, Any]:
    """What it was measured on."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "gpu": gpu,
        "torch": torch.__version__,
        "torch_threads": torch.get_num_threads(),
        "python": platform.python_version(),
    }
