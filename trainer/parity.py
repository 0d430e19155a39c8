"""Is a built engine as good as the network it was built from? Compared on held-out patches.

A network for sensors of a range of σ is compared at both ends of the range too: the ranges of its
activations, and with them what int8 makes of it, depend on σ.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from engines.base import Engine, Options
from engines.build import Parity
from engines.loader import open_engine
from engines.manifest import EngineManifest, Manifest
from pipeline.physics.groups import PROFILES, Profile, draw_patches
from trainer.data import TorchRandom
from trainer.errors import TrainerError
from trainer.fit_config import VALIDATION_SEED
from trainer.metrics import cso_map
from trainer.reading import Reading, detections, read_maps
from trainer.trained import WEIGHTS, load_weights, read_weights
from trainer.units import to_network_units

PATCHES = 2000
CALIBRATION_PATCHES = 512

CSO_MAP_TOLERANCE = 0.003
"""By how much the CSO-mAP of an engine may be lower than its reference's."""

TOLERANCE = {"f32": 1e-4, "f16": 1e-2, "bf16": 5e-2, "int8": 2e-1}
"""Largest error of the maps: rms of the difference over rms of the reference's."""


class HeldOut(NamedTuple):
    """Patches no network has seen, as an engine is given them, and what is in them."""

    patch: NDArray[np.float32]
    unit: NDArray[np.float32]  # (N,) counts
    true: list[NDArray[np.float64]]  # of each patch (K, 2) px
    profile: Profile

    @property
    def sigma_px(self) -> float:
        """Of the sensor's PSF."""
        return self.profile.sensor.sigma_px


class Reference(NamedTuple):
    """What engines are compared with."""

    name: str
    held: HeldOut
    maps: NDArray[np.float32]
    cso_map: float


def profile_of(manifest: Manifest, sigma_px: float) -> Profile:
    """The profile a network was trained on, for a σ; raises TrainerError if there is none."""
    if manifest.profile not in PROFILES:
        raise TrainerError(
            f"engine {manifest.name}: profile `{manifest.profile}` cannot be drawn; parity is "
            f"measured on {', '.join(PROFILES)}"
        )
    profile = PROFILES[manifest.profile]
    return profile.at_sigma(sigma_px) if profile.sigma_spread else profile


def held_out(
    manifest: Manifest, number: int, sigma_px: float | None = None, seed: int = VALIDATION_SEED + 2
) -> HeldOut:
    """Drawn from a stream of its own: neither training nor validation sees these.

    sigma_px: of the sensor, the network's own if it is not given.
    """
    profile = profile_of(manifest, sigma_px or manifest.sigma_px)
    patch, groups = draw_patches(profile, number, TorchRandom(seed))
    seen = to_network_units(
        patch,
        profile.sensor,
        manifest.scaling,
        background=profile.background > 0.0,
        planes=manifest.planes,
    )
    true = [
        xy_px[:count]
        for xy_px, count in zip(groups.xy_px.numpy(), groups.count.tolist(), strict=True)
    ]
    return HeldOut(seen.patch.float().numpy(), seen.unit.float().numpy(), true, profile)


def calibration_patches(manifest: Manifest) -> NDArray[np.float32]:
    """What an int8 model's ranges are measured on."""
    return held_out(manifest, CALIBRATION_PATCHES, seed=VALIDATION_SEED + 3).patch


def references(model: Path, manifest: Manifest, number: int) -> list[Reference]:
    """At the σ the network is for; of a range of them at its own and at both ends."""
    ends_px = manifest.sensor.sigma_range_px or ()
    sigmas_px = sorted({manifest.sigma_px, *ends_px})
    return [reference(model, manifest, held_out(manifest, number, each)) for each in sigmas_px]


def reference(model: Path, manifest: Manifest, held: HeldOut) -> Reference:
    """The network in torch f32 if its weights are beside the model or shipped.

    Otherwise the portable model in OpenVINO f32, which was compared with torch when exported.
    """
    weights = weights_of(model, manifest)
    if weights is not None:
        name = f"torch {torch.__version__} f32"
        engine: Engine = load_weights(weights, held.sigma_px)
    else:
        name = "the portable model, OpenVINO f32"
        engine = open_engine(model.with_suffix(".json"), options=Options(sigma_px=held.sigma_px))
    with engine:
        maps = engine.infer(held.patch)
    return Reference(name, held, maps, scored(maps, manifest, held))


def weights_of(model: Path, manifest: EngineManifest) -> Path | None:
    """The weights file of the very network a model was exported from."""
    beside = model.with_suffix(".pt")
    for path in (beside, WEIGHTS / f"{manifest.name}.pt", *sorted(WEIGHTS.glob("**/*.pt"))):
        if path.is_file() and read_weights(path)[0].weights_sha256 == manifest.weights_sha256:
            return path
    return None


def scored(maps: NDArray[np.float32], manifest: Manifest, held: HeldOut) -> float:
    """CSO-mAP of these maps."""
    read = read_maps(maps, held.unit, Reading.of(manifest, held.profile.sensor))
    return float(cso_map(detections(read, len(maps)), held.true).mean)


def parity(engine: Engine, wanted: Reference) -> Parity:
    """How near the engine's maps are to the reference's, and what both score."""
    maps = engine.infer(wanted.held.patch)
    finite = bool(np.isfinite(maps).all())
    difference = np.sqrt(np.mean((maps - wanted.maps) ** 2)) if finite else 1e9
    return Parity(
        reference=wanted.name,
        patches=len(maps),
        sigma_px=wanted.held.sigma_px,
        error=float(difference / np.sqrt(np.mean(wanted.maps**2))),
        cso_map=scored(maps, engine.manifest, wanted.held) if finite else 0.0,
        reference_cso_map=wanted.cso_map,
    )


def faults(found: Parity, precision: str) -> list[str]:
    """Why an engine is not good enough, a line each; empty if it is."""
    wrong = []
    if not found.error <= TOLERANCE[precision]:
        wrong.append(f"maps differ by {found.error:.1e}, allowed is {TOLERANCE[precision]:.0e}")
    if found.loss > CSO_MAP_TOLERANCE:
        wrong.append(
            f"CSO-mAP {found.cso_map:.4f} is {found.loss:.4f} lower, allowed is {CSO_MAP_TOLERANCE}"
        )
    at = "" if found.sigma_px is None else f" at σ {found.sigma_px:g} px"
    return [fault + at for fault in wrong]
