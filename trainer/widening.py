"""Layers of a wider network that compute what a narrower one's do.

Net2Net (Chen, Goodfellow and Shlens, ICLR 2016): a channel is repeated, and what reads it is
shared out among its copies, unevenly, so that training drives them apart.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

LEAST_SHARE = 0.3
"""Of a reading that each of two copies gets at least, before more copies share it."""


def can_widen(shape: Sequence[int], wanted: Sequence[int]) -> bool:
    """Whether outputs and inputs (the first two sizes) are whole multiples, all else alike."""
    return len(shape) == len(wanted) and all(
        new == old or (place < 2 and new % old == 0)
        for place, (old, new) in enumerate(zip(shape, wanted, strict=True))
    )


def widened(weight: Tensor, wanted: Sequence[int]) -> Tensor:
    """Weight or bias (out, …) of a layer repeated to the shape `wanted`; global random stream.

    Channel j of the wider network is a copy of channel j mod n, among inputs and outputs alike.
    """
    wide = weight[torch.arange(wanted[0]) % weight.shape[0]] if weight.ndim else weight
    if weight.ndim < 2 or wanted[1] == weight.shape[1]:
        return wide.clone()
    inputs = weight.shape[1]
    copies = wanted[1] // inputs
    share = LEAST_SHARE + (1.0 - 2.0 * LEAST_SHARE) * torch.rand(wanted[0], copies, inputs)
    share = (share / share.sum(dim=1, keepdim=True)).flatten(1)  # (out, copies · inputs)
    wide = wide[:, torch.arange(wanted[1]) % inputs]
    return wide * share.reshape(wanted[0], wanted[1], *[1] * (weight.ndim - 2))


def widened_state(state: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a narrower network in the shapes of `wanted`, which has their names.

    Raises RuntimeError, as `load_state_dict` does, if it cannot be done.
    """
    misfits = [
        n for n in state if n not in wanted or not can_widen(state[n].shape, wanted[n].shape)
    ]
    if misfits:
        raise RuntimeError(f"cannot be widened: {', '.join(misfits)}")
    return {name: widened(weight, wanted[name].shape) for name, weight in state.items()}
