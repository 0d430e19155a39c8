"""DISTA-Net's unfolding, answering off the grid.

The paper's stages as they are (trainer/networks/dista_net.py), their last map read by two
convolutions that say of each cell what is in it. At full size it is for the GPU: 30 times the
multiply-adds of `off_grid`.
"""

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from engines.manifest import CHANNELS
from pipeline.physics.grid import target_map
from trainer.cell_network import RARE, CellNetwork, Likelihood
from trainer.networks.dista_net import DistaNet


class DistaOffGrid(CellNetwork):
    """Patch in network units (B, n, n) → what is in each cell (B, 7 c², n, n)."""

    class Config(DistaNet.Config):
        """2,217,703 parameters by default: the paper's stages, 64 channels to read them."""

        read_channels: int = Field(64, ge=1)
        likelihood: Likelihood = "cells"

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.unfolded = DistaNet(config)
        n = config.read_channels
        self.first = nn.Conv2d(2, n, 3, padding=1)
        self.second = nn.Conv2d(n, n, 3, padding=1)
        self.head = nn.Conv2d(n, CHANNELS, 1)
        with torch.no_grad():
            self.head.weight *= 0.1
            self.head.bias.zero_()  # type: ignore[union-attr]
            self.head.bias[0] = RARE  # type: ignore[index]

    def fit_initial(self, patch: Tensor, truth: Tensor) -> None:
        """The least-squares start of the unfolding, from maps of the true targets."""
        maps = target_map(truth[..., :2], truth[..., 2], self.config.size_px, self.config.c)
        self.unfolded.fit_initial(patch, maps)

    def forward(self, patch: Tensor) -> Tensor:
        """See `CellNetwork`."""
        unfolded = self.unfolded(patch)
        saturated = (patch >= 1.0).to(patch.dtype)
        wide = saturated.repeat_interleave(self.config.c, 1).repeat_interleave(self.config.c, 2)
        features = F.relu(self.first(torch.stack([unfolded, wide], dim=1)))
        return F.pixel_unshuffle(self.head(F.relu(self.second(features))), self.config.c)


Network = DistaOffGrid
