"""Off the grid for any sensor: the small network told σ and how well each pixel is known.

The network of off_grid.py with three planes instead of one. σ acts on every block by a scale and a
shift of its channels (FiLM: Perez et al., AAAI 2018), so that one set of weights deconvolves
narrow and wide PSFs alike.
"""

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from engines.scaling import Plane
from trainer.networks import off_grid

MIDDLE_PX, SPREAD_PX = 0.8, 0.4
"""σ the network is told is measured from here, in these."""

NOISE_FLOOR = 1e-3


class OffGridAny(off_grid.OffGrid):
    """Signal, noise and σ planes (B, 3, n, n) → what is in each cell (B, 7, cn, cn)."""

    planes: ClassVar[tuple[Plane, ...]] = ("signal", "noise", "sigma")

    class Config(off_grid.OffGrid.Config):
        """177,263 parameters, 20 M multiply-adds by default."""

        hidden: int = Field(16, ge=1)

    config: Config

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        n, blocks = config.channels, config.blocks
        self.first = nn.Conv2d(3, n, 3, padding=1)
        self.told = nn.Sequential(
            nn.Linear(1, config.hidden), nn.Tanh(), nn.Linear(config.hidden, 2 * n * blocks)
        )

    def features(self, patch: Tensor) -> Tensor:
        """(B, channels, n, n)."""
        signal, noise, sigma = patch.unbind(dim=1)
        sigma = (sigma - MIDDLE_PX) / SPREAD_PX
        known = torch.log(noise.clamp(min=NOISE_FLOOR)) / 3.0 + 1.0  # about −1 to 1
        told = self.told(sigma[:, :1, 0]).unflatten(1, (len(self.blocks), 2, -1))[..., None, None]
        features = F.relu(self.first(torch.stack([signal, known, sigma], dim=1)))
        for place, block in enumerate(self.blocks):
            features = block(features * (1.0 + told[:, place, 0]) + told[:, place, 1])
        return features


Network = OffGridAny
