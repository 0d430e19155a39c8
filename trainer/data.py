"""Training pairs, drawn on the device as the network trains: no disk, no epoch, no repeats."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from engines.scaling import Scaling
from pipeline.physics.grid import target_map
from pipeline.physics.groups import SIZE_PX, Groups, Profile, draw_groups
from pipeline.physics.measurement import measure
from pipeline.physics.psf import render
from trainer.units import to_network_units


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


def training_pairs(
    profile: Profile, number: int, c: int, scaling: Scaling, rng: TorchRandom, *, crowded: bool
) -> tuple[Tensor, Tensor]:
    """`number` patches and their maps, both in network units: (B, n, n), (B, cn, cn).

    crowded: four groups a patch, one in each quadrant at least a pixel from the next. Most of a
    patch is empty and the transforms are local, so a crowded patch teaches nearly four times as
    much; a run starts crowded and ends on patches as the profile has them.
    """
    groups = _crowd(profile, number, rng) if crowded else draw_groups(profile, number, rng)
    mean = profile.background + render(
        groups.xy_px, groups.intensity, (SIZE_PX, SIZE_PX), groups.sigma_px[:, None]
    )
    patch, unit = to_network_units(
        measure(mean, profile.sensor, rng),
        background=profile.background > 0.0,
        scaling=scaling,
        full_scale=profile.sensor.full_scale,
    )
    truth = target_map(groups.xy_px, groups.intensity / unit[:, None], SIZE_PX, c)
    return patch, truth


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
