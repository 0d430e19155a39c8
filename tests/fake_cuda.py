"""A CUDA of our own: what engines/cuda asks of pycuda and of the driver, without a GPU.

Work is queued on streams and done only when somebody waits for it, so a missing wait shows. What
the real one forbids (no current context, a copy from memory that is not pinned, an allocation while
a stream records) is an error here too. `calls` tells what was called, in order.
"""

import ctypes
import sys
import types
from collections import Counter
from collections.abc import Callable

import numpy as np

from engines.cuda import driver

MEANING = {
    2: ("CUDA_ERROR_OUT_OF_MEMORY", "out of memory"),
    100: ("CUDA_ERROR_NO_DEVICE", "no CUDA-capable device is detected"),
    201: ("CUDA_ERROR_INVALID_CONTEXT", "invalid device context"),
    700: ("CUDA_ERROR_ILLEGAL_ADDRESS", "an illegal memory access was encountered"),
    900: (
        "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED",
        "operation not permitted when stream is capturing",
    ),
}


class FakeCuda:
    """One GPU. fail: call → code it fails with, e.g. {"cuMemAlloc": 2}."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.fail: dict[str, int] = {}
        self.name, self.capability, self.version, self.gpus = "NVIDIA Fake", (8, 6), 13000, 1
        self.current: list[object] = []  # contexts, the last is current
        self.retained = 0
        self.memory: dict[int, np.ndarray] = {}  # of the GPU, by address
        self.pinned: dict[int, np.ndarray] = {}
        self.streams: dict[int, list[Callable[[], None]]] = {}
        self.recording: dict[int, list[Callable[[], None]]] = {}
        self.graphs: dict[int, list[Callable[[], None]]] = {}
        self.driver = self._pycuda_driver()

    def install(self, monkeypatch) -> None:
        package = types.ModuleType("pycuda")
        package.driver = self.driver
        monkeypatch.setitem(sys.modules, "pycuda", package)
        monkeypatch.setitem(sys.modules, "pycuda.driver", self.driver)
        monkeypatch.setattr(driver, "_driver", lambda: Library(self))

    def counted(self) -> Counter[str]:
        return Counter(self.calls)

    def floats(self, address: int, number: int) -> np.ndarray:
        """What a kernel sees at an address of the GPU."""
        held = self.memory[address].view(np.float32)
        assert len(held) >= number, "beyond its buffer"
        return held[:number]

    def queue(self, stream: int, work: Callable[[], None]) -> None:
        self.recording.get(stream, self.streams[stream]).append(work)

    def wait(self, stream: int) -> None:
        work, self.streams[stream][:] = self.streams[stream][:], []
        for done in work:
            done()

    def called(self, call: str, context: bool = True) -> None:
        self.calls.append(call)
        code = self.fail.get(call)
        if context and not self.current:
            code = 201
        if call.startswith(("cuMem", "cuStreamSync")) and "Async" not in call and self.recording:
            code = 900
        if code:
            raise self.driver.Error(f"{call} failed: {MEANING[code][1]}")

    def _pycuda_driver(self) -> types.ModuleType:
        fake = self
        module = types.ModuleType("pycuda.driver")

        class Error(Exception):
            pass

        class Context:
            def push(self) -> None:
                fake.called("cuCtxPushCurrent", context=False)
                fake.current.append(self)

            @staticmethod
            def pop() -> None:
                fake.called("cuCtxPopCurrent")
                fake.current.pop()

            def detach(self) -> None:
                assert self not in fake.current
                fake.called("cuDevicePrimaryCtxRelease", context=False)
                fake.current.append(self)  # as pycuda does with a primary context
                fake.retained -= 1

        class Device:
            def __init__(self, number: int) -> None:
                self.number = number

            def retain_primary_context(self) -> Context:
                fake.called("cuDevicePrimaryCtxRetain", context=False)
                fake.retained += 1
                return Context()

        class Stream:
            def __init__(self, flags: int = 0) -> None:
                fake.called("cuStreamCreate")
                self.handle = 100 + len(fake.streams)
                fake.streams[self.handle] = []

            def synchronize(self) -> None:
                fake.called("cuStreamSynchronize")
                fake.wait(self.handle)

        class Event:
            def __init__(self, flags: int = 0) -> None:
                fake.called("cuEventCreate")

            def record(self, stream: Stream) -> None:
                fake.called("cuEventRecord")
                self.stream = stream

            def synchronize(self) -> None:
                fake.called("cuEventSynchronize")
                fake.wait(self.stream.handle)

        class Allocation:
            def __init__(self, size: int) -> None:
                fake.called("cuMemAlloc")
                held = np.full(size, 255, np.uint8)  # NaN until written
                self.address = held.ctypes.data
                fake.memory[self.address] = held

            def __int__(self) -> int:
                return self.address

            def free(self) -> None:
                fake.called("cuMemFree")
                del fake.memory[self.address]

        class Host:
            def __init__(self, shape, dtype) -> None:
                fake.called("cuMemHostAlloc")
                self.held = np.full(shape, np.nan, dtype)
                self.__array_interface__ = self.held.__array_interface__
                fake.pinned[self.held.ctypes.data] = self.held

            def free(self) -> None:
                fake.called("cuMemFreeHost")
                del fake.pinned[self.held.ctypes.data]

        def pagelocked_empty(shape, dtype) -> np.ndarray:
            return np.asarray(Host(shape, dtype))

        def is_pinned(array: np.ndarray) -> bool:
            return array.flags.c_contiguous and array.ctypes.data in fake.pinned

        def memcpy_htod(to: Allocation, array: np.ndarray) -> None:
            fake.called("cuMemcpyHtoD")
            fake.memory[int(to)][: array.nbytes] = array.view(np.uint8).ravel()

        def memcpy_htod_async(to: Allocation, array: np.ndarray, stream: Stream) -> None:
            fake.called("cuMemcpyHtoDAsync")
            assert is_pinned(array)
            held = fake.memory[int(to)]

            def copy() -> None:
                held[: array.nbytes] = array.view(np.uint8).ravel()

            fake.queue(stream.handle, copy)

        def memcpy_dtoh_async(array: np.ndarray, source: Allocation, stream: Stream) -> None:
            fake.called("cuMemcpyDtoHAsync")
            assert is_pinned(array)
            held = fake.memory[int(source)]

            def copy() -> None:
                array[...] = held[: array.nbytes].view(np.float32).reshape(array.shape)

            fake.queue(stream.handle, copy)

        for made in (Error, Context, Device, Stream, Event, pagelocked_empty):
            setattr(module, made.__name__, made)
        for function in (memcpy_htod, memcpy_htod_async, memcpy_dtoh_async):
            setattr(module, function.__name__, function)
        module.mem_alloc = Allocation
        module.init = lambda: fake.called("cuInit", context=False)
        module.event_flags = types.SimpleNamespace(DISABLE_TIMING=2)
        return module


class Library:
    """What engines/cuda calls of libcuda.so.1 itself."""

    def __init__(self, fake: FakeCuda) -> None:
        self.fake = fake

    def __getattribute__(self, name: str):
        found = object.__getattribute__(self, name)
        if not name.startswith("cu") or name.startswith("cuGetError"):
            return found

        def called(*arguments) -> int:
            fake = object.__getattribute__(self, "fake")
            fake.calls.append(name)
            if name in fake.fail:
                return fake.fail[name]
            found(*arguments)
            return 0

        return called

    def cuGetErrorString(self, code, text) -> None:
        if code in MEANING:
            text._obj.value = MEANING[code][1].encode()

    def cuGetErrorName(self, code, text) -> None:
        if code in MEANING:
            text._obj.value = MEANING[code][0].encode()

    def cuInit(self, flags) -> None:
        pass

    def cuDeviceGetCount(self, count) -> None:
        count._obj.value = self.fake.gpus

    def cuDeviceGet(self, device, number) -> None:
        device._obj.value = number

    def cuDriverGetVersion(self, version) -> None:
        version._obj.value = self.fake.version

    def cuDeviceGetName(self, text, size, device) -> None:
        text.value = self.fake.name.encode()

    def cuDeviceGetAttribute(self, value, attribute, device) -> None:
        value._obj.value = self.fake.capability[attribute - 75]

    def cuCtxPopCurrent_v2(self, context) -> None:
        self.fake.current.pop()

    def cuStreamBeginCapture_v2(self, stream, mode) -> None:
        assert mode == 1
        self.fake.recording[stream.value] = []

    def cuStreamEndCapture(self, stream, graph) -> None:
        graph._obj.value = 1000 + self.fake.calls.count("cuStreamEndCapture")
        self.fake.graphs[graph._obj.value] = self.fake.recording.pop(stream.value)

    def cuGraphInstantiateWithFlags(self, made, graph, flags: ctypes.c_uint64) -> None:
        made._obj.value = graph.value + 1000
        self.fake.graphs[made._obj.value] = list(self.fake.graphs[graph.value])

    def cuGraphDestroy(self, graph) -> None:
        del self.fake.graphs[graph.value]

    def cuGraphExecDestroy(self, made) -> None:
        del self.fake.graphs[made.value]

    def cuGraphLaunch(self, made, stream) -> None:
        for work in self.fake.graphs[made.value]:
            self.fake.queue(stream.value, work)
