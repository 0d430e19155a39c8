"""How the inner loops of the frame path are compiled: by Numba, and cached.

The cache is in NUMBA_CACHE_DIR or beside the source, in a folder for each state of all sources with
such loops: a loop holds those it calls, and Numba looks at its own file only.

Arithmetic in the order it is written. A loop is compiled for the types of its arguments, and an
array that is read-only, or begins at an odd address, is another type: give it what was received
as `read_only`, or copies, or the first frame waits for the compiler.
"""

import hashlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numba
import numpy as np
from numba import njit
from numpy.typing import DTypeLike, NDArray


def _digest() -> str:
    """Of all sources with compiled loops."""
    package = Path(__file__).parent.parent
    sources = (path.read_bytes() for path in sorted(package.rglob("*.py")))
    return hashlib.sha256(b"".join(text for text in sources if b"@compiled" in text)).hexdigest()


def _nothing() -> None:
    pass


def _place_for_cache() -> bool:
    """False where Numba may write neither to NUMBA_CACHE_DIR, the source, nor its user's cache.

    Then every process compiles for itself; for unmixing that takes 17 s of a core.
    """
    try:
        njit(cache=True)(_nothing)
    except RuntimeError:
        return False
    return True


_config: Any = numba.config
_base = Path(_config.CACHE_DIR or Path(__file__).parent / "__pycache__")
_config.CACHE_DIR = str(_base / f"loops-{_digest()[:12]}")
CACHED = _place_for_cache()


def compiled_with(**options: Any) -> Callable[[Any], Any]:
    """Compile a loop when it is first called with arguments of a kind, or read it from the cache.

    options: of Numba's `njit`. Where the cache is full it serves all the same; what finds no room
    is compiled again.
    """

    def decorate(function: Any) -> Any:
        loop: Any = njit(cache=CACHED, error_model="numpy", **options)(function)
        if CACHED:
            loop._cache.save_overload = _if_there_is_room(loop._cache.save_overload)
        return loop

    return decorate


def _if_there_is_room(save: Callable[..., None]) -> Callable[..., None]:
    def saved(*facts: Any) -> None:
        with suppress(OSError):
            save(*facts)

    return saved


compiled = compiled_with()


def read_only(array: NDArray[Any], dtype: DTypeLike | None = None) -> NDArray[Any]:
    """The same values in an array of the one kind loops are compiled for, copied if need be.

    Nothing can be written to it, and it is contiguous, aligned, and of dtype, if that is given.
    """
    view = np.ascontiguousarray(array, dtype).view()
    if not view.flags.aligned:
        view = view.copy()
    view.flags.writeable = False
    return view
