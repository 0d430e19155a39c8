"""A trained network becomes an engine: ONNX model, manifest, and the weights they came from."""

import logging
import re
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch

from engines.base import Engine, Options
from engines.loader import open_engine
from engines.manifest import NAME_PATTERN, Manifest, sha256_of
from engines.scaling import Scaling
from engines.sensor_needs import SensorNeeds
from pipeline.physics.groups import Profile, draw_patches
from trainer.data import TorchRandom
from trainer.errors import TrainerError, TrainingFailed
from trainer.fit import averaged_weights, load_checkpoint, profile_for, read_log
from trainer.fit_config import DETECTION_THRESHOLD, VALIDATION_SEED, FitConfig, fit_config
from trainer.network import UnmixingNetwork
from trainer.trained import (
    TrainedNetwork,
    engine_planes,
    weights_sha256,
    with_weights,
    write_weights,
)
from trainer.units import to_network_units
from trainer.validation import measured_spreads

PARITY_TOLERANCE = 1e-4
"""Largest allowed difference between the engine's map and torch's, both f32; see `parity`."""

PARITY_PATCHES = 64
READING: dict[Scaling, dict[str, float]] = {
    # The benchmark's own: every cell of 50 or more (of 255) is a target.
    "full_scale": {"detection_threshold": DETECTION_THRESHOLD, "separate": 0.0},
    # Of real sensors, where brightness is unknown and an uncertain target spreads over cells, the
    # local maxima: measured on scenes, at least as good a CSO-mAP with a tenth of the false alarms.
    "peak": {"detection_threshold": 0.3, "separate": 1.0},
}
"""How the pipeline reads a map, by network unit."""

LIBRARIES = ("irst-pipeline", "torch", "onnx", "onnxscript", "openvino")


def export(network: str, checkpoint: Path, out_dir: Path, name: str) -> tuple[Manifest, float]:
    """Write NAME.onnx, NAME.json and NAME.pt from the averaged weights of a run.

    The engine is made in a folder aside, compared with torch, and only then moved to `out_dir`,
    its manifest last. → the manifest, and the largest difference from torch in network units.
    Raises TrainerError for a checkpoint that cannot be used or an engine that differs.
    """
    if not re.match(NAME_PATTERN, name) or name.startswith("."):
        raise TrainerError(f"--name: use letters, digits and _.- only, got {name!r}")
    state = load_checkpoint(checkpoint)
    config = fit_config(state["config"], str(checkpoint))
    if config.network != network:
        raise TrainerError(
            f"{checkpoint}: a run of `{config.network}`; use `trainer export {config.network}`"
        )
    record = read_log(checkpoint.parent, state["step"])[-1]
    weights = {key: value.float() for key, value in averaged_weights(state).items()}
    built = with_weights(network, config.settings, weights).eval()
    out_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out_dir, prefix=".export.") as aside:
        model = Path(aside) / f"{name}.onnx"
        write_onnx(built, model)
        manifest = Manifest(
            name=name,
            **_facts(config, built, record),
            **_sureness(config, built),
            onnx_sha256=sha256_of(model),
            weights_sha256=weights_sha256(weights),
            versions={library: version(library) for library in LIBRARIES},
        )
        manifest.write(model.with_suffix(".json"))
        write_weights(model.with_suffix(".pt"), manifest, weights)
        profile = profile_for(config.profile, built)
        told = Options(sigma_px=profile.sensor.sigma_px)
        with open_engine(model.with_suffix(".json"), options=told) as engine:
            difference = parity(engine, built, profile, config.scaling)
        if not difference <= PARITY_TOLERANCE:
            raise TrainingFailed(
                f"{name}: differs from torch by {difference:.1e}, allowed is "
                f"{PARITY_TOLERANCE:.0e}; nothing was written"
            )
        for suffix in (".onnx", ".pt", ".json"):
            model.with_suffix(suffix).replace(out_dir / (name + suffix))
    return manifest, difference


def write_onnx(network: UnmixingNetwork, path: Path) -> None:
    """The network as one ONNX file: `patch` (B, *patch_shape) → `map` (B, *map_shape), B dynamic.

    Conditions are inputs of shape (1,) beside the patch.
    """
    inputs = ["patch", *network.conditions]
    write_graph(network.as_engine(), example(network), inputs, dynamic_shapes(network), path)


