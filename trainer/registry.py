"""Networks by name: the file `trainer/networks/NAME.py`, loaded when it is named."""

from importlib import import_module
from pkgutil import iter_modules
from typing import Any

from torch import nn

import trainer.networks
from trainer.errors import TrainerError


def available() -> list[str]:
    """Names of all networks."""
    return sorted(module.name for module in iter_modules(trainer.networks.__path__))


def network_class(name: str) -> type[nn.Module]:
    """The class `Network` of trainer/networks/NAME.py."""
    if name not in available():
        raise TrainerError(f"network: no `{name}` in trainer/networks; use {', '.join(available())}")
    found: type[nn.Module] = import_module(f"trainer.networks.{name}").Network
    return found


def build(name: str, settings: dict[str, Any]) -> nn.Module:
    """A network with fresh weights; `settings` are the fields of its Config."""
    network: Any = network_class(name)
    built: nn.Module = network(network.Config(**settings))
    return built
