"""What runs a compiled network, whatever is underneath."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from types import TracebackType
from typing import Literal, Self

import numpy as np
from numpy.typing import NDArray

from engines.manifest import Manifest

Patches = NDArray[np.float32]
Maps = NDArray[np.float32]


@dataclass(frozen=True)
class Options:
    """How a backend is to compute.

    precision: of the arithmetic inside; maps are float32 either way. threads: None = the
    backend's own choice.
    """

    precision: Literal["f32", "bf16"] = "f32"
    threads: int | None = None


class Engine(ABC):
    """A loaded network, ready to run; use it from one thread, and close it there.

    A backend is a class with `__init__(manifest, model, options)` and the two methods at the end.
    """

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest

    def infer(self, patch_BHW: Patches) -> Maps:
        """Maps (B, *manifest.map_shape) of patches (B, *manifest.patch_shape), for any B ≥ 0.

        Both are float32. The patches stay the caller's and are only read; the maps are a new
        array, the caller's own. More than `manifest.max_batch` patches are inferred in parts.
        Raises ValueError for another shape or type.
        """
        shape = self.manifest.patch_shape
        if patch_BHW.shape[1:] != shape or patch_BHW.dtype != np.float32:
            raise ValueError(
                f"patches must be float32 (B, {', '.join(map(str, shape))}), "
                f"got {patch_BHW.dtype} {patch_BHW.shape}"
            )
        patch_BHW = np.ascontiguousarray(patch_BHW)
        map_BHW = np.empty((len(patch_BHW), *self.manifest.map_shape), np.float32)
        for start in range(0, len(patch_BHW), self.manifest.max_batch):
            part = slice(start, start + self.manifest.max_batch)
            self._infer_into(map_BHW[part], patch_BHW[part])
        return map_BHW

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @abstractmethod
    def _infer_into(self, map_BHW: Maps, patch_BHW: Patches) -> None:
        """Fill the maps of 1 to max_batch patches; both arrays are contiguous and borrowed."""

    @abstractmethod
    def close(self) -> None:
        """Release what the engine holds; it cannot infer any more. Twice does no harm."""
