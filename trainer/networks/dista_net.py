"""DISTA-Net: dynamic iterative shrinkage-thresholding, unfolded.

Han et al., "DISTA-Net: Dynamic Closely-Spaced Infrared Small Target Unmixing", ICCV 2025,
arXiv:2505.19148. Written from the paper's equations. Departures from the authors' released code,
on purpose: the dynamic kernels are trained (there they are detached from the gradient) and belong
to their own sample only (there they are mixed across the batch).
"""

from typing import Self

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.physics.grid import cell_centres_px
from pipeline.physics.psf import pixel_response
from trainer.unfolding import Stage, UnfoldedNetwork, conv3, soft
from trainer.widening import widened_state


class DistaNet(UnfoldedNetwork):
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
        dynamic_transform: bool = Field(True, description="false: the paper's ablation")
        dynamic_threshold: bool = Field(True, description="false: the paper's ablation")

    def __init__(self, config: Config) -> None:
        super().__init__(config, (_Stage(config) for _ in range(config.stages)))

    def start_from(self, other: Self) -> None:
        """Begin as another, which may have fewer stages and channels: the map is the same.

        Raises RuntimeError if it cannot be done.
        """
        for field in ("size_px", "c", "dynamic_transform", "dynamic_threshold"):
            if getattr(self.config, field) != getattr(other.config, field):
                raise RuntimeError(f"of another {field}")
        for place, stage in enumerate(self.unfolded):
            if place >= len(other.unfolded):
                assert isinstance(stage, _Stage)  # noqa: S101, for the type checker
                stage.pass_on()
        own = self.state_dict()
        self.load_state_dict(own | widened_state(other.state_dict(), own))

    def as_engine(self) -> nn.Module:
        """With fewer and cheaper operations; an ablation stays as it is."""
        if self.config.dynamic_transform and self.config.dynamic_threshold:
            return _Rewritten(self)
        return self


class _Stage(Stage):
    """Gradient step, dual-branch transform, dynamic threshold, inverse transform."""

    def __init__(self, config: DistaNet.Config) -> None:
        super().__init__()
        n = config.channels
        self.main_in = conv3(1, n)
        self.main_out = conv3(n, n)
        self.dynamic = _DynamicBranch(config) if config.dynamic_transform else None
        self.threshold = _DynamicThreshold(n) if config.dynamic_threshold else _FixedThreshold()
        self.inverse_in = conv3(n, n)
        self.inverse_out = conv3(n, 1)

    def proximal(self, s: Tensor, r: Tensor, checked: int) -> tuple[Tensor, Tensor]:
        """F, soft threshold, F̃."""
        features = self.main_out(F.relu(self.main_in(r)))
        if self.dynamic is not None:
            features = 0.7 * features + 0.3 * self.dynamic(s, r)
        error = self.symmetry(self._inverse, features, r, checked)
        return self._inverse(soft(features, self.threshold(features))), error

    def pass_on(self) -> None:
        """Let the map through as it is; the layers that do not carry it keep their weights.

        Two channels carry its positive and its negative part.
        """
        with torch.no_grad():
            self.step_size.zero_()
            self.main_in.weight[:2] = 0.0
            self.main_in.weight[:2, 0, 1, 1] = torch.tensor([1.0, -1.0])
            for layer in (self.main_out, self.inverse_in):
                layer.weight[:2] = 0.0
            self.main_out.weight[:2, :2, 1, 1] = torch.eye(2)
            kept = 0.7 if self.dynamic is not None else 1.0
            split = torch.tensor([[1.0, -1.0], [-1.0, 1.0]]) / kept
            self.inverse_in.weight[:2, :2, 1, 1] = split
            self.inverse_out.weight.zero_()
            self.inverse_out.weight[0, :2, 1, 1] = torch.tensor([1.0, -1.0])
            self.threshold.pass_on()

    def _inverse(self, features: Tensor) -> Tensor:
        """F̃: back to the map (B, 1, cn, cn)."""
        return self.inverse_out(F.relu(self.inverse_in(features)))


class _DynamicBranch(nn.Module):
    """Each sample's r through the 3 × 3 kernel its own s gives: (B, 1, cn, cn)."""

    def __init__(self, config: DistaNet.Config) -> None:
        super().__init__()
        self.kernel_in = nn.Linear((config.c * config.size_px) ** 2, config.hidden)
        self.kernel_out = nn.Linear(config.hidden, 9)

    def forward(self, s_BL: Tensor, r: Tensor) -> Tensor:
        return torch.sigmoid(_filtered(r, self.kernel_out(self.kernel_in(s_BL))))


