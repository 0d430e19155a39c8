"""Off the grid for any sensor: the small network told σ and how well each pixel is known.

The network of off_grid.py with three planes instead of one. σ acts on every block by a scale and a
shift of its channels (FiLM: Perez et al., AAAI 2018), so that one set of weights deconvolves
narrow and wide PSFs alike. All patches of a sensor have one σ: an engine is told it once, and what
the network makes of it is constant from then on.
"""

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from engines.manifest import Condition
from engines.scaling import Plane
from trainer.networks import off_grid

MIDDLE_PX, SPREAD_PX = 0.8, 0.4
"""σ the network is told is measured from here, in these."""

NOISE_FLOOR = 1e-3


class OffGridAny(off_grid.OffGrid):
    """Signal, noise and σ planes (B, 3, n, n) → what is in each cell (B, 7 c², n, n)."""

    planes: ClassVar[tuple[Plane, ...]] = ("signal", "noise", "sigma")
    conditions: ClassVar[tuple[Condition, ...]] = ("sigma_px",)

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

    def as_engine(self) -> nn.Module:
        """Told σ once for all patches."""
        return Told(self)

    def features(self, patch: Tensor) -> Tensor:
        """(B, channels, n, n)."""
        return self.features_told(patch[:, :2], patch[:, 2, 0, 0])

    def features_told(self, patch: Tensor, sigma_px: Tensor) -> Tensor:
        """(B, channels, n, n) of signal and noise (B, 2, n, n) and σ (B,), or (1,) of them all."""
        signal, noise = patch.unbind(dim=1)
        sigma = ((sigma_px - MIDDLE_PX) / SPREAD_PX)[:, None]
        known = torch.log(noise.clamp(min=NOISE_FLOOR)) / 3.0 + 1.0  # about −1 to 1
        seen, wide = self.first.weight.split([2, 1], dim=1)
        plane = sigma[..., None, None].expand(-1, 1, *signal.shape[1:])
        features = F.conv2d(torch.stack([signal, known], dim=1), seen, self.first.bias, padding=1)
        features = F.relu(features + F.conv2d(plane, wide, padding=1))
        told = self.told(sigma).unflatten(1, (len(self.blocks), 2, -1))[..., None, None]
        for place, block in enumerate(self.blocks):
            features = block(features * (1.0 + told[:, place, 0]) + told[:, place, 1])
        return features


class Told(nn.Module):
    """The network as an engine runs it: signal and noise (B, 2, n, n), σ (1,) px of all of them."""

    def __init__(self, network: OffGridAny) -> None:
        super().__init__()
        self.network = network

    def forward(self, patch: Tensor, sigma_px: Tensor) -> Tensor:
        """What is in each cell (B, 7 c², n, n)."""
        cells: Tensor = self.network.head(self.network.features_told(patch, sigma_px))
        return cells


Network = OffGridAny
