"""CUDA graphs: what was queued on a stream once, launched again by one call."""

import ctypes
from collections.abc import Callable

from engines.cuda.driver import call
from engines.errors import EngineError

THREAD_LOCAL = 1
"""Capture mode: what other threads do meanwhile is no error."""


class Graph:
    """What `queue` puts on the stream, recorded; nothing of it runs before `launch`.

    The stream is a CUstream as an integer. Addresses and sizes are recorded with the calls.
    """

    def __init__(self, stream: int, queue: Callable[[], None]) -> None:
        self._stream = ctypes.c_void_p(stream)
        graph, self._exec = ctypes.c_void_p(), ctypes.c_void_p()
        call("cuStreamBeginCapture_v2", self._stream, THREAD_LOCAL)
        try:
            queue()
        except BaseException:
            _abandon(self._stream)
            raise
        call("cuStreamEndCapture", self._stream, ctypes.byref(graph))
        try:
            call("cuGraphInstantiateWithFlags", ctypes.byref(self._exec), graph, ctypes.c_uint64(0))
        finally:
            call("cuGraphDestroy", graph)

    def launch(self) -> None:
        """Queue it on its stream; returns at once."""
        call("cuGraphLaunch", self._exec, self._stream)

    def close(self) -> None:
        """Forget it; it must not be running."""
        call("cuGraphExecDestroy", self._exec)


def _abandon(stream: ctypes.c_void_p) -> None:
    """End a capture that failed; what it says of that adds nothing to the failure."""
    graph = ctypes.c_void_p()
    try:
        call("cuStreamEndCapture", stream, ctypes.byref(graph))
    except EngineError:
        return
    call("cuGraphDestroy", graph)
