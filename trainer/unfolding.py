"""What unfolded networks share: s⁰ = Q z, then stages, each a gradient step and a learnt map."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.physics.grid import sampling_matrix
from trainer.network import UnmixingNetwork

SYMMETRY_WEIGHT = 0.01
"""Weight of Σ mean (F̃(F(r)) − r)² in the loss, as in ISTA-Net and DISTA-Net."""


class Stage(nn.Module, ABC):
    """One iteration of an unfolded solver."""

    def __init__(self) -> None:
        super().__init__()
        self.step_size = nn.Parameter(torch.zeros(()))  # `UnfoldedNetwork` sets where it starts

    @abstractmethod
    def proximal(self, s: Tensor, r: Tensor, checked: int) -> tuple[Tensor, Tensor]:
        """From the stage's input s (B, L) and the map r (B, 1, cn, cn) after the gradient step.

        → the next map (B, 1, cn, cn), and the mean squared symmetry error F̃(F(r)) − r over the
        first `checked` patches; 0 if there are none.
        """

    @staticmethod
    def symmetry(
        inverse: Callable[[Tensor], Tensor], features: Tensor, wanted: Tensor, checked: int
    ) -> Tensor:
        """Mean squared difference of inverse(features) and `wanted` over `checked` patches."""
        if checked == 0:
            return wanted.new_zeros(())
        return (inverse(features[:checked]) - wanted[:checked]).square().mean()


class ModelNetwork(UnmixingNetwork):
    """A network with the imaging model Φ in it.

    lipschitz: ‖Φ‖², the largest eigenvalue of ΦᵀΦ; a gradient step of 1/‖Φ‖² always descends.
    """

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.side = config.c * config.size_px
        phi = torch.tensor(sampling_matrix(config.size_px, config.c, config.sigma_px))
        self.lipschitz = float(torch.linalg.matrix_norm(phi, ord=2) ** 2)
        self.register_buffer("phi", phi.float(), persistent=False)  # (n², L)

    def gradient(self, s: Tensor, z: Tensor) -> Tensor:
        """Φᵀ(Φ s − z) of maps (B, L) and patches (B, n²): (B, L)."""
        phi = self.get_buffer("phi")
        return (s @ phi.T - z) @ phi


class LearntStart(ModelNetwork):
    """Starts from s⁰ = Q z, least squares over training pairs, which `fit_initial` finds."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.register_buffer("initial", torch.zeros(self.side**2, config.size_px**2))

    def fit_initial(self, patch_BHW: Tensor, truth: Tensor, ridge: float = 1e-3) -> None:
        """Q = X Yᵀ (Y Yᵀ + ridge·tr/n·I)⁻¹ from pairs of map X and patch Y.

        The ridge is needed: corner pixels hardly ever see a target, so Y Yᵀ is near singular.
        """
        y = patch_BHW.flatten(1).double()
        x = truth.flatten(1).double()
        gram = y.T @ y
        gram += ridge * gram.diagonal().mean() * torch.eye(len(gram), device=gram.device)
        self.get_buffer("initial").copy_(torch.linalg.solve(gram, y.T @ x).T)

    def start(self, z: Tensor) -> Tensor:
        """s⁰ = Q z of patches (B, n²): (B, L)."""
        return z @ self.get_buffer("initial").T


class UnfoldedNetwork(LearntStart):
    """Patch in network units (B, n, n) → map of intensities in the same units (B, cn, cn).

    Step sizes start at 1/‖Φ‖². The papers start at 0.5, which overshoots this Φ (2/‖Φ‖² is 0.23
    at c = 3): after 16,000 patches ISTA-Net+ was then at CSO-mAP 0.33 instead of 0.42.
    """

    def __init__(self, config: Any, stages: Iterable[Stage]) -> None:
        super().__init__(config)
        self.unfolded = nn.ModuleList(stages)
        for stage in self.unfolded:
            nn.init.constant_(stage.get_parameter("step_size"), 1.0 / self.lipschitz)

    def forward(self, patch_BHW: Tensor) -> Tensor:
        """Map of intensities (B, cn, cn)."""
        return self._unfold(patch_BHW, checked=0)[0]

    def loss(self, patch_BHW: Tensor, truth: Tensor) -> Tensor:
        """Mean squared error of the map + 0.01 · Σ over stages of the symmetry error.

        The symmetry term is averaged over a quarter of the batch: the same expectation for a
        quarter of its cost, which would be a third of the step.
        """
        result, symmetry = self._unfold(patch_BHW, checked=-(-len(patch_BHW) // 4))
        return (result - truth).square().mean() + SYMMETRY_WEIGHT * symmetry

    def _unfold(self, patch_BHW: Tensor, checked: int) -> tuple[Tensor, Tensor]:
        """All stages: the map, and the sum of their symmetry errors over `checked` patches."""
        z = patch_BHW.flatten(1)  # (B, n²)
        s = self.start(z)  # (B, L)
        symmetry = z.new_zeros(())
        for stage in self.unfolded:
            assert isinstance(stage, Stage)  # noqa: S101, for the type checker
            r = s - stage.step_size * self.gradient(s, z)
            r = r.reshape(-1, 1, self.side, self.side)
            result, error = stage.proximal(s, r, checked)
            s, symmetry = result.flatten(1), symmetry + error
        return s.reshape(-1, self.side, self.side), symmetry


def soft(value: Tensor, threshold: Tensor) -> Tensor:
    """Soft threshold: sign(v) · max(|v| − θ, 0)."""
    return torch.sign(value) * torch.relu(value.abs() - threshold)


def conv3(inputs: int, outputs: int) -> nn.Conv2d:
    """3 × 3 convolution without bias, Xavier-normal weights."""
    conv = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
    nn.init.xavier_normal_(conv.weight)
    return conv
