"""Training pairs: drawn on the device as the network trains, or taken from a fixed dataset."""

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engines.scaling import Scaling
from pipeline.formats.csist import CsistDataset, read_csist
from pipeline.physics.groups import SIZE_PX, Groups, Profile, draw_groups
from pipeline.physics.measurement import measure
from pipeline.physics.psf import render
from trainer.errors import TrainerError
from trainer.fit_config import FitConfig
from trainer.network import UnmixingNetwork
from trainer.units import to_network_units

BLIND_MARGIN_PX = 2


class TorchRandom:
    """`pipeline.physics.arrays.Random` over a torch generator: float32 tensors on its device."""

    def __init__(self, seed: int, device: str | torch.device = "cpu") -> None:
        self.generator = torch.Generator(device).manual_seed(seed)

    def uniform(self, shape: Sequence[int]) -> Tensor:
        """Uniform in [0, 1), float32."""
        return torch.rand(tuple(shape), generator=self.generator, device=self.generator.device)

    def normal(self, shape: Sequence[int]) -> Tensor:
        """Standard normal, float32."""
        return torch.randn(tuple(shape), generator=self.generator, device=self.generator.device)


class Pairs(Protocol):
    """Where a run's pairs come from: patches (B, n, n) and truths (B, …), network units."""

    def initial(self, number: int) -> tuple[Tensor, Tensor]:
        """Pairs for `fit_initial`, at most `number`."""

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """The batch of a step; steps are asked for in order."""


class DrawnPairs:
    """Drawn as the network trains: no disk, no epoch, no repeats.

    The first `crowded_share` of the run is on crowded patches. For a range of sensors each batch
    is of another σ, uniform in its logarithm.
    """

    def __init__(
        self, config: FitConfig, profile: Profile, network: UnmixingNetwork, rng: TorchRandom
    ) -> None:
        self._config, self._profile, self._network, self._rng = config, profile, network, rng

    def initial(self, number: int) -> tuple[Tensor, Tensor]:
        """`number` pairs as the profile has them."""
        return self._draw(number, crowded=False)

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """The next pairs of the generator."""
        config = self._config
        return self._draw(config.batch, crowded=step < config.crowded_share * config.steps)

    def _draw(self, number: int, *, crowded: bool) -> tuple[Tensor, Tensor]:
        profile = self._profile
        if profile.sigma_range_px is not None:
            low, high = profile.sigma_range_px
            share = float(self._rng.uniform((1,)))
            profile = profile.at_sigma(low * (high / low) ** share)
        return training_pairs(
            profile, number, self._network, self._config.scaling, self._rng, crowded=crowded
        )


class DatasetPairs:
    """A CSIST dataset, held on the device: epoch after epoch, each in an order of its own.

    The order of an epoch follows from seed and epoch alone, so a batch follows from its step.
    Raises TrainerError for a dataset without images or of another sensor than the profile's.
    """

    def __init__(
        self, config: FitConfig, profile: Profile, network: UnmixingNetwork, device: str
    ) -> None:
        path = Path(str(config.dataset))
        dataset = read_csist(path)
        _check_sensor(path, dataset, profile)
        self._config, self._profile, self._network = config, profile, network
        self._patch = torch.tensor(dataset.image.astype(np.float32), device=device)
        self._xy_px = torch.tensor(dataset.target_xy_px, device=device).nan_to_num(0.0)
        self._intensity = torch.tensor(dataset.target_intensity, device=device).nan_to_num(0.0)

    def initial(self, number: int) -> tuple[Tensor, Tensor]:
        """The first pairs of the first epoch, no more than there are."""
        return self._pairs(0, min(number, len(self._patch)))

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """The next pairs of the epoch; where it ends, the next one begins."""
        return self._pairs(step * self._config.batch, self._config.batch)

    def _pairs(self, start: int, number: int) -> tuple[Tensor, Tensor]:
        """`number` pairs after `start` others."""
        images = len(self._patch)
        epoch, place = np.divmod(np.arange(start, start + number), images)
        orders = [
            epoch_order(self._config.seed, int(e), images)[place[epoch == e]]
            for e in np.unique(epoch)
        ]
        rows = torch.from_numpy(np.concatenate(orders)).to(self._patch.device)
        return in_network_units(
            self._patch[rows],
            self._xy_px[rows],
            self._intensity[rows],
            self._profile,
            self._network,
            self._config.scaling,
        )


