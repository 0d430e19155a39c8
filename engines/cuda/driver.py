"""The NVIDIA driver itself, by ctypes: what pycuda 2026.1 lacks or hides.

That is CUDA graphs, the codes of errors, and which GPU is here, which must be known where pycuda
is not installed. All else goes through pycuda.
"""

import ctypes
import re
from functools import cache
from typing import Any, NamedTuple

from engines.errors import EngineError

REMEDY = {
    2: "the GPU's memory is full; compile with a smaller --max-batch, or end what else uses it",
    35: "install a newer driver",
    100: "is one installed, and does CUDA_VISIBLE_DEVICES show it?",
    200: "compile it again for this GPU",
    209: "compile it again for this GPU",
    214: "the GPU's memory is defective; see `nvidia-smi -q`",
    700: "the engine wrote outside its buffers; start again, and compile it again if it persists",
    702: "a kernel ran too long, as on a GPU that drives a screen",
    719: "the GPU stopped; start again, and see the kernel's log for Xid",
    802: "the machine's GPU fabric is not ready; is nvidia-fabricmanager running?",
    803: "driver and library are of different versions; restart after the update",
    804: "this driver does not serve this GPU",
    900: "the engine does what a CUDA graph cannot hold",
    901: "the engine does what a CUDA graph cannot hold",
}
"""What to do about a CUresult."""

COMPUTE_CAPABILITY = (75, 76)  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, _MINOR
CODES = 1000
"""CUresult is below this."""


class Gpu(NamedTuple):
    """What an engine is built for."""

    name: str  # e.g. NVIDIA H200
    compute_capability: str  # e.g. 9.0
    driver: str  # the CUDA version it serves, e.g. 13.0


def gpu(number: int) -> Gpu:
    """The GPU of this number; raises EngineError if there is none, or no driver."""
    call("cuInit", 0)
    count, version, device = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    call("cuDeviceGetCount", ctypes.byref(count))
    if not 0 <= number < count.value:
        raise EngineError(f"device {number}: this machine has {count.value} GPUs, from 0")
    call("cuDeviceGet", ctypes.byref(device), number)
    call("cuDriverGetVersion", ctypes.byref(version))
    name = ctypes.create_string_buffer(256)
    call("cuDeviceGetName", name, len(name), device)
    capability = []
    for attribute in COMPUTE_CAPABILITY:
        value = ctypes.c_int()
        call("cuDeviceGetAttribute", ctypes.byref(value), attribute, device)
        capability.append(value.value)
    return Gpu(
        name=name.value.decode(errors="replace"),
        compute_capability=".".join(map(str, capability)),
        driver=f"{version.value // 1000}.{version.value % 1000 // 10}",
    )


def call(name: str, *arguments: Any) -> None:
    """Call the driver; raises EngineError with the call, its code and what it means."""
    code = getattr(_driver(), name)(*arguments)
    if code:
        raise EngineError(described(name, code))


def described(name: str, code: int) -> str:
    """A failed call as words, e.g. "cuMemAlloc: out of memory (CUDA_ERROR_OUT_OF_MEMORY, 2)"."""
    words = f"{name}: {_text('cuGetErrorString', code)} ({_text('cuGetErrorName', code)}, {code})"
    return f"{words}; {REMEDY[code]}" if code in REMEDY else words


def explained(error: Exception) -> str:
    """The same of an error of pycuda, which says "cuMemAlloc failed: out of memory"."""
    found = re.match(r"(\w+) failed: (.*)", str(error).strip())
    if not found:
        return " ".join(str(error).split()) or type(error).__name__
    name, meaning = found.groups()
    for code in range(1, CODES):
        if meaning.startswith(_text("cuGetErrorString", code)):
            return described(name, code)
    return f"{name}: {meaning}"


def _text(function: str, code: int) -> str:
    text = ctypes.c_char_p()
    getattr(_driver(), function)(code, ctypes.byref(text))
    return text.value.decode() if text.value else "unknown to this driver"


@cache
def _driver() -> Any:
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise EngineError(
            f"no NVIDIA driver is installed here ({error}); a GPU and its driver are needed"
        ) from error
