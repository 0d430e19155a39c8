"""The parts of libreyolo (MIT) that are used: blocks, head and loss of its YOLOv9.

libreyolo wants torchvision, of which what is used here needs nothing. Where torchvision is not
installed, a stand-in takes its place while libreyolo is imported: modules whose names are empty
classes, which fail if one is ever called.
"""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

from trainer.errors import TrainerError

ABSENT = "torchvision"


class _StandIn(ModuleType):
    __path__: list[str] = []  # noqa: RUF012, so that it can have modules in it

    def __getattr__(self, name: str) -> type[Any]:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


class _Finder(MetaPathFinder, Loader):
    def find_spec(
        self,
        name: str,
        path: Sequence[str] | None,  # noqa: ARG002, the interface
        target: ModuleType | None = None,  # noqa: ARG002
    ) -> ModuleSpec | None:
        return ModuleSpec(name, self, is_package=True) if name.split(".")[0] == ABSENT else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _StandIn(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


@contextmanager
def _without_torchvision() -> Iterator[None]:
    if find_spec(ABSENT) is not None:
        yield
        return
    finder = _Finder()
    sys.meta_path.append(finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for name in [name for name in sys.modules if name.split(".")[0] == ABSENT]:
            del sys.modules[name]


try:
    with _without_torchvision():
        from libreyolo.models.yolo9.nn import (
            ELAN,
            SPPELAN,
            AConv,
            Conv,
            DDetect,
            RepConvN,
            RepNCSPELAN,
        )
except ImportError as error:
    raise TrainerError(
        f"yolo: needs libreyolo ({error}): pip install --no-deps libreyolo==1.6.0 requests "
        'safetensors tqdm, or "irst-pipeline[yolo]" where torchvision can be had'
    ) from error

__all__ = ["ELAN", "SPPELAN", "AConv", "Conv", "DDetect", "RepConvN", "RepNCSPELAN"]
