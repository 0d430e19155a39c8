"""What networks off the grid share: for every cell, is there a target in it, and where.

After DECODE (Speiser et al., Nature Methods 18 (2021) 1082): for every sub-pixel cell the
probability of a target, its position within, its intensity, and the uncertainty of these. Trained
by likelihood, in one of two ways, each with a Gaussian likelihood of the number of targets.
`cells`: cross-entropy of occupied cells, and the Laplace likelihood of position and intensity in
them. `mixture`, DECODE's own: each target is drawn from the mixture of what all cells say, weighed
by their probabilities.
"""

from abc import abstractmethod
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from engines.manifest import CHANNELS
from pipeline.physics.cell_targets import LOG_SCALES
from pipeline.physics.grid import cell_centres_px, cell_index
from pipeline.physics.groups import MAX_TARGETS
from trainer.network import UnmixingNetwork

Likelihood = Literal["cells", "mixture"]

RARE = -5.0
"""Log-odds at first that a cell holds a target: few do."""


class CellNetwork(UnmixingNetwork):
    """Patch in network units → what is in each cell (B, 7 c², n, n).

    The c² cells of a pixel are channels of it, row by row, for each of: log-odds that a target is
    in the cell; its offset from the cell's centre, x and y, in cells; its intensity; the logarithms
    of the Laplace scales of these three. `pipeline.physics.cell_targets` reads it.
    """

    output = "cell-targets"

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        centres = torch.tensor(cell_centres_px(config.size_px, config.c)).float()
        self.register_buffer("centres", centres, persistent=False)  # (cn,) px

    @abstractmethod
    def forward(self, patch: Tensor) -> Tensor:
        """See the class."""

    def cells(self, patch: Tensor) -> Tensor:
        """The same, cell by cell (B, 7, cn, cn)."""
        return F.pixel_shuffle(self(patch), self.config.c)

    def truth(self, xy_px: Tensor, intensity: Tensor) -> Tensor:
        """The targets themselves (B, K, 3): x px, y px, intensity; 0 where there is none."""
        return torch.cat([xy_px, intensity[..., None]], dim=-1)

    def loss(self, patch: Tensor, truth: Tensor) -> Tensor:
        """Negative log-likelihood of the targets (B, K, 3), nats a patch."""
        side = self.config.c * self.config.size_px
        raw = self.cells(patch).float()
        present = truth[..., 2] > 0.0
        index = cell_index(truth[..., :2], self.config.c).clamp(0, side - 1).long()  # (B, K, 2)
        cell = index[..., 1] * side + index[..., 0]
        occupied = raw.new_zeros(len(raw), side**2 + 1)
        occupied = occupied.scatter(1, torch.where(present, cell, side**2), 1.0)[:, :-1]
        # More than a group holds is a crowded patch: counted by quarters, each with its group.
        quarters = truth.shape[1] > MAX_TARGETS
        counted = _count_error(raw[:, 0], occupied.reshape(-1, side, side), quarters=quarters)
        if self.config.likelihood == "mixture":
            return (self._mixed(raw, truth, present) + counted).mean()
        crossed = F.binary_cross_entropy_with_logits(
            raw[:, 0].flatten(1), occupied, reduction="none"
        ).sum(dim=1)
        there = raw.flatten(2).gather(2, cell[:, None].expand(-1, CHANNELS, -1))  # (B, 7, K)
        offset = (truth[..., :2] - self.get_buffer("centres")[index]) * self.config.c
        wanted = torch.cat([offset, truth[..., 2:]], dim=-1).transpose(1, 2)  # (B, 3, K)
        missed = (_surprise(wanted, there[:, 1:]) * present).sum(dim=1)
        return (crossed + missed + counted).mean()

    def _mixed(self, raw: Tensor, truth: Tensor, present: Tensor) -> Tensor:
        """−Σ log Σ p/Σp · Laplace(target; cell) (B,): targets over cells."""
        centres, c = self.get_buffer("centres"), self.config.c
        side = len(centres)
        place = torch.stack([centres.expand(side, -1), centres[:, None].expand(-1, side)])
        offset = (truth[..., :2, None] - place.flatten(1)) * c  # (B, K, 2, cells)
        intensity = truth[..., 2:, None].expand(-1, -1, 1, side**2)
        wanted = torch.cat([offset, intensity], dim=2).transpose(1, 2)  # (B, 3, K, cells)
        said = raw.flatten(2)[:, :, None]  # (B, 7, 1, cells)
        share = F.logsigmoid(said[:, 0])
        share = share - torch.logsumexp(share, dim=-1, keepdim=True)
        log_p = torch.logsumexp(share - _surprise(wanted, said[:, 1:]), dim=-1)
        return -(log_p * present).sum(dim=1)


def _surprise(wanted: Tensor, said: Tensor) -> Tensor:
    """−log Laplace(x, y, intensity), no constants; wanted (B, 3, …), said (B, 6, …) → (B, …)."""
    log_scale = said[:, 3:].clamp(*LOG_SCALES)
    return ((wanted - said[:, :3]).abs() * torch.exp(-log_scale) + log_scale).sum(dim=1)


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
