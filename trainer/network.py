"""What the trainer needs of a network."""

from typing import Any, ClassVar, Self

from torch import Tensor, nn

from engines.manifest import Condition, Output
from engines.scaling import Plane
from pipeline.physics.grid import target_map


class UnmixingNetwork(nn.Module):
    """Patch in network units (B, n, n) → what `output` says of each of its c × c cells a pixel.

    A network of several `planes` takes (B, planes, n, n), see engines/scaling.py.

    "intensity-map": the intensity in the cell (B, cn, cn), in network units; "cell-targets": see
    `trainer.cell_network` (B, 7 c², n, n).
    """

    config: Any  # the nested Config, with at least size_px, c and sigma_px
    planes: ClassVar[tuple[Plane, ...]] = ("signal",)
    conditions: ClassVar[tuple[Condition, ...]] = ()
    output: ClassVar[Output] = "intensity-map"
    trained: ClassVar[bool] = True
    """False: a solver, which has no weights."""

    def as_engine(self) -> nn.Module:
        """The same function as an engine computes it fastest.

        It takes the planes other than σ, and `conditions`, each (1,).
        """
        return self

    def truth(self, xy_px: Tensor, intensity: Tensor) -> Tensor:
        """What `loss` compares with, of targets (B, K, 2) px and (B, K) in network units, 0: none.

        By default the map of a perfect network on the grid.
        """
        size_px, c = self.config.size_px, self.config.c
        perfect: Tensor = target_map(xy_px, intensity, size_px, c)
        return perfect

    def start_from(self, other: Self) -> None:
        """Take over the weights of another of its kind, by default one of the same settings.

        Raises RuntimeError if they do not fit.
        """
        self.load_state_dict(other.state_dict())

    def fit_initial(self, patch_BHW: Tensor, truth: Tensor) -> None:
        """Set what is computed from training pairs rather than trained; nothing by default."""

    def loss(self, patch_BHW: Tensor, truth: Tensor) -> Tensor:
        """Training loss of a batch, a scalar."""
        return (self(patch_BHW) - truth).square().mean()