def write_graph(
    network: torch.nn.Module,
    example: tuple[torch.Tensor, ...],
    inputs: list[str],
    shapes: tuple[dict[int, Any] | None, ...],
    path: Path,
) -> None:
    """Any network as one ONNX file with the output `map`; shapes: what is dynamic of each input.

    What the exporter notes about the source code (paths, lines) is left out.
    """
    with _quiet():
        program = torch.onnx.export(
            network.eval(),
            example,
            input_names=inputs,
            output_names=["map"],
            dynamic_shapes=shapes,
            dynamo=True,
            verbose=False,
        )
    assert program is not None  # noqa: S101, always so with dynamo
    model = program.model_proto
    for item in (
        *model.graph.node,
        *model.graph.input,
        *model.graph.output,
        *model.graph.value_info,
    ):
        del item.metadata_props[:]
        item.doc_string = ""
    del model.graph.metadata_props[:]
    onnx.checker.check_model(model, full_check=True)
    path.write_bytes(model.SerializeToString(deterministic=True))


def example(network: UnmixingNetwork) -> tuple[torch.Tensor, ...]:
    """Two patches and the conditions, as an engine of this network is given them."""
    n, planes = network.config.size_px, engine_planes(network)
    shape = (n, n) if planes == ("signal",) else (len(planes), n, n)
    told = torch.tensor([network.config.sigma_px])
    return (torch.zeros(2, *shape), *(told for _ in network.conditions))


def dynamic_shapes(network: UnmixingNetwork) -> tuple[dict[int, Any] | None, ...]:
    """For torch's exporters: any number of patches, one value of each condition."""
    batch = {0: torch.export.Dim("batch", min=1, max=4096)}
    return (batch, *(None for _ in network.conditions))


def parity(engine: Engine, network: UnmixingNetwork, profile: Profile, scaling: Scaling) -> float:
    """Largest difference between the engine's maps and torch's on patches never trained on.

    Relative where torch's value is above 1: off the grid maps hold pixels and sigmas.
    """
    patch, _ = draw_patches(profile, PARITY_PATCHES, TorchRandom(VALIDATION_SEED))
    seen = to_network_units(
        patch,
        profile.sensor,
        scaling,
        background=profile.background > 0.0,
        planes=engine_planes(network),
    )
    patches = seen.patch.float().numpy()
    with TrainedNetwork(engine.manifest, network, profile.sensor.sigma_px) as reference:
        wanted = reference.infer(patches)
    difference = np.abs(engine.infer(patches) - wanted) / np.maximum(1.0, np.abs(wanted))
    return float(difference.max())


def sensor_needs(profile: Profile, scaling: Scaling) -> SensorNeeds:
    """What a network trained on this profile asks of a sensor.

    Always its σ, or the range of those it was told; its full scale if that is the unit; and no
    noise if it has never seen any.
    """
    sensor = profile.sensor
    return SensorNeeds(
        sigma_px=None if profile.sigma_range_px else sensor.sigma_px,
        sigma_range_px=profile.sigma_range_px,
        full_scale=sensor.full_scale if scaling == "full_scale" else None,
        noiseless=True if sensor.noiseless else None,
    )


def _facts(config: FitConfig, network: UnmixingNetwork, record: dict[str, float]) -> dict[str, Any]:
    """What the run says about the engine."""
    return {
        "network": config.network,
        "settings": network.config.model_dump(mode="json"),
        "size_px": network.config.size_px,
        "c": network.config.c,
        "planes": engine_planes(network),
        "conditions": network.conditions,
        "output": network.output,
        "sigma_px": network.config.sigma_px,
        "scaling": config.scaling,
        "sensor": sensor_needs(profile_for(config.profile, network), config.scaling),
        **READING[config.scaling],
        "profile": config.profile,
        "seed": config.seed,
        "samples": int(record["samples"]),
        "training_s": record["seconds"],
        "loss": record["loss"],
        "cso_map": record["cso_map"],
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
    }


def _sureness(config: FitConfig, network: UnmixingNetwork) -> dict[str, Any]:
    """How sure the network's answers are, of one that counts."""
    if network.output != "cell-targets":
        return {}
    profile = profile_for(config.profile, network)
    return {"spreads": measured_spreads(network, profile, config.scaling)}


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep back what torch's exporter says of itself: no torchvision, its own deprecated calls."""
    logger = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)`", FutureWarning)
            yield
    finally:
        logger.setLevel(level)
