"""A GPU's primary context, entered for each use by the thread that made it."""

import threading
from types import TracebackType
from typing import Any

from engines.cuda.driver import call, explained, gpu
from engines.errors import EngineError


class Context:
    """`with context:` makes it current; what CUDA says inside becomes an EngineError.

    The primary context is the one TensorRT and torch use too. It is entered anew each time, since
    pycuda ends the process with abort() if one is left behind. Raises EngineError without a driver,
    without that GPU, without pycuda, and in another thread than the one that made it.
    """

    def __init__(self, number: int) -> None:
        self.gpu = gpu(number)
        try:
            import pycuda.driver as cuda
        except ImportError as error:
            raise EngineError(
                f"pycuda is not installed ({error}); `pip install irst-pipeline[gpu]` with a CUDA "
                "toolkit at hand"
            ) from error
        self.cuda: Any = cuda
        self._thread = threading.get_ident()
        try:
            cuda.init()
            self._context = cuda.Device(number).retain_primary_context()
        except cuda.Error as error:
            raise EngineError(explained(error)) from error

    def __enter__(self) -> None:
        if threading.get_ident() != self._thread:
            raise EngineError(
                f"used from thread {threading.current_thread().name}; a GPU engine belongs to the "
                "thread that loaded it: load one there"
            )
        try:
            self._context.push()
        except self.cuda.Error as error:
            raise EngineError(explained(error)) from error

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.cuda.Context.pop()
        if isinstance(error, self.cuda.Error):
            raise EngineError(explained(error)) from error

    def close(self) -> None:
        """Give the context back; call it once, outside of `with`."""
        self._context.detach()  # pushes it, and leaves it there when it is a primary one
        call("cuCtxPopCurrent_v2", _ignored())


def _ignored() -> Any:
    import ctypes

    return ctypes.byref(ctypes.c_void_p())
