"""Trained weights: the file `trainer export` writes, and the network in torch as an engine.

A weights file holds the engine's manifest and the network's state dict in float32; it is read
without running any code. The shipped ones are in trainer/weights.
"""

import hashlib
import io
from pathlib import Path
from typing import Any
from zipfile import ZIP_DEFLATED, ZipFile

import torch
from pydantic import ValidationError
from torch import Tensor

from engines.base import Engine, Maps, Patches
from engines.errors import first_fault
from engines.loader import most_specific
from engines.manifest import Manifest
from engines.scaling import Plane
from engines.sensor_needs import SensorLike, SensorNeeds
from trainer import registry
from trainer.errors import TrainerError
from trainer.fit_config import DETECTION_THRESHOLD
from trainer.network import UnmixingNetwork
from trainer.tensors import read_tensors

WEIGHTS = Path(__file__).parent / "weights"
BATCH = 64
"""Patches that torch takes at a time, as in the literature."""


class TrainedNetwork(Engine):
    """The network itself, in plain torch float32: the reference for every backend.

    sigma_px: of the sensor, told to a network that asks for it; without, the network's own.
    """

    def __init__(
        self,
        manifest: Manifest,
        network: UnmixingNetwork,
        sigma_px: float | None = None,
        *,
        device: str = "cpu",
        max_batch: int = BATCH,
    ) -> None:
        super().__init__(manifest.model_copy(update={"max_batch": max_batch}))
        self.network, self._device = network.eval().to(device), device
        self._sigma_px = sigma_px or manifest.sigma_px
        self._maps: dict[int, Tensor] = {}

    def _begin(self, slot: int, patch_BHW: Patches) -> None:
        patch = torch.from_numpy(patch_BHW).to(self._device)
        if "sigma" in self.network.planes:
            patch = torch.cat([patch, torch.full_like(patch[:, :1], self._sigma_px)], dim=1)
        with torch.no_grad():
            self._maps[slot] = self.network(patch)

    def _finish(self, slot: int, map_BHW: Maps) -> None:
        map_BHW[...] = self._maps.pop(slot).cpu().numpy()

    def close(self) -> None:
        """Nothing is held that needs releasing."""


def load_trained(
    network: str, weights: Path | None, sensor: SensorLike, shipped: Path = WEIGHTS
) -> TrainedNetwork:
    """The network with weights from a file, or the shipped ones that fit the sensor best.

    A solver has none and needs none. Raises TrainerError if there are none, or they are of another
    network or for another sensor.
    """
    if not registry.network_class(network).trained and weights is None:
        return load_untrained(network, {})
    paths = [weights] if weights is not None else sorted(shipped.glob("*.pt"))
    read = {str(path): read_weights(path) for path in paths}
    own = {place: found for place, found in read.items() if found[0].network == network}
    if weights is not None and not own:
        other = read[str(weights)][0].network
        raise TrainerError(f"{weights}: weights of `{other}`; use --network {other}")
    fitting = [(place, m) for place, (m, _) in own.items() if not m.fits(sensor)]
    if not fitting:
        reasons = [f"{Path(place).name} is {m.fits(sensor)[0]}" for place, (m, _) in own.items()]
        raise TrainerError(
            f"network {network}: no weights for this sensor ({'; '.join(reasons) or 'none shipped'}"
            "); train it, `trainer export` it and name its file with --weights"
        )
    return load_weights(Path(most_specific(fitting)), sensor.sigma_px)


def load_weights(path: Path, sigma_px: float | None = None) -> TrainedNetwork:
    """The network of a weights file; raises TrainerError if it is none, or not whole."""
    manifest, state = read_weights(path)
    network = with_weights(manifest.network, manifest.settings, state)
    return TrainedNetwork(manifest, network, sigma_px)


def load_untrained(name: str, settings: dict[str, Any]) -> TrainedNetwork:
    """A network as it begins, or a solver; for sensors of its σ, no training facts to tell."""
    network = registry.build(name, settings)
    config = network.config
    manifest = Manifest(
        name=name,
        network=name,
        settings=config.model_dump(mode="json"),
        size_px=config.size_px,
        c=config.c,
        planes=engine_planes(network),
        conditions=network.conditions,
        sigma_px=config.sigma_px,
        output=network.output,
        scaling="full_scale",
        sensor=SensorNeeds(sigma_px=config.sigma_px),
        detection_threshold=DETECTION_THRESHOLD,
        separate=0.0,
        profile="none",
        seed=0,
        samples=0,
        training_s=0.0,
        loss=0.0,
        cso_map=0.0,
        parameters=0,
        onnx_sha256=hashlib.sha256().hexdigest(),  # of nothing: there is no model file
        weights_sha256=weights_sha256({}),
        versions={},
    )
    return TrainedNetwork(manifest, network)


def engine_planes(network: UnmixingNetwork) -> tuple[Plane, ...]:
    """What an engine is given of each patch: σ, the same for all, is told it as a condition."""
    return tuple(plane for plane in network.planes if plane != "sigma")


def with_weights(
    network: str, settings: dict[str, Any], state: dict[str, Tensor]
) -> UnmixingNetwork:
    """A network holding these weights; raises TrainerError if they are not its own."""
    built = registry.build(network, settings)
    try:
        built.load_state_dict(state)
    except RuntimeError as error:
        raise TrainerError(
            f"network {network}: the weights do not fit its settings; export them again"
        ) from error
    return built


def write_weights(path: Path, manifest: Manifest, state: dict[str, Tensor]) -> None:
    """Write a weights file, packed: torch reads a deflated archive as well as its own."""
    plain = io.BytesIO()
    torch.save({"manifest": manifest.model_dump(mode="json"), "weights": state}, plain)
    with ZipFile(plain) as archive, ZipFile(path, "w", ZIP_DEFLATED) as packed:
        for item in archive.infolist():
            packed.writestr(item.filename, archive.read(item))


def read_weights(path: Path) -> tuple[Manifest, dict[str, Tensor]]:
    """Read and check a weights file; raises TrainerError if it is not one, or not whole."""
    keys = {"manifest", "weights"}
    data = read_tensors(path, keys, "weights file", "make one of a run with `trainer export`")
    try:
        manifest = Manifest.model_validate(data["manifest"])
    except ValidationError as error:
        raise TrainerError(f"{path}: manifest: {first_fault(error)}; export it again") from error
    if weights_sha256(data["weights"]) != manifest.weights_sha256:
        raise TrainerError(f"{path}: the weights were altered; copy or export them again")
    return manifest, data["weights"]


def weights_sha256(state: dict[str, Tensor]) -> str:
    """Hash over names, shapes and values, whatever the file looks like."""
    digest = hashlib.sha256()
    for name in sorted(state):
        values = state[name].detach().cpu().float().contiguous()
        digest.update(f"{name}{tuple(values.shape)}".encode())
        digest.update(values.numpy().tobytes())
    return digest.hexdigest()