@lru_cache(maxsize=2)
def epoch_order(seed: int, epoch: int, images: int) -> NDArray[np.int64]:
    """In which order an epoch takes the images, from the random stream (seed, epoch)."""
    return np.random.default_rng([seed, epoch]).permutation(images)


def _check_sensor(path: Path, dataset: CsistDataset, profile: Profile) -> None:
    """What a network depends on and what its engine's manifest says must be the profile's."""
    if len(dataset) == 0:
        raise TrainerError(f"{path}: has no images; generate one with --count 1 or more")
    rules = (
        ("sigma_px", dataset.sensor.sigma_px, profile.sensor.sigma_px),
        ("full_scale", dataset.sensor.full_scale, profile.sensor.full_scale),
        ("noiseless", dataset.sensor.noiseless, profile.sensor.noiseless),
        ("a background", dataset.background > 0.0, profile.background > 0.0),
    )
    for name, found, wanted in rules:
        if found != wanted:
            raise TrainerError(
                f"{path}: {name} is {found}, profile {profile.name} has {wanted}; set the profile "
                "(and for σ the network's sigma_px) that the dataset is of"
            )


def training_pairs(
    profile: Profile,
    number: int,
    network: UnmixingNetwork,
    scaling: Scaling,
    rng: TorchRandom,
    *,
    crowded: bool,
) -> tuple[Tensor, Tensor]:
    """`number` patches as the network sees them, and what it is to make of them.

    crowded: four groups a patch, one in each quadrant at least a pixel from the next. Most of a
    patch is empty and the transforms are local, so a crowded patch teaches nearly four times as
    much; a run starts crowded and ends on patches as the profile has them. Groups too wide for a
    quadrant are drawn one a patch.
    """
    fits = 2.0 * profile.half_width_px <= SIZE_PX // 2 / 2.0
    groups = _crowd(profile, number, rng) if crowded and fits else draw_groups(profile, number, rng)
    mean = profile.background + render(
        groups.xy_px, groups.intensity, (SIZE_PX, SIZE_PX), groups.sigma_px[:, None]
    )
    patch = measure(mean, profile.sensor, rng)
    usable = draw_usable(number, profile.blind_share, rng) if profile.blind_share else None
    return in_network_units(
        patch, groups.xy_px, groups.intensity, profile, network, scaling, usable
    )


def in_network_units(
    patch_BHW: Tensor,
    xy_px: Tensor,
    intensity: Tensor,
    profile: Profile,
    network: UnmixingNetwork,
    scaling: Scaling,
    usable_BHW: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Measured patches (B, n, n) and their targets, in counts → the pairs a network learns.

    xy_px (B, K, 2) px and intensity (B, K) counts, padded with zero.
    """
    seen = to_network_units(
        patch_BHW,
        profile.sensor,
        scaling,
        background=profile.background > 0.0,
        planes=network.planes,
        usable_BHW=usable_BHW,
    )
    return seen.patch, network.truth(xy_px, intensity / seen.unit[:, None])


def draw_usable(number: int, share: float, rng: TorchRandom) -> Tensor:
    """Usable pixels (B, n, n): in `share` of the patches one or two of the inner ones are not."""
    inner = SIZE_PX - 2 * BLIND_MARGIN_PX
    place = BLIND_MARGIN_PX + torch.floor(inner * rng.uniform((number, 2, 2))).long()
    chance = rng.uniform((number,))
    usable = torch.ones(number, SIZE_PX, SIZE_PX, dtype=torch.bool, device=chance.device)
    for pixel, blind in enumerate((chance < share, chance < share / 2.0)):
        rows = torch.nonzero(blind)[:, 0]
        usable[rows, place[rows, pixel, 1], place[rows, pixel, 0]] = False
    return usable


def _crowd(profile: Profile, number: int, rng: TorchRandom) -> Groups:
    quarter = replace(profile, pixel_range=(0, SIZE_PX // 2 - 1))
    groups = draw_groups(quarter, 4 * number, rng)
    step = SIZE_PX // 2 + 1
    corner = torch.tensor([[0, 0], [step, 0], [0, step], [step, step]], device=groups.xy_px.device)
    present = groups.intensity.reshape(4, number, -1, 1) > 0
    xy_px = groups.xy_px.reshape(4, number, -1, 2) + corner[:, None, None, :] * present
    return Groups(
        count=groups.count.reshape(4, number).sum(dim=0),
        xy_px=xy_px.transpose(0, 1).flatten(1, 2),
        intensity=groups.intensity.reshape(4, number, -1).transpose(0, 1).flatten(1, 2),
        sigma_px=groups.sigma_px[:number],
    )
