"""ISTA: the solver all unfolded networks start from. Nothing is trained.

Daubechies, Defrise and De Mol, "An iterative thresholding algorithm for linear inverse problems
with a sparsity constraint", Comm. Pure Appl. Math. 57 (2004):
s ← soft(s + Φᵀ(z − Φ s)/‖Φ‖², λ/‖Φ‖²), the minimum of ½‖z − Φ s‖² + λ‖s‖₁.
"""

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from trainer.unfolding import ModelNetwork, soft


class Ista(ModelNetwork):
    """Patch in network units (B, n, n) → map of intensities in the same units (B, cn, cn)."""

    class Config(BaseModel):
        """λ is the best of those tried on held-out patches (docs/benchmark.md)."""

        model_config = ConfigDict(frozen=True, extra="forbid")
        size_px: int = Field(11, ge=3)
        c: int = 3
        sigma_px: float = 0.5
        penalty: float = Field(0.05, ge=0, description="λ, network units")
        tolerance: float = Field(1e-4, ge=0, description="‖Δs‖ / ‖s‖ at which a patch is done")
        iterations: int = Field(3000, ge=1)

    trained = False

    def forward(self, patch_BHW: Tensor) -> Tensor:
        """Map of intensities (B, cn, cn)."""
        z = patch_BHW.flatten(1)
        s = z.new_zeros((z.shape[0], self.side**2))
        threshold = torch.full((), self.config.penalty / self.lipschitz, device=z.device)
        moving = torch.ones_like(z[:, :1], dtype=torch.bool)  # (B, 1)
        for _ in range(self.config.iterations):
            after = soft(s - self.gradient(s, z) / self.lipschitz, threshold)
            change = (after - s).norm(dim=1, keepdim=True)
            s = torch.where(moving, after, s)
            moving = moving & (change > self.config.tolerance * s.norm(dim=1, keepdim=True))
            if not torch.compiler.is_exporting() and not bool(moving.any()):
                break
        return s.reshape(-1, self.side, self.side)


Network = Ista
