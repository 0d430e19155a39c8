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

from pipeline.physics.grid import sampling_matrix
from trainer.network import UnmixingNetwork


class DistaNet(UnmixingNetwork):
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

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        cells = (config.c * config.size_px) ** 2
        phi = torch.tensor(sampling_matrix(config.size_px, config.c, config.sigma_px))
        self.register_buffer("phi", phi.float(), persistent=False)  # (n², L)
        # s⁰ = Q z, least squares over training pairs; `fit_initial` fills it.
        self.register_buffer("initial", torch.zeros(cells, config.size_px**2))
        self.unfolded = nn.ModuleList(_Stage(config, cells) for _ in range(config.stages))

    def fit_initial(self, patch_BHW: Tensor, map_BHW: Tensor, ridge: float = 1e-3) -> None:
        """Q = X Yᵀ (Y Yᵀ + ridge·tr/n·I)⁻¹ from pairs of map X and patch Y.

        The ridge is needed: corner pixels hardly ever see a target, so Y Yᵀ is near singular.
        """
        y = patch_BHW.flatten(1).double()
        x = map_BHW.flatten(1).double()
        gram = y.T @ y
        gram += ridge * gram.diagonal().mean() * torch.eye(len(gram), device=gram.device)
        self.get_buffer("initial").copy_(torch.linalg.solve(gram, y.T @ x).T)

    def forward(self, patch_BHW: Tensor) -> Tensor:
        """Map of intensities (B, cn, cn)."""
        return self._unfold(patch_BHW, symmetry_samples=0)[0]

    def loss(self, patch_BHW: Tensor, map_BHW: Tensor) -> Tensor:
        """Mean squared error of the map + 0.01 · Σ over stages of the symmetry error.

        The symmetry term is averaged over a quarter of the batch: the same expectation for a
        quarter of its cost, which would be a third of the step.
        """
        samples = -(-len(patch_BHW) // 4)
        result, symmetry = self._unfold(patch_BHW, symmetry_samples=samples)
        return (result - map_BHW).square().mean() + 0.01 * symmetry

    def _unfold(self, patch_BHW: Tensor, symmetry_samples: int) -> tuple[Tensor, Tensor]:
        """All stages: the map, and Σ mean (F̃(F(r)) − r)² over the first `symmetry_samples`."""
        side = self.config.c * self.config.size_px
        phi, initial = self.get_buffer("phi"), self.get_buffer("initial")
        z = patch_BHW.flatten(1)  # (B, n²)
        s = z @ initial.T  # (B, L)
        symmetry = z.new_zeros(())
        for stage in self.unfolded:
            assert isinstance(stage, _Stage)  # noqa: S101, for the type checker
            gradient = (s @ phi.T - z) @ phi  # Φᵀ(Φ s − z)
            r = (s - stage.step_size * gradient).reshape(-1, 1, side, side)
            features = stage.transform(s, r)
            if symmetry_samples:
                restored = stage.inverse(features[:symmetry_samples])
                symmetry = symmetry + (restored - r[:symmetry_samples]).square().mean()
            s = stage.inverse(stage.shrink(features)).flatten(1)
        return s.reshape(-1, side, side), symmetry


class _Stage(nn.Module):
    """One iteration: gradient step, dual-branch transform, dynamic threshold, inverse transform."""

    def __init__(self, config: DistaNet.Config, cells: int) -> None:
        super().__init__()
        n, half = config.channels, config.channels // 2
        self.side = config.c * config.size_px
        self.step_size = nn.Parameter(torch.tensor(0.5))
        self.main_in = nn.Conv2d(1, n, 3, padding=1, bias=False)
        self.main_out = nn.Conv2d(n, n, 3, padding=1, bias=False)
        self.kernel_in = nn.Linear(cells, config.hidden)
        self.kernel_out = nn.Linear(config.hidden, 9)
        self.depthwise = nn.Conv2d(n, n, 3, padding=1, groups=n)
        self.near = nn.Conv2d(n, half, 1)
        self.far = nn.Conv2d(n, half, 1)
        self.masks = nn.Conv2d(2, 2, 3, padding=1)
        self.threshold = nn.Conv2d(half, n, 1)
        self.inverse_in = nn.Conv2d(n, n, 3, padding=1, bias=False)
        self.inverse_out = nn.Conv2d(n, 1, 3, padding=1, bias=False)
        for conv in (self.main_in, self.main_out, self.inverse_in, self.inverse_out):
            nn.init.xavier_normal_(conv.weight)

    def transform(self, s: Tensor, r: Tensor) -> Tensor:
        """F: the trained branch and the sample's own, weighed 0.7 to 0.3 (B, channels, cn, cn)."""
        return 0.7 * self.main_out(F.relu(self.main_in(r))) + 0.3 * self._dynamic(s, r)

    def shrink(self, features: Tensor) -> Tensor:
        """Soft threshold: sign(F) · max(|F| − θ, 0), θ relative to F."""
        threshold = self._threshold(features) * features
        return torch.sign(features) * F.relu(features.abs() - threshold)

    def inverse(self, features: Tensor) -> Tensor:
        """F̃: back to the map (B, 1, cn, cn)."""
        return self.inverse_out(F.relu(self.inverse_in(features)))

    def _dynamic(self, s: Tensor, r: Tensor) -> Tensor:
        """Each sample's r through the 3 × 3 kernel its own s gives: (B, 1, cn, cn)."""
        kernel = self.kernel_out(self.kernel_in(s))  # (B, 9)
        padded = F.pad(r, (1, 1, 1, 1))
        side = self.side
        shifted = torch.cat(
            [padded[:, :, i : i + side, j : j + side] for i in range(3) for j in range(3)], dim=1
        )
        return torch.sigmoid((kernel[:, :, None, None] * shifted).sum(dim=1, keepdim=True))

    def _threshold(self, features: Tensor) -> Tensor:
        """Threshold relative to each feature, from two receptive fields weighed by two masks."""
        near = self.near(features)
        far = self.far(self.depthwise(features))
        both = torch.cat([near, far], dim=1)
        pooled = torch.cat([both.mean(dim=1, keepdim=True), both.amax(dim=1, keepdim=True)], dim=1)
        masks = torch.sigmoid(self.masks(pooled))
        return self.threshold(masks[:, :1] * near + masks[:, 1:] * far)


Network = DistaNet
