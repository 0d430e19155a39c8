"""SRFBN: image super-resolution by a feedback block of up- and down-projections.

Li et al., "Feedback Network for Image Super-Resolution", CVPR 2019, arXiv:1903.09814, in the small
setting that the unmixing benchmark compares: 32 features, 3 projection groups, one step, so that
the block has no earlier output to be fed and sees its input twice, as in the authors' code.
"""

from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from torch.nn import functional as F

from trainer.network import UnmixingNetwork

# Scale: kernel, stride and padding of the projections, as the authors choose them; 5 and 7 by the
# same rule (out = stride · in).
_KERNELS = {3: (7, 3, 2), 5: (9, 5, 2), 7: (11, 7, 2)}
MIDDLE = 0.5
"""Input is centred on the middle of the range, 127.5 of 255."""


class Srfbn(UnmixingNetwork):
    """Patch in network units (B, n, n) → map of intensities in the same units (B, cn, cn)."""

    class Config(BaseModel):
        """The benchmark's network by default: 372,720 parameters."""

        model_config = ConfigDict(frozen=True, extra="forbid")
        size_px: int = Field(11, ge=3)
        c: Literal[3, 5, 7] = 3
        sigma_px: float = 0.5
        features: int = Field(32, ge=1)
        groups: int = Field(3, ge=1)

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        n = config.features
        self.extract = nn.Sequential(
            nn.Conv2d(1, 4 * n, 3, padding=1), nn.PReLU(), nn.Conv2d(4 * n, n, 1), nn.PReLU()
        )
        self.feedback = _FeedbackBlock(config)
        self.expand = _up(n, config.c)
        self.reconstruct = nn.Conv2d(n, 1, 3, padding=1)

    def forward(self, patch_BHW: Tensor) -> Tensor:
        """Map of intensities (B, cn, cn): the bilinear enlargement and what the block adds."""
        centred = patch_BHW[:, None] - MIDDLE
        enlarged = F.interpolate(centred, scale_factor=float(self.config.c), mode="bilinear")
        residual = self.reconstruct(self.expand(self.feedback(self.extract(centred))))
        return (enlarged + residual + MIDDLE)[:, 0]


class _FeedbackBlock(nn.Module):
    """Groups of an up- and a down-projection, each fed with all before it."""

    def __init__(self, config: Srfbn.Config) -> None:
        super().__init__()
        n, groups = config.features, range(config.groups)
        self.compress_in = _mix(2, n)
        self.up = nn.ModuleList(_up(n, config.c) for _ in groups)
        self.down = nn.ModuleList(_down(n, config.c) for _ in groups)
        self.mix_low = nn.ModuleList(_mix(i + 1, n) if i else nn.Identity() for i in groups)
        self.mix_high = nn.ModuleList(_mix(i + 1, n) if i else nn.Identity() for i in groups)
        self.compress_out = _mix(config.groups, n)

    def forward(self, features: Tensor) -> Tensor:
        low = [self.compress_in(torch.cat([features, features], dim=1))]
        high: list[Tensor] = []
        for up, down, mix_low, mix_high in zip(
            self.up, self.down, self.mix_low, self.mix_high, strict=True
        ):
            high.append(up(mix_low(torch.cat(low, dim=1))))
            low.append(down(mix_high(torch.cat(high, dim=1))))
        result: Tensor = self.compress_out(torch.cat(low[1:], dim=1))
        return result


def _up(features: int, c: int) -> nn.Sequential:
    kernel, stride, padding = _KERNELS[c]
    return nn.Sequential(
        nn.ConvTranspose2d(features, features, kernel, stride, padding), nn.PReLU()
    )


def _down(features: int, c: int) -> nn.Sequential:
    kernel, stride, padding = _KERNELS[c]
    return nn.Sequential(nn.Conv2d(features, features, kernel, stride, padding), nn.PReLU())


def _mix(inputs: int, features: int) -> nn.Sequential:
    """1 × 1 convolution from `inputs` concatenated features to one."""
    return nn.Sequential(nn.Conv2d(inputs * features, features, 1), nn.PReLU())


Network = Srfbn
