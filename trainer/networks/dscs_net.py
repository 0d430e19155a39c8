"""DSCSNet: sparse unmixing by ADMM, unrolled, with thresholds from self-attention.

"DSCSNet", arXiv:2603.21192: x, z and u updates in each stage, trained jointly. The paper's
hyper-parameters are not published; chosen here: 6 stages, 32 channels, x by one gradient step
and a learnt residual transform; attention among the sensor's pixels, each a token of the c × c
cells of x, z and u it covers, with 32 features; from it one threshold for each cell.
"""

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from torch.nn import functional as F

from trainer.unfolding import LearntStart, conv3, soft


class DscsNet(LearntStart):
    """Patch in network units (B, n, n) → map of intensities in the same units (B, cn, cn)."""

    class Config(BaseModel):
        """Our choice, the published one is not known."""

        model_config = ConfigDict(frozen=True, extra="forbid")
        size_px: int = Field(11, ge=3)
        c: int = 3
        sigma_px: float = 0.5
        stages: int = Field(6, ge=1)
        channels: int = Field(32, ge=1)
        attention: int = Field(32, ge=1, description="features of a token")

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.penalty = nn.Parameter(torch.tensor(0.1))  # ρ
        self.dual_step = nn.Parameter(torch.tensor(1.0))
        self.unrolled = nn.ModuleList(
            _Stage(config, 1.0 / self.lipschitz) for _ in range(config.stages)
        )

    def forward(self, patch_BHW: Tensor) -> Tensor:
        """Map of intensities (B, cn, cn): the auxiliary variable z of the last stage."""
        measured = patch_BHW.flatten(1)
        shape = (-1, 1, self.side, self.side)
        x = z = self.start(measured).reshape(shape)
        u = torch.zeros_like(x)
        for stage in self.unrolled:
            gradient = self.gradient(x.flatten(1), measured).reshape(shape)
            x, z = stage(x, z, u, gradient + self.penalty * (x - z + u))
            u = u + self.dual_step * (x - z)
        return z[:, 0]


class _Stage(nn.Module):
    """The x- and z-update of one iteration; maps x, z, u, all (B, 1, cn, cn)."""

    def __init__(self, config: DscsNet.Config, step_size: float) -> None:
        super().__init__()
        n = config.channels
        self.step_size = nn.Parameter(torch.tensor(step_size))
        last = conv3(n, 1)
        nn.init.xavier_normal_(last.weight, gain=0.1)  # begins nearly as plain ADMM
        self.transform = nn.Sequential(conv3(1, n), nn.ReLU(), conv3(n, n), nn.ReLU(), last)
        self.threshold = _AttentionThreshold(config.c, config.attention)

    def forward(self, x: Tensor, z: Tensor, u: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
        r = x - self.step_size * gradient
        x = r + self.transform(r)
        return x, soft(x + u, self.threshold(torch.cat([x, z, u], dim=1)))


class _AttentionThreshold(nn.Module):
    """Iterates (B, 3, cn, cn) → thresholds ≥ 0 (B, 1, cn, cn)."""

    def __init__(self, c: int, features: int) -> None:
        super().__init__()
        self.c = c
        self.embed = nn.Conv2d(3 * c**2, features, 3, padding=1)
        self.query = nn.Linear(features, features)
        self.key = nn.Linear(features, features)
        self.value = nn.Linear(features, features)
        self.out = nn.Linear(features, c**2)
        nn.init.constant_(self.out.bias, -4.0)  # thresholds of about 0.02 at first

    def forward(self, iterates: Tensor) -> Tensor:
        cells = F.pixel_unshuffle(iterates, self.c)  # (B, 3c², n, n)
        embedded = self.embed(cells)
        token = embedded.flatten(2).transpose(1, 2)  # (B, n², features)
        query, key = self.query(token), self.key(token)
        weight = torch.softmax(query @ key.transpose(1, 2) / key.shape[2] ** 0.5, dim=2)
        seen = weight @ self.value(token)
        value = F.softplus(self.out(token + seen))  # (B, n², c²)
        return F.pixel_shuffle(value.transpose(1, 2).unflatten(2, cells.shape[2:]), self.c)


Network = DscsNet
