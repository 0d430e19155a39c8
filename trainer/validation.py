"""What a network is like on patches it never sees: its score, and how sure it is of its answers."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.stats import chi2
from torch import Tensor

from engines.scaling import Plane, Scaling
from engines.spread import Spread
from pipeline.physics.candidates import count_probabilities
from pipeline.physics.cell_targets import CountSpread, cell_probability, count_at_least
from pipeline.physics.groups import MAX_TARGETS, PROFILES, Groups, Profile, draw_patches
from trainer.data import TorchRandom
from trainer.fit_config import VALIDATION_SEED
from trainer.honesty import FEW, mahalanobis, stated_covariances
from trainer.metrics import CsoMap, cso_map, matched_errors
from trainer.network import UnmixingNetwork
from trainer.reading import Reading, detections, read_maps
from trainer.units import to_network_units

_PATCHES_AT_ONCE = 256

SIGMAS = 6
"""Of sensors, in equal ratios, at which a network for a range of them is measured."""


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
    maps, unit = _answers(
        lambda part: averaged(part.to(device)).cpu(), network.planes, profile, scaling, patch
    )
    reading = Reading(network.output, network.config.c, profile.sensor.sigma_px)
    return cso_map(detections(read_maps(maps, unit, reading), samples), _truths(groups))


def measured_spreads(
    network: UnmixingNetwork, profile: Profile, scaling: Scaling, samples: int = 4000
) -> tuple[Spread, ...]:
    """How far the truth scatters about what the network states, at the sensor's σ.

    At several where it is for sensors of a range of σ.
    """
    sigmas_px = [profile.sensor.sigma_px]
    if profile.sigma_range_px is not None:
        sigmas_px = np.geomspace(*profile.sigma_range_px, SIGMAS).round(3).tolist()
    return tuple(
        _measured(network, profile.at_sigma(sigma_px), scaling, samples) for sigma_px in sigmas_px
    )


def _measured(network: UnmixingNetwork, profile: Profile, scaling: Scaling, samples: int) -> Spread:
    sigma_px = profile.sensor.sigma_px
    count = _count_spread(network, profile, scaling, samples)
    stated = Spread(sigma_px=sigma_px, count=count)
    positions, intensities = _squared_errors(network, profile, scaling, stated, samples)
    return Spread(
        sigma_px=sigma_px,
        count=count,
        position=_excess(positions, 2),
        intensity=_excess(intensities, 1),
    )


def _count_spread(
    network: UnmixingNetwork, profile: Profile, scaling: Scaling, samples: int
) -> CountSpread:
    """Maximum likelihood of the true numbers of targets of held-out patches.

    Others than those of `held_out_cso_map`; see `CountSpread`.
    """
    patch, groups = draw_patches(profile, samples, TorchRandom(VALIDATION_SEED + 1))
    maps, _ = _answers(network, network.planes, profile, scaling, patch)
    p = cell_probability(maps, network.config.c)
    row, count = np.arange(samples), groups.count.numpy()

    def surprise(logarithms: NDArray[np.float64]) -> float:
        a, b = np.exp(logarithms)
        right = count_probabilities(count_at_least(p, MAX_TARGETS + 1, (a, b)))[row, count]
        return float(-np.log(np.maximum(right, 1e-9)).mean())

    start = np.log(Spread(sigma_px=profile.sensor.sigma_px).count)
    a, b = np.exp(minimize(surprise, start, method="Nelder-Mead", options={"xatol": 1e-2}).x)
    return round(float(a), 4), round(float(b), 4)


def _squared_errors(
    network: UnmixingNetwork, profile: Profile, scaling: Scaling, stated: Spread, samples: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Squared errors of positions and of intensities over their stated variances.

    Of groups of 1 to FEW targets, `samples` patches of each profile of the sensor.
    """
    positions, intensities = [], []
    for place, judged in enumerate(_as_seen(profile)):
        rng = TorchRandom(VALIDATION_SEED + 4 + place)
        patch, groups = draw_patches(judged, samples, rng, FEW)
        maps, unit = _answers(network, network.planes, judged, scaling, patch)
        reading = Reading(network.output, network.config.c, stated.sigma_px, spread=stated)
        candidates = read_maps(maps, unit, reading).likely
        found, true = detections(candidates, samples), _truths(groups)
        which, error = matched_errors(found, true)
        positions.append(mahalanobis(error[:, :2], stated_covariances(found, which)))
        row = np.searchsorted(candidates.patch, which[:, 0]) + which[:, 1]
        intensity = np.array([true[image][target, 2] for image, _, target in which])
        intensities.append((error[:, 2] * intensity / candidates.intensity_sigma[row]) ** 2)
    return np.concatenate(positions), np.concatenate(intensities)


def _excess(squared: NDArray[np.float64], freedom: int) -> float:
    """By what factor squared errors exceed what is stated of them.

    Between what makes their NEES 1 and what makes 95 % ellipses hold 95 % (geometric mean), since
    the errors are no normal variables.
    """
    if len(squared) == 0:
        return 1.0
    nees, edge = squared.mean() / freedom, np.quantile(squared, 0.95) / chi2.ppf(0.95, freedom)
    return round(float(np.sqrt(nees * edge)), 3)


def _answers(
    run: Callable[[Tensor], Tensor],
    planes: tuple[Plane, ...],
    profile: Profile,
    scaling: Scaling,
    patch: Tensor,
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Maps of measured patches, and the network unit of each (B,), counts."""
    seen = to_network_units(
        patch, profile.sensor, scaling, background=profile.background > 0.0, planes=planes
    )
    with torch.no_grad():
        maps = [run(part) for part in seen.patch.split(_PATCHES_AT_ONCE)]
    return torch.cat(maps).float().numpy(), seen.unit.numpy()


def _as_seen(profile: Profile) -> list[Profile]:
    """The profiles of this one's sensor, but those for training only."""
    sensor = replace(profile.sensor, id="")
    others = [p.at_sigma(sensor.sigma_px) for p in PROFILES.values() if p.sigma_range_px is None]
    return [other for other in others if replace(other.sensor, id="") == sensor]


def _truths(groups: Groups) -> list[NDArray[np.float64]]:
    """Of each image (n, 3): x px, y px, intensity counts."""
    table = np.concatenate([groups.xy_px.numpy(), groups.intensity.numpy()[..., None]], axis=2)
    return [rows[:count] for rows, count in zip(table, groups.count.tolist(), strict=True)]
