"""Networks by name: the file `trainer/networks/NAME.py`, loaded when it is named."""

from importlib import import_module
from pkgutil import iter_modules
from typing import Any

from pydantic import ValidationError

import trainer.networks
from engines.errors import first_fault
from trainer.errors import TrainerError
from trainer.network import UnmixingNetwork


def available() -> list[str]:
    """Names of all networks."""
    return sorted(module.name for module in iter_modules(trainer.networks.__path__))


def network_class(name: str) -> type[UnmixingNetwork]:
    """The class `Network` of trainer/networks/NAME.py."""
    if name not in available():
        raise TrainerError(
            f"network: no `{name}` in trainer/networks; use {', '.join(available())}"
        )
    found: type[UnmixingNetwork] = import_module(f"trainer.networks.{name}").Network
    return found


def build(name: str, settings: dict[str, Any]) -> UnmixingNetwork:
    """A network with fresh weights; `settings` are the fields of its Config.

    Raises TrainerError naming the network or the setting that does not exist or cannot be.
    """
    network: Any = network_class(name)
    try:
        config = network.Config(**settings)
    except ValidationError as error:
        known = ", ".join(network.Config.model_fields)
        raise TrainerError(f"{name} settings: {first_fault(error)}; known: {known}") from error
    for field in ("size_px", "c"):
        if getattr(config, field) % 2 == 0:
            raise TrainerError(
                f"{name} settings: {field} must be odd, got {getattr(config, field)}"
            )
    built: UnmixingNetwork = network(config)
    return built
