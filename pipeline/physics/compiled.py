"""How the inner loops of the frame path are compiled: by Numba, cached beside the source.

Arithmetic in the order it is written. A loop is compiled for the types of its arguments, and an
array that is read-only, or begins at an odd address, is another type: give it copies of what was
received, or the first frame waits for the compiler.
"""

from typing import Any

from numba import njit


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


CACHED = _place_for_cache()
compiled: Any = njit(cache=CACHED, error_model="numpy")
