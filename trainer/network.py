"""What the trainer needs of a network."""

from typing import Any, ClassVar

from torch import Tensor, nn


class UnmixingNetwork(nn.Module):
    """Patch in network units (B, n, n) → map of intensities in the same units (B, cn, cn)."""

    config: Any  # the nested Config, with at least size_px, c and sigma_px
    trained: ClassVar[bool] = True
    """False: a solver, which has no weights."""

    def fit_initial(self, patch_BHW: Tensor, map_BHW: Tensor) -> None:
        """Set what is computed from training pairs rather than trained; nothing by default."""

    def loss(self, patch_BHW: Tensor, map_BHW: Tensor) -> Tensor:
        """Training loss of a batch, a scalar."""
        return (self(patch_BHW) - map_BHW).square().mean()
