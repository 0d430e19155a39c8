"""Off the grid: a small residual network at the resolution of the sensor.

All convolutions are over the sensor's own pixels, and only the last layer's channels are cells, so
it costs a fraction of the unfolded networks. See trainer/cell_network.py for what
it answers and how it is trained.
"""

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from torch.nn import functional as F

from engines.manifest import CHANNELS
from trainer.cell_network import RARE, CellNetwork, Likelihood


class OffGrid(CellNetwork):
    """Patch in network units (B, n, n) → what is in each cell (B, 7 c², n, n)."""

    class Config(BaseModel):
        """170,271 parameters, 20 M multiply-adds by default."""

        model_config = ConfigDict(frozen=True, extra="forbid")
        size_px: int = Field(11, ge=3)
        c: int = 3
        sigma_px: float = 0.5
        channels: int = Field(48, ge=1)
        blocks: int = Field(4, ge=1)
        likelihood: Likelihood = "cells"

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        n = config.channels
        self.first = nn.Conv2d(2, n, 3, padding=1)
        self.blocks = nn.ModuleList(_Block(n) for _ in range(config.blocks))
        self.head = nn.Conv2d(n, CHANNELS * config.c**2, 1)
        with torch.no_grad():
            self.head.weight *= 0.1
            self.head.bias.zero_()  # type: ignore[union-attr]
            self.head.bias[: config.c**2] = RARE  # type: ignore[index]

    def forward(self, patch: Tensor) -> Tensor:
        """See `CellNetwork`."""
        cells: Tensor = self.head(self.features(patch))
        return cells

    def features(self, patch: Tensor) -> Tensor:
        """(B, channels, n, n)."""
        saturated = (patch >= 1.0).to(patch.dtype)
        features = F.relu(self.first(torch.stack([patch, saturated], dim=1)))
        for block in self.blocks:
            features = block(features)
        return features


class _Block(nn.Module):
    """Two convolutions and a skip; begins nearly as the identity."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.inner = nn.Conv2d(channels, channels, 3, padding=1)
        self.outer = nn.Conv2d(channels, channels, 3, padding=1)
        with torch.no_grad():
            self.outer.weight *= 0.1

    def forward(self, features: Tensor) -> Tensor:
        return F.relu(features + self.outer(F.relu(self.inner(features))))


Network = OffGrid
