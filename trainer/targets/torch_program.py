"""torch: an exported program, the network's graph and weights without its classes."""

from copy import deepcopy
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from engines.build import Precision
from trainer.export import dynamic_shapes, example
from trainer.network import UnmixingNetwork
from trainer.targets import BuildFacts, cpu_name

DTYPE = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


class _Cast(nn.Module):
    """Computes in another precision; patches, conditions and maps stay float32."""

    def __init__(self, network: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.network, self.dtype = network.to(dtype), dtype

    def forward(self, patch: Tensor, *told: Tensor) -> Tensor:
        maps: Tensor = self.network(patch.to(self.dtype), *(value.to(self.dtype) for value in told))
        return maps.float()


def build(network: UnmixingNetwork, precision: Precision, out: Path) -> BuildFacts:
    """Write the program."""
    inner = deepcopy(network).as_engine()  # its weights are about to be rounded
    module = inner if precision == "f32" else _Cast(inner, DTYPE[precision])
    shapes: Any = dynamic_shapes(network)
    if precision != "f32" and network.conditions:  # `told` is one argument, a tuple
        shapes = (shapes[0], shapes[1:])
    with torch.no_grad():
        program = torch.export.export(module.eval(), example(network), dynamic_shapes=shapes)
    torch.export.save(program, out)
    return BuildFacts(f"torch {version('torch')}", cpu_name())
