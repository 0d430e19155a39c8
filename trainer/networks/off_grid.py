"""Off the grid: a small residual network that says of each cell whether a target lies in it, where.

After DECODE (Speiser et al., Nature Methods 18 (2021) 1082): for every sub-pixel cell the
probability of a target, its position within, its intensity, and the uncertainty of these. All
convolutions are at the resolution of the sensor, so it costs a fraction of the unfolded networks.
Loss: cross-entropy of occupied cells + Laplace likelihood of position and intensity in them +
Gaussian likelihood of the number of targets.
"""

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from torch.nn import functional as F

from engines.manifest import CHANNELS
from pipeline.physics.grid import cell_centres_px, cell_index
from pipeline.physics.groups import MAX_TARGETS
from trainer.network import UnmixingNetwork

LOG_SCALES = (-6.0, 3.0)
RARE = -5.0
"""Log-odds at first that a cell holds a target: few do."""


class OffGrid(UnmixingNetwork):
    """Patch in network units (B, n, n) → what is in each cell (B, 7, cn, cn)."""

    output = "cell-targets"

    class Config(BaseModel):
        """170,271 parameters, 20 M multiply-adds by default."""

        model_config = ConfigDict(frozen=True, extra="forbid")
        size_px: int = Field(11, ge=3)
        c: int = 3
        sigma_px: float = 0.5
        channels: int = Field(48, ge=1)
        blocks: int = Field(4, ge=1)

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        n = config.channels
        self.first = nn.Conv2d(2, n, 3, padding=1)
        self.blocks = nn.ModuleList(_Block(n) for _ in range(config.blocks))
        self.head = nn.Conv2d(n, CHANNELS * config.c**2, 1)
        with torch.no_grad():
            self.head.weight *= 0.1
            self.head.bias.zero_()  # type: ignore[union-attr]
            self.head.bias[: config.c**2] = RARE  # type: ignore[index]
        centres = torch.tensor(cell_centres_px(config.size_px, config.c)).float()
        self.register_buffer("centres", centres, persistent=False)  # (cn,) px

    def truth(self, xy_px: Tensor, intensity: Tensor) -> Tensor:
        """The targets themselves (B, K, 3): x px, y px, intensity; 0 where there is none."""
        return torch.cat([xy_px, intensity[..., None]], dim=-1)

    def forward(self, patch_BHW: Tensor) -> Tensor:
        """Probability, x px, y px, intensity, and the standard deviations of these three."""
        raw = self._raw(patch_BHW)
        centres, c = self.get_buffer("centres"), self.config.c
        scale = torch.exp(raw[:, 4:].clamp(*LOG_SCALES)) * 2.0**0.5  # of a Laplace distribution
        return torch.cat(
            [
                torch.sigmoid(raw[:, :1]),
                centres + raw[:, 1:2] / c,
                centres[:, None] + raw[:, 2:3] / c,
                raw[:, 3:4],
                scale[:, :2] / c,
                scale[:, 2:],
            ],
            dim=1,
        )

    def loss(self, patch_BHW: Tensor, truth: Tensor) -> Tensor:
        """Negative log-likelihood of the targets (B, K, 3), nats a patch."""
        c = self.config.c
        side = c * self.config.size_px
        raw = self._raw(patch_BHW).float()
        present = truth[..., 2] > 0.0
        index = cell_index(truth[..., :2], c).clamp(0, side - 1).long()  # (B, K, 2)
        cell = index[..., 1] * side + index[..., 0]
        occupied = raw.new_zeros(len(raw), side**2 + 1)
        occupied = occupied.scatter(1, torch.where(present, cell, side**2), 1.0)[:, :-1]
        crossed = F.binary_cross_entropy_with_logits(
            raw[:, 0].flatten(1), occupied, reduction="none"
        ).sum(dim=1)
        there = raw.flatten(2).gather(2, cell[:, None].expand(-1, CHANNELS, -1))  # (B, 7, K)
        offset = (truth[..., :2] - self.get_buffer("centres")[index]) * c
        wanted = torch.cat([offset, truth[..., 2:]], dim=-1).transpose(1, 2)  # (B, 3, K)
        log_scale = there[:, 4:].clamp(*LOG_SCALES)
        missed = (wanted - there[:, 1:4]).abs() * torch.exp(-log_scale) + log_scale
        missed = (missed.sum(dim=1) * present).sum(dim=1)
        # More than a group holds is a crowded patch: counted by quarters, each with its group.
        quarters = truth.shape[1] > MAX_TARGETS
        counted = _count_error(raw[:, 0], occupied.reshape(-1, side, side), quarters=quarters)
        return (crossed + missed + counted).mean()

    def _raw(self, patch_BHW: Tensor) -> Tensor:
        """Log-odds; offsets from the cell's centre in cells; intensity; log of Laplace scales."""
        return F.pixel_shuffle(self.head(self._features(patch_BHW)), self.config.c)

    def _features(self, patch_BHW: Tensor) -> Tensor:
        """(B, channels, n, n)."""
        saturated = (patch_BHW >= 1.0).to(patch_BHW.dtype)
        features = F.relu(self.first(torch.stack([patch_BHW, saturated], dim=1)))
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


def _count_error(log_odds: Tensor, occupied: Tensor, *, quarters: bool) -> Tensor:
    """−log N(count; Σp, Σp(1 − p)) (B,), of the whole map or summed over its quarters."""
    p = torch.sigmoid(log_odds)
    sums = [_sums(value, quarters=quarters) for value in (occupied, p, p * (1.0 - p))]
    count, mean, variance = sums
    variance = variance + 0.02
    return (0.5 * ((count - mean) ** 2 / variance + torch.log(variance))).sum(dim=1)


def _sums(map_BHW: Tensor, *, quarters: bool) -> Tensor:
    """Of the whole map (B, 1), or of its quarters (B, 4)."""
    if not quarters:
        return map_BHW.sum(dim=(1, 2))[:, None]
    half = map_BHW.shape[1] // 2
    rows = (map_BHW[:, :half], map_BHW[:, half:])
    parts = [part for row in rows for part in (row[:, :, :half], row[:, :, half:])]
    return torch.stack([part.sum(dim=(1, 2)) for part in parts], dim=1)


Network = OffGrid
