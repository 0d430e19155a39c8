"""One batch on its way through the GPU: copied there, computed, copied back.

An engine has as many lanes as batches may be in flight. Each has a stream and buffers of its own,
so while one computes another copies. Everything is allocated when a lane is made, and for each
batch size in use the whole way is one CUDA graph: a batch is one call to the driver.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engines.cuda.context import Context
from engines.cuda.graph import Graph

Enqueue = Callable[[int, int, int, int], None]
"""Called with (stream, input, output, batch), a CUstream and device addresses as integers: queue
the work for so many patches and return. May run twice for each batch size, once while recorded."""

NON_BLOCKING = 1
"""Flag of a stream: does not wait for the default stream."""


def sizes_up_to(most: int) -> list[int]:
    """Batch sizes in use: powers of two and the largest. A batch runs as the next one above."""
    return [2**power for power in range((most - 1).bit_length())] + [most]


class Lane:
    """A stream, pinned host buffers, device buffers, an event, and a graph for each size.

    patch_shape, map_shape: of one patch and its map, float32. Use it inside `with context:`.
    """

    def __init__(
        self,
        context: Context,
        enqueue: Enqueue,
        patch_shape: Sequence[int],
        map_shape: Sequence[int],
        most: int,
    ) -> None:
        self._cuda: Any = context.cuda
        self._enqueue = enqueue
        with ExitStack() as made:
            self._stream = self._cuda.Stream(NON_BLOCKING)
            self._done = self._cuda.Event(self._cuda.event_flags.DISABLE_TIMING)
            self._patch = self._pinned(made, (most, *patch_shape))
            self._map = self._pinned(made, (most, *map_shape))
            self._input = self._allocated(made, self._patch.nbytes)
            self._output = self._allocated(made, self._map.nbytes)
            self._graphs = {size: self._recorded(made, size) for size in sizes_up_to(most)}
            self._held = made.pop_all()

    def begin(self, patch_B: NDArray[np.float32]) -> None:
        """Copy patches away and start on them; the lane must be free."""
        self._patch[: len(patch_B)] = patch_B
        size = min(size for size in self._graphs if size >= len(patch_B))
        self._graphs[size].launch()
        self._done.record(self._stream)

    def finish(self, map_B: NDArray[np.float32]) -> None:
        """Wait for what was begun and copy its maps."""
        self._done.synchronize()
        map_B[...] = self._map[: len(map_B)]

    def close(self) -> None:
        """Wait for what runs, then free everything, the last made first."""
        try:
            self._stream.synchronize()
        finally:
            self._graphs = {}
            self._held.close()
            del self._stream, self._done

    def _pinned(self, made: ExitStack, shape: tuple[int, ...]) -> NDArray[np.float32]:
        array: NDArray[np.float32] = self._cuda.pagelocked_empty(shape, np.float32)
        array[...] = 0.0  # what fills up a batch is finite from the first
        made.callback(array.base.free)  # type: ignore[union-attr]
        return array

    def _allocated(self, made: ExitStack, size: int) -> Any:
        memory = self._cuda.mem_alloc(size)
        made.callback(memory.free)
        return memory

    def _recorded(self, made: ExitStack, size: int) -> Graph:
        """Run once as it is, so that nothing is chosen or allocated while it is recorded."""
        self._queue(size)
        self._stream.synchronize()
        graph = Graph(self._stream.handle, lambda: self._queue(size))
        made.callback(graph.close)
        return graph

    def _queue(self, size: int) -> None:
        self._cuda.memcpy_htod_async(self._input, self._patch[:size], self._stream)
        self._enqueue(self._stream.handle, int(self._input), int(self._output), size)
        self._cuda.memcpy_dtoh_async(self._map[:size], self._output, self._stream)
