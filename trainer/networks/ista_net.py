"""ISTA-Net: iterative shrinkage-thresholding, unfolded with a learnt transform.

Zhang and Ghanem, "ISTA-Net: Interpretable Optimization-Inspired Deep Network for Image
Compressive Sensing", CVPR 2018, arXiv:1706.07929, eqs. 7 to 13.
"""

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from torch.nn import functional as F

from trainer.unfolding import Stage, UnfoldedNetwork, conv3, soft


class IstaNet(UnfoldedNetwork):
    """Patch in network units (B, n, n) → map of intensities in the same units (B, cn, cn)."""

    class Config(BaseModel):
        """The benchmark's network by default: 171,090 parameters."""

        model_config = ConfigDict(frozen=True, extra="forbid")
        size_px: int = Field(11, ge=3)
        c: int = 3
        sigma_px: float = 0.5
        stages: int = Field(9, ge=1)
        channels: int = Field(32, ge=1)

    def __init__(self, config: Config) -> None:
        super().__init__(config, (_Stage(config.channels) for _ in range(config.stages)))


class _Stage(Stage):
    """Gradient step, F = conv ∘ relu ∘ conv, soft threshold, F̃ of the same shape."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.threshold = nn.Parameter(torch.tensor(0.01))
        self.forward_in = conv3(1, channels)
        self.forward_out = conv3(channels, channels)
        self.inverse_in = conv3(channels, channels)
        self.inverse_out = conv3(channels, 1)

    def proximal(self, s: Tensor, r: Tensor, checked: int) -> tuple[Tensor, Tensor]:  # noqa: ARG002
        """F̃(soft(F(r), θ))."""
        features = self.forward_out(F.relu(self.forward_in(r)))
        error = self.symmetry(self._inverse, features, r, checked)
        return self._inverse(soft(features, self.threshold)), error

    def _inverse(self, features: Tensor) -> Tensor:
        return self.inverse_out(F.relu(self.inverse_in(features)))


Network = IstaNet
