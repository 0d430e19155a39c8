"""What a network is like on patches it never sees: its score, and how sure its counts are."""

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize

from engines.manifest import UNMEASURED_SPREAD
from engines.scaling import Scaling
from pipeline.physics.candidates import count_probabilities
from pipeline.physics.cell_targets import CountSpread, cell_probability, count_at_least
from pipeline.physics.groups import MAX_TARGETS, Profile, draw_patches
from trainer.data import TorchRandom
from trainer.fit_config import VALIDATION_SEED
from trainer.metrics import CsoMap, cso_map
from trainer.network import UnmixingNetwork
from trainer.reading import Reading, detections, read_maps
from trainer.units import to_network_units

_PATCHES_AT_ONCE = 256


def held_out_cso_map(
    averaged: torch.nn.Module,
    network: UnmixingNetwork,
    profile: Profile,
    scaling: Scaling,
    samples: int,
    device: str,
) -> CsoMap:
    """CSO-mAP of averaged weights on held-out patches of the profile, always the same."""
    patch, groups = draw_patches(profile, samples, TorchRandom(VALIDATION_SEED))
    seen, unit, _ = to_network_units(
        patch, profile.sensor, scaling, background=profile.background > 0.0, planes=network.planes
    )
    with torch.no_grad():
        maps = [averaged(part.to(device)).cpu() for part in seen.split(_PATCHES_AT_ONCE)]
    maps_B = torch.cat(maps).float().numpy()
    reading = Reading(network.output, network.config.c, profile.sensor.sigma_px)
    read = read_maps(maps_B, unit.numpy(), reading)
    true = [
        xy_px[:count]
        for xy_px, count in zip(groups.xy_px.numpy(), groups.count.tolist(), strict=True)
    ]
    return cso_map(detections(read, samples), true)


def measured_count_spread(
    network: UnmixingNetwork, profile: Profile, scaling: Scaling, samples: int = 4000
) -> CountSpread:
    """How far the number of targets scatters about what the network's probabilities add up to.

    Maximum likelihood of the true counts of `samples` held-out patches, other than those of
    `held_out_cso_map`; see `CountSpread`.
    """
    patch, groups = draw_patches(profile, samples, TorchRandom(VALIDATION_SEED + 1))
    seen = to_network_units(
        patch, profile.sensor, scaling, background=profile.background > 0.0, planes=network.planes
    )
    with torch.no_grad():
        parts = [network(part) for part in seen.patch.split(_PATCHES_AT_ONCE)]
    p = cell_probability(torch.cat(parts).numpy(), network.config.c)
    row, count = np.arange(samples), groups.count.numpy()

    def surprise(logarithms: NDArray[np.float64]) -> float:
        a, b = np.exp(logarithms)
        right = count_probabilities(count_at_least(p, MAX_TARGETS + 1, (a, b)))[row, count]
        return float(-np.log(np.maximum(right, 1e-9)).mean())

    start = np.log(UNMEASURED_SPREAD)
    a, b = np.exp(minimize(surprise, start, method="Nelder-Mead", options={"xatol": 1e-2}).x)
    return round(float(a), 4), round(float(b), 4)
