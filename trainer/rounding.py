"""INT8 in training: a network that computes as its engine in eight bits will.

Quantisation-aware training (Jacob et al., CVPR 2018): the convolutions where the time goes round
what goes into them, and their weights, to 255 steps around zero; gradients pass as if they did not
(straight through). Channels of very different sizes share the steps better once each is divided by
a factor, by which the weights that read it are multiplied (SmoothQuant, Xiao et al., ICML 2023).
`trainer.int8` does the same to an engine's graph.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

LEVELS = 127
"""Steps to either side of zero."""

WITHIN = 0.999
"""Share of a channel's values that its range holds; what is beyond is clipped."""

SMOOTHING = 0.9
"""Of a channel's size how much its weights take over: 0 none, 1 all (its exponent)."""

LEAST = 1e-3
"""Sizes of channels and weights count as at least that."""

LEAST_SHARE = 0.2
"""A convolution with fewer weights than this share of the largest's is cheap and stays exact."""


def round_to_int8(network: nn.Module) -> None:
    """Let the convolutions where the time goes compute as in INT8, in place; same parameters."""
    found = [module for module in network.modules() if isinstance(module, nn.Conv2d)]
    most = max((convolution.weight.numel() for convolution in found), default=0)
    for convolution in found:
        if convolution.weight.numel() >= LEAST_SHARE * most:
            convolution.__class__ = RoundedConv2d


class RoundedConv2d(nn.Conv2d):
    """A convolution in INT8: one range for its input, one for each channel that it makes."""

    def forward(self, features: Tensor) -> Tensor:
        """See `torch.nn.Conv2d`; ranges are those of the batch."""
        with torch.no_grad():
            size = _within(features)
            factor, largest = smoothing(size, self.weight.abs().amax(dim=(0, 2, 3)))
            factor = factor[:, None, None]
        weight = self.weight * factor
        weight = rounded(weight, weight.detach().abs().amax(dim=(1, 2, 3), keepdim=True))
        features = torch.clamp(features / factor, -largest, largest)
        return self._conv_forward(rounded(features, largest), weight, self.bias)


def smoothing(size: Any, weight: Any) -> tuple[Any, Any]:
    """Factors (C,) that channels are divided by, and the range of them all after that.

    size: (C,) range of each channel of the input; weight: (C,) the largest that reads it. Of torch
    or numpy.
    """
    size, weight = size.clip(LEAST), weight.clip(LEAST)
    factor = size**SMOOTHING / weight ** (1.0 - SMOOTHING)
    return factor, (size / factor).max()


def rounded(exact: Tensor, largest: Tensor) -> Tensor:
    """The nearest of 2 · 127 + 1 values from −largest to largest; the gradient is the exact one's.

    largest: broadcasts against `exact`, and nothing is beyond it.
    """
    step = largest.clip(LEAST) / LEVELS
    return exact + (torch.round(exact / step) * step - exact).detach()


def _within(features: Tensor) -> Tensor:
    """What a share WITHIN of each channel's values (C,) is within."""
    values = features.float().abs().transpose(0, 1).flatten(1)
    beyond = max(1, math.ceil((1.0 - WITHIN) * values.shape[1]))
    return torch.topk(values, beyond, dim=1, sorted=False).values.amin(dim=1)
