"""FOCUS: two intensity-and-mask units with pixel-shuffle, the lightest of the compared networks.

Unit ISGU_r: a 5 × 5 and a 3 × 3 convolution, then two heads of r² channels, intensity and mask;
out = shuffle(intensity) · sigmoid(shuffle(mask)). y = PReLU(ISGU_c(z)); s = y + ISGU_1(y).
Loss: MSE + 0.1 |Σs − Σz| + 0.01 mean|s|, of 8-bit counts.
"""

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from torch.nn import functional as F

from trainer.network import UnmixingNetwork

FULL_SCALE = 255.0


class Focus(UnmixingNetwork):
    """Patch in network units (B, n, n) → map of intensities in the same units (B, cn, cn)."""

    class Config(BaseModel):
        """The published network by default: 46,037 parameters."""

        model_config = ConfigDict(frozen=True, extra="forbid")
        size_px: int = Field(11, ge=3)
        c: int = 3
        sigma_px: float = 0.5
        channels: int = Field(64, ge=2)

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.upscale = _IntensityMask(config.channels, config.c)
        self.activation = nn.PReLU()
        self.sharpen = _IntensityMask(config.channels, 1)

    def forward(self, patch_BHW: Tensor) -> Tensor:
        """Map of intensities (B, cn, cn)."""
        coarse = self.activation(self.upscale(patch_BHW[:, None]))
        return (coarse + self.sharpen(coarse))[:, 0]

    def loss(self, patch_BHW: Tensor, truth: Tensor) -> Tensor:
        """MSE + 0.1 |Σs − Σz| + 0.01 mean|s| of counts, divided by 255² as all losses here are."""
        result = self(patch_BHW)
        signal = (result.sum(dim=(1, 2)) - patch_BHW.sum(dim=(1, 2))).abs().mean()
        sparsity = result.abs().mean()
        error = (result - truth).square().mean()
        return error + (0.1 * signal + 0.01 * sparsity) / FULL_SCALE


class _IntensityMask(nn.Module):
    """ISGU_r: (B, 1, n, n) → (B, 1, rn, rn)."""

    def __init__(self, channels: int, ratio: int) -> None:
        super().__init__()
        self.wide = nn.Conv2d(1, channels, 5, padding=2)
        self.narrow = nn.Conv2d(channels, channels // 2, 3, padding=1)
        self.intensity = nn.Conv2d(channels // 2, ratio**2, 3, padding=1)
        self.mask = nn.Conv2d(channels // 2, ratio**2, 3, padding=1)
        self.shuffle = nn.PixelShuffle(ratio)

    def forward(self, value: Tensor) -> Tensor:
        features = F.relu(self.narrow(F.relu(self.wide(value))))
        mask = torch.sigmoid(self.shuffle(self.mask(features)))
        shuffled: Tensor = self.shuffle(self.intensity(features))
        return shuffled * mask


Network = Focus
