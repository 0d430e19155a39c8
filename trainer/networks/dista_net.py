"""DISTA-Net: dynamic iterative shrinkage-thresholding, unfolded.

Han et al., "DISTA-Net: Dynamic Closely-Spaced Infrared Small Target Unmixing", ICCV 2025,
arXiv:2505.19148. Written from the paper's equations. Departures from the authors' released code,
on purpose: the dynamic kernels are trained (there they are detached from the gradient) and belong
to their own sample only (there they are mixed across the batch).
"""

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from torch.nn import functional as F

from trainer.unfolding import Stage, UnfoldedNetwork, conv3, soft


class DistaNet(UnfoldedNetwork):
    """Patch in network units (B, n, n) → map of intensities in the same units (B, cn, cn)."""

    class Config(BaseModel):
        """The paper's network by default: 2,179,104 parameters."""

        model_config = ConfigDict(frozen=True, extra="forbid")
        size_px: int = Field(11, ge=3)
        c: int = 3
        sigma_px: float = 0.5
        stages: int = Field(6, ge=1)
        channels: int = Field(64, ge=2)
        hidden: int = Field(256, ge=1)
        dynamic_transform: bool = Field(True, description="false: the paper's ablation")
        dynamic_threshold: bool = Field(True, description="false: the paper's ablation")

    def __init__(self, config: Config) -> None:
        super().__init__(config, (_Stage(config) for _ in range(config.stages)))


class _Stage(Stage):
    """Gradient step, dual-branch transform, dynamic threshold, inverse transform."""

    def __init__(self, config: DistaNet.Config) -> None:
        super().__init__()
        n = config.channels
        self.main_in = conv3(1, n)
        self.main_out = conv3(n, n)
        self.dynamic = _DynamicBranch(config) if config.dynamic_transform else None
        self.threshold = _DynamicThreshold(n) if config.dynamic_threshold else _FixedThreshold()
        self.inverse_in = conv3(n, n)
        self.inverse_out = conv3(n, 1)

    def proximal(self, s: Tensor, r: Tensor, checked: int) -> tuple[Tensor, Tensor]:
        """F, soft threshold, F̃."""
        features = self.main_out(F.relu(self.main_in(r)))
        if self.dynamic is not None:
            features = 0.7 * features + 0.3 * self.dynamic(s, r)
        error = self.symmetry(self._inverse, features, r, checked)
        return self._inverse(soft(features, self.threshold(features))), error

    def _inverse(self, features: Tensor) -> Tensor:
        """F̃: back to the map (B, 1, cn, cn)."""
        return self.inverse_out(F.relu(self.inverse_in(features)))


class _DynamicBranch(nn.Module):
    """Each sample's r through the 3 × 3 kernel its own s gives: (B, 1, cn, cn)."""

    def __init__(self, config: DistaNet.Config) -> None:
        super().__init__()
        self.side = config.c * config.size_px
        self.kernel_in = nn.Linear(self.side**2, config.hidden)
        self.kernel_out = nn.Linear(config.hidden, 9)

    def forward(self, s_BL: Tensor, r: Tensor) -> Tensor:
        kernel = self.kernel_out(self.kernel_in(s_BL))  # (B, 9)
        padded = F.pad(r, (1, 1, 1, 1))
        side = self.side
        shifted = torch.cat(
            [padded[:, :, i : i + side, j : j + side] for i in range(3) for j in range(3)], dim=1
        )
        return torch.sigmoid((kernel[:, :, None, None] * shifted).sum(dim=1, keepdim=True))


class _DynamicThreshold(nn.Module):
    """θ relative to each feature's value, from two receptive fields weighed by two masks."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.depthwise = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)
        self.near = nn.Conv2d(channels, half, 1)
        self.far = nn.Conv2d(channels, half, 1)
        self.masks = nn.Conv2d(2, 2, 3, padding=1)
        self.out = nn.Conv2d(half, channels, 1)

    def forward(self, features: Tensor) -> Tensor:
        near = self.near(features)
        far = self.far(self.depthwise(features))
        both = torch.cat([near, far], dim=1)
        pooled = torch.cat([both.mean(dim=1, keepdim=True), both.amax(dim=1, keepdim=True)], dim=1)
        masks = torch.sigmoid(self.masks(pooled))
        return self.out(masks[:, :1] * near + masks[:, 1:] * far) * features


class _FixedThreshold(nn.Module):
    """One learnt θ for all features, as in ISTA-Net."""

    def __init__(self) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.tensor(0.01))

    def forward(self, _features: Tensor) -> Tensor:
        return self.value


Network = DistaNet
