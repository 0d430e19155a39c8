"""torch running an exported program, on a GPU if there is one: the reference among the backends.

On a GPU each batch size in use becomes a CUDA graph: its launches are recorded once, before the
engine is ready, and replayed.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from engines.base import IN_FLIGHT, Engine, Kind, Maps, Options, Patches
from engines.build import Build
from engines.cuda.lane import sizes_up_to
from engines.errors import EngineError

WARM_UPS = 3
"""Runs before a CUDA graph is recorded, as torch asks for: libraries choose their kernels then."""


class TorchProgram(Engine[Kind]):
    """Loads `NAME.pt2` and warms it up at its least and its largest batch."""

    def __init__(self, manifest: Kind, model: Path, options: Options) -> None:
        super().__init__(manifest)
        self._device = torch.device("cpu")
        if torch.cuda.is_available():
            self._device = torch.device("cuda", options.device)
        elif threads := options.threads or (manifest.build.threads if manifest.build else None):
            torch.set_num_threads(threads)
        try:
            program = torch.export.load(model).module()
        except Exception as error:
            raise EngineError(
                f"{model}: torch {torch.__version__} cannot read it ({_first_line(error)}); "
                "run `trainer compile MODEL.onnx --target torch` again"
            ) from error
        self._program: Any = program.to(self._device)
        told = [torch.tensor([getattr(options, name)]) for name in manifest.conditions]
        self._told = [value.float().to(self._device) for value in told]
        self._graphs: dict[tuple[int, int], _Graph] = {}
        self._waiting: dict[int, Any] = {}
        try:
            if self._device.type == "cuda":
                self._graphs = {
                    (slot, size): _Graph(self._run, manifest.patch_shape, size, self._device)
                    for slot in range(IN_FLIGHT)
                    for size in sizes_up_to(manifest.max_batch)
                }
            for batch in sorted({1, manifest.max_batch}):
                for _ in range(IN_FLIGHT):
                    self.infer(torch.zeros(batch, *manifest.patch_shape).numpy())
        except (RuntimeError, AssertionError, ValueError) as error:
            raise EngineError(
                f"{model}: does not take patches {manifest.patch_shape} or give maps "
                f"{manifest.map_shape}, its manifest says so ({_first_line(error)}); "
                "compile it again"
            ) from error

    @classmethod
    def misfits(cls, build: Build) -> list[str]:
        """The release of torch: programs of another one may not be readable."""
        here = ".".join(torch.__version__.split("+")[0].split(".")[:2])
        there = ".".join(build.library.split()[-1].split("+")[0].split(".")[:2])
        return [] if here == there else [f"built for torch {there}, here is torch {here}"]

    def _begin(self, slot: int, patch_BHW: Patches) -> None:
        if self._program is None:
            raise RuntimeError(f"engine {self.manifest.name} is closed")
        patch = torch.from_numpy(patch_BHW)
        if self._device.type == "cpu":
            self._waiting[slot] = self._run(patch)
            return
        size = min(n for n in sizes_up_to(self.manifest.max_batch) if n >= len(patch))
        self._waiting[slot] = self._graphs[slot, size].launch(patch)

    def _run(self, patch: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            maps: torch.Tensor = self._program(patch, *self._told)
            return maps

    def _finish(self, slot: int, map_BHW: Maps) -> None:
        maps = self._waiting.pop(slot)
        if not isinstance(maps, torch.Tensor):
            maps = maps.wait()
        map_BHW[...] = maps[: len(map_BHW)].numpy()

    def close(self) -> None:
        """Let go of the program and its graphs."""
        self._program = None
        self._graphs.clear()
        self._waiting.clear()


class _Graph:
    """A CUDA graph of one batch size, between pinned host buffers, on a stream of its own."""

    def __init__(
        self, run: Any, patch_shape: tuple[int, ...], size: int, device: torch.device
    ) -> None:
        pinned = device.type == "cuda"
        self._stream = torch.cuda.Stream(device)
        self._host = torch.zeros(size, *patch_shape, pin_memory=pinned)
        self._given = self._host.to(device, copy=True)
        with torch.cuda.stream(self._stream):
            for _ in range(WARM_UPS):
                made = run(self._given)
        self._stream.synchronize()
        self._made = torch.empty_like(made)
        self._maps = torch.empty(made.shape, dtype=torch.float32, pin_memory=pinned)
        self._graph = _recorded(lambda: self._made.copy_(run(self._given)), self._stream)

    def launch(self, patch: torch.Tensor) -> "_Graph":
        """Copy, compute and copy back, all queued on the stream; fewer patches than the size."""
        self._host[: len(patch)] = patch
        with torch.cuda.stream(self._stream):
            self._given.copy_(self._host, non_blocking=True)
            self._graph.replay()
            self._maps.copy_(self._made, non_blocking=True)
        return self

    def wait(self) -> torch.Tensor:
        """The maps, once they are there; valid until the next launch."""
        self._stream.synchronize()
        return self._maps


def _recorded(queue: Callable[[], Any], stream: Any) -> Any:
    """The graph of what is queued; `replay` runs it again."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        queue()
    return graph


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