class _DynamicThreshold(nn.Module):
    """θ relative to each feature's value, from two receptive fields weighed by two masks."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.depthwise = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)
        self.near = nn.Conv2d(channels, half, 1)
        self.far = nn.Conv2d(channels, half, 1)
        self.masks = nn.Conv2d(2, 2, 3, padding=1)
        self.out = nn.Conv2d(half, channels, 1)

    def forward(self, features: Tensor) -> Tensor:
        near = self.near(features)
        far = self.far(self.depthwise(features))
        both = torch.cat([near, far], dim=1)
        pooled = torch.cat([both.mean(dim=1, keepdim=True), both.amax(dim=1, keepdim=True)], dim=1)
        masks = torch.sigmoid(self.masks(pooled))
        return self.out(masks[:, :1] * near + masks[:, 1:] * far) * features

    def pass_on(self) -> None:
        """No threshold."""
        for parameter in self.out.parameters():
            nn.init.zeros_(parameter)


class _FixedThreshold(nn.Module):
    """One learnt θ for all features, as in ISTA-Net."""

    def __init__(self) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.tensor(0.01))

    def forward(self, _features: Tensor) -> Tensor:
        return self.value

    def pass_on(self) -> None:
        """No threshold."""
        nn.init.zeros_(self.value)


class _Rewritten(nn.Module):
    """DISTA-Net with the same result from fewer operations, for engines.

    - Φ is separable, so ΦᵀΦ s is G S G with G of cn × cn, and Φᵀ z is needed once.
    - The two layers that make the dynamic kernel have nothing between them: they are one.
    - 0.7 goes into the weights before it.
    - Soft threshold at θ = k v: v·max(1 − k, 0) for v > 0, v·max(1 + k, 0) below; no sign, no |v|.
    - Mean and maximum over both fields come from those of each: they need not be joined first.
    """

    def __init__(self, network: DistaNet) -> None:
        super().__init__()
        config = network.config
        self.side = network.side
        response = pixel_response(cell_centres_px(config.size_px, config.c), config.size_px,
                                  config.sigma_px)  # fmt: skip
        across = torch.tensor(response)  # (cn, n)
        self.register_buffer("across", across.float())
        self.register_buffer("gram", (across @ across.T).float())
        self.register_buffer("initial", network.get_buffer("initial"))
        self.stages = nn.ModuleList(_RewrittenStage(stage) for stage in network.unfolded)

    def forward(self, patch: Tensor) -> Tensor:
        """Map of intensities (B, cn, cn)."""
        side = self.side
        s = (patch.flatten(1) @ self.get_buffer("initial").T).reshape(-1, side, side)
        across, gram = self.get_buffer("across"), self.get_buffer("gram")
        back = across @ patch @ across.T
        for stage in self.stages:
            s = stage(s, gram @ s @ gram - back)
        return s


class _RewrittenStage(nn.Module):
    def __init__(self, stage: nn.Module) -> None:
        super().__init__()
        assert isinstance(stage, _Stage)  # noqa: S101, for the type checker
        dynamic, threshold = stage.dynamic, stage.threshold
        assert dynamic is not None and isinstance(threshold, _DynamicThreshold)  # noqa: S101
        self.stage, self.threshold = stage, threshold
        self.register_buffer("step_size", stage.step_size.detach())
        inner, outer = dynamic.kernel_in, dynamic.kernel_out
        self.register_buffer("weight", (outer.weight @ inner.weight).detach())  # (9, L)
        self.register_buffer("bias", (outer.weight @ inner.bias + outer.bias).detach())
        self.register_buffer("main_out", 0.7 * stage.main_out.weight.detach())

    def forward(self, s: Tensor, gradient: Tensor) -> Tensor:
        r = (s - self.get_buffer("step_size") * gradient)[:, None]  # (B, 1, cn, cn)
        kernel = F.linear(s.flatten(1), self.get_buffer("weight"), self.get_buffer("bias"))
        features = F.relu(self.stage.main_in(r))
        features = F.conv2d(features, self.get_buffer("main_out"), padding=1)
        features = features + 0.3 * torch.sigmoid(_filtered(r, kernel))
        k = self._threshold(features)
        kept = F.relu(features) * F.relu(1.0 - k) - F.relu(-features) * F.relu(1.0 + k)
        return self.stage.inverse_out(F.relu(self.stage.inverse_in(kept)))[:, 0]

    def _threshold(self, features: Tensor) -> Tensor:
        """θ relative to each feature's value, see `_DynamicThreshold`."""
        layers = self.threshold
        near = layers.near(features)
        far = layers.far(layers.depthwise(features))
        mean = 0.5 * (near.mean(dim=1, keepdim=True) + far.mean(dim=1, keepdim=True))
        most = torch.maximum(near.amax(dim=1, keepdim=True), far.amax(dim=1, keepdim=True))
        masks = torch.sigmoid(layers.masks(torch.cat([mean, most], dim=1)))
        return layers.out(masks[:, :1] * near + masks[:, 1:] * far)


def _filtered(r: Tensor, kernel: Tensor) -> Tensor:
    """Each sample's r (B, 1, cn, cn) through its own 3 × 3 kernel (B, 9)."""
    side = r.shape[-1]
    padded = F.pad(r, (1, 1, 1, 1))
    shifted = torch.cat(
        [padded[:, :, i : i + side, j : j + side] for i in range(3) for j in range(3)], dim=1
    )
    return (kernel[:, :, None, None] * shifted).sum(dim=1, keepdim=True)


Network = DistaNet
