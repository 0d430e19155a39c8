"""How the inner loops of the frame path are compiled: by Numba, cached beside the source.

Arithmetic in the order it is written. A loop is compiled for the types of its arguments, and an
array that is read-only, or begins at an odd address, is another type: give it copies of what was
received, or the first frame waits for the compiler.
"""

from typing import Any

from numba import njit

compiled: Any = njit(cache=True, error_model="numpy")
