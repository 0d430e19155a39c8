"""SAN: second-order attention network for super-resolution.

Dai et al., "Second-Order Attention Network for Single Image Super-Resolution", CVPR 2019: region-
level non-local blocks around residual groups whose channels are weighed by attention to their
covariance (square root by five Newton–Schulz steps), then pixel-shuffle.
"""

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from trainer.network import UnmixingNetwork

NEWTON_SCHULZ_STEPS = 5


class San(UnmixingNetwork):
    """Patch in network units (B, n, n) → map of intensities in the same units (B, cn, cn)."""

    class Config(BaseModel):
        """The benchmark's network by default: 10 groups of 5 blocks, 64 features."""

        model_config = ConfigDict(frozen=True, extra="forbid")
        size_px: int = Field(11, ge=3)
        c: int = 3
        sigma_px: float = 0.5
        groups: int = Field(10, ge=1)
        blocks: int = Field(5, ge=1)
        features: int = Field(64, ge=8)
        reduction: int = Field(16, ge=1)

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        n = config.features
        self.head = _conv(1, n)
        self.non_local = _NonLocal(n)
        self.groups = nn.ModuleList(_Group(config) for _ in range(config.groups))
        self.share = nn.Parameter(torch.zeros(()))  # of the source in each group's input
        self.body_out = _conv(n, n)
        self.tail = nn.Sequential(_conv(n, n * config.c**2), nn.PixelShuffle(config.c), _conv(n, 1))

    def forward(self, patch_BHW: Tensor) -> Tensor:
        """Map of intensities (B, cn, cn)."""
        shallow = self.head(patch_BHW[:, None])
        features = source = self.non_local(shallow)
        for group in self.groups:
            features = group(features) + self.share * source
        deep = self.body_out(self.non_local(features)) + shallow
        return self.tail(deep)[:, 0]


class _Group(nn.Module):
    """Residual blocks, second-order channel attention, a skip over all."""

    def __init__(self, config: San.Config) -> None:
        super().__init__()
        n = config.features
        self.blocks = nn.ModuleList(
            nn.Sequential(_conv(n, n), nn.ReLU(), _conv(n, n)) for _ in range(config.blocks)
        )
        self.attention = _SecondOrderAttention(n, max(1, n // config.reduction))
        self.out = _conv(n, n)

    def forward(self, value: Tensor) -> Tensor:
        features = value
        for block in self.blocks:
            features = features + block(features)
        result: Tensor = self.out(self.attention(features)) + value
        return result


class _SecondOrderAttention(nn.Module):
    """A weight for each channel from the square root of the channels' covariance."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.excite = nn.Sequential(
            nn.Linear(channels, hidden), nn.ReLU(), nn.Linear(hidden, channels), nn.Sigmoid()
        )

    def forward(self, features: Tensor) -> Tensor:
        # In float32 whatever the rest computes in: the iteration amplifies rounding.
        with torch.autocast(features.device.type, enabled=False):
            root = _square_root(_covariance(features.float()))
        weight = self.excite(root.mean(dim=2))
        return features * weight[:, :, None, None]


def _covariance(features: Tensor) -> Tensor:
    """Over the map: (B, C, H, W) → (B, C, C)."""
    flat = features.flatten(2)
    flat = flat - flat.mean(dim=2, keepdim=True)
    return flat @ flat.transpose(1, 2) / flat.shape[2]


def _square_root(matrix_BCC: Tensor) -> Tensor:
    """Newton–Schulz square root of positive semi-definite matrices, scaled by their trace."""
    identity = torch.eye(matrix_BCC.shape[-1], device=matrix_BCC.device)
    trace = matrix_BCC.diagonal(dim1=1, dim2=2).sum(dim=1)[:, None, None] + 1e-8
    y, z = matrix_BCC / trace, identity
    for _ in range(NEWTON_SCHULZ_STEPS):
        step = 0.5 * (3.0 * identity - z @ y)
        y, z = y @ step, step @ z
    return y * trace.sqrt()


class _NonLocal(nn.Module):
    """Embedded-Gaussian attention within each of the four quarters of the map."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        inner = channels // 8
        self.query = nn.Conv2d(channels, inner, 1)
        self.key = nn.Conv2d(channels, inner, 1)
        self.value = nn.Conv2d(channels, inner, 1)
        self.out = nn.Conv2d(inner, channels, 1)

    def forward(self, features: Tensor) -> Tensor:
        half = features.shape[-1] // 2
        rows = [
            torch.cat([self._attend(part[..., :half]), self._attend(part[..., half:])], dim=3)
            for part in (features[:, :, :half], features[:, :, half:])
        ]
        return torch.cat(rows, dim=2)

    def _attend(self, part: Tensor) -> Tensor:
        query, key, value = (
            conv(part).flatten(2).transpose(1, 2) for conv in (self.query, self.key, self.value)
        )
        seen = torch.softmax(query @ key.transpose(1, 2), dim=2) @ value
        seen = seen.transpose(1, 2).unflatten(2, part.shape[2:])
        result: Tensor = self.out(seen) + part
        return result


def _conv(inputs: int, outputs: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1)


Network = San
