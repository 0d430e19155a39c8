"""What runs a compiled network, whatever is underneath."""

import contextlib
from abc import ABC, abstractmethod
from collections import deque
from dataclasses import dataclass
from types import TracebackType
from typing import Generic, Literal, Self

import numpy as np
from numpy.typing import NDArray
from typing_extensions import TypeVar

from engines.build import Build
from engines.manifest import EngineManifest, Manifest

Patches = NDArray[np.float32]
Maps = NDArray[np.float32]
Kind = TypeVar("Kind", bound=EngineManifest, default=Manifest)
"""What the engine says of itself: `Engine` alone is one that unmixes."""

IN_FLIGHT = 2
"""Batches that may be submitted before a result is fetched: one computes while one is copied."""


@dataclass(frozen=True)
class Options:
    """How a backend is to compute.

    precision: of the arithmetic inside; maps are float32 either way. threads: of a CPU, None = the
    backend's own choice. A model that was built has both in its manifest, and threads given here
    go before that. sigma_px: told to a network that asks for it (`manifest.conditions`). device:
    number of the GPU.
    """

    precision: Literal["f32", "bf16"] = "f32"
    threads: int | None = None
    sigma_px: float | None = None
    device: int = 0


class Engine(ABC, Generic[Kind]):
    """A loaded network, warm and ready to run; use it from one thread, and close it there.

    A backend is a class with `__init__(manifest, model, options)`, which raises EngineError for a
    model that is not what its manifest says, and the methods at the end.

    Who owns what: patches are borrowed and only read, until the result of their batch has been
    fetched; maps are written into `out`, the caller's own, or into a new array, the caller's too.
    """

    def __init__(self, manifest: Kind) -> None:
        self.manifest = manifest
        self._submitted: deque[tuple[int, Patches]] = deque()
        self._slot = 0

    def infer(self, patch_BHW: Patches, out: Maps | None = None) -> Maps:
        """Maps (B, *manifest.map_shape) of patches (B, *manifest.patch_shape), for any B ≥ 0.

        Both are float32. More than `manifest.max_batch` patches are inferred in parts, one being
        copied while another computes. Raises ValueError for another shape or type, RuntimeError
        while a submitted batch is waiting.
        """
        self._check(patch_BHW, self.manifest.patch_shape, "patches")
        out = self._room(out, len(patch_BHW))
        if self._submitted:
            raise RuntimeError("fetch the results of what was submitted before inferring")
        most = self.manifest.max_batch
        parts = [slice(start, start + most) for start in range(0, len(patch_BHW), most)]
        waiting: deque[slice] = deque()
        try:
            for part in parts:
                if len(waiting) == IN_FLIGHT:
                    self.result(out[waiting.popleft()])
                self.submit(patch_BHW[part])
                waiting.append(part)
            for part in waiting:
                self.result(out[part])
        except BaseException:
            self._forget()
            raise
        return out

    def _forget(self) -> None:
        """Wait for what is in flight and drop it, so that the next call begins afresh."""
        while self._submitted:
            slot, patch_BHW = self._submitted.popleft()
            with contextlib.suppress(Exception):
                self._finish(slot, self._room(None, len(patch_BHW)))

    def submit(self, patch_BHW: Patches) -> None:
        """Begin to infer 1 to max_batch patches and return at once; see `result`.

        They must not be changed until then. Raises ValueError for another shape, type or number,
        RuntimeError if IN_FLIGHT batches are waiting already.
        """
        self._check(patch_BHW, self.manifest.patch_shape, "patches")
        if not 1 <= len(patch_BHW) <= self.manifest.max_batch:
            raise ValueError(
                f"submit takes 1 to {self.manifest.max_batch} patches, got {len(patch_BHW)}; "
                "use infer"
            )
        if len(self._submitted) == IN_FLIGHT:
            raise RuntimeError(f"{IN_FLIGHT} batches are in flight; fetch a result first")
        patch_BHW = np.ascontiguousarray(patch_BHW)
        self._begin(self._slot, patch_BHW)
        self._submitted.append((self._slot, patch_BHW))
        self._slot = (self._slot + 1) % IN_FLIGHT

    def result(self, out: Maps | None = None) -> Maps:
        """Wait for the maps of the batch that was submitted first.

        out: where to write them, float32, contiguous, of their shape. Raises RuntimeError if
        nothing was submitted.
        """
        if not self._submitted:
            raise RuntimeError("nothing was submitted")
        slot, patch_BHW = self._submitted[0]
        out = self._room(out, len(patch_BHW))
        self._submitted.popleft()
        self._finish(slot, out)
        return out

    def _room(self, out: Maps | None, number: int) -> Maps:
        shape = (number, *self.manifest.map_shape)
        if out is None:
            return np.empty(shape, np.float32)
        self._check(out, self.manifest.map_shape, "out")
        if len(out) != number or not out.flags.c_contiguous or not out.flags.writeable:
            raise ValueError(f"out must be a contiguous array {shape} that can be written to")
        return out

    @staticmethod
    def _check(array: NDArray[np.float32], shape: tuple[int, ...], what: str) -> None:
        if array.shape[1:] != shape or array.dtype != np.float32:
            raise ValueError(
                f"{what} must be float32 (B, {', '.join(map(str, shape))}), "
                f"got {array.dtype} {array.shape}"
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @classmethod
    def misfits(cls, build: Build) -> list[str]:  # noqa: ARG003
        """What of this machine is not what a model was built for, a line each.

        E.g. "built for tensorrt 10.9.0, here is tensorrt 10.12.0".
        """
        return []

    @abstractmethod
    def _begin(self, slot: int, patch_BHW: Patches) -> None:
        """Start on 1 to max_batch contiguous patches; slot: 0 to IN_FLIGHT − 1, free by then."""

    @abstractmethod
    def _finish(self, slot: int, map_BHW: Maps) -> None:
        """Wait for what was begun in this slot and write its maps."""

    @abstractmethod
    def close(self) -> None:
        """Release what the engine holds; it cannot infer any more. Twice does no harm."""
