"""ISTA-Net+: ISTA-Net on the residual, which it learns to sparsify.

Zhang and Ghanem, "ISTA-Net: Interpretable Optimization-Inspired Deep Network for Image
Compressive Sensing", CVPR 2018, arXiv:1706.07929, section 3.3.
"""

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from torch.nn import functional as F

from trainer.unfolding import Stage, UnfoldedNetwork, conv3, soft


class IstaNetPlus(UnfoldedNetwork):
    """Patch in network units (B, n, n) → map of intensities in the same units (B, cn, cn)."""

    class Config(BaseModel):
        """The benchmark's network by default: 336,978 parameters."""

        model_config = ConfigDict(frozen=True, extra="forbid")
        size_px: int = Field(11, ge=3)
        c: int = 3
        sigma_px: float = 0.5
        stages: int = Field(9, ge=1)
        channels: int = Field(32, ge=1)

    def __init__(self, config: Config) -> None:
        super().__init__(config, (_Stage(config.channels) for _ in range(config.stages)))


class _Stage(Stage):
    """s = r + G(H̃(soft(H(D(r)), θ))); D and G one convolution each, H and H̃ two."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.threshold = nn.Parameter(torch.tensor(0.01))
        self.extract = conv3(1, channels)
        self.forward_in = conv3(channels, channels)
        self.forward_out = conv3(channels, channels)
        self.inverse_in = conv3(channels, channels)
        self.inverse_out = conv3(channels, channels)
        self.combine = conv3(channels, 1)

    def proximal(self, s: Tensor, r: Tensor, checked: int) -> tuple[Tensor, Tensor]:  # noqa: ARG002
        """The residual added to r; symmetry H̃(H(D r)) = D r on the features."""
        wanted = self.extract(r)
        features = self.forward_out(F.relu(self.forward_in(wanted)))
        error = self.symmetry(self._inverse, features, wanted, checked)
        return r + self.combine(self._inverse(soft(features, self.threshold))), error

    def _inverse(self, features: Tensor) -> Tensor:
        return self.inverse_out(F.relu(self.inverse_in(features)))


Network = IstaNetPlus
