"""OpenVINO on the CPU: the engine wherever there is no better one.

A batch is shared out among lanes, one a core: each is the network compiled for one thread that
never leaves its core. No layer waits for another thread then, and a thread that is woken finds its
core: left to the scheduler, a virtual machine's often queues it behind the thread that wakes it,
and a frame's patches take twice as long (docs/latency.md). What infers single images, has more than
one stream or less threads than cores, or more than MAX_LANES of these, is one network for all.

Precision is set on purpose: left alone, OpenVINO computes in bfloat16 on CPUs that have it. A
portable model runs in f32; what else is as good and faster here, `trainer compile` measures. In
f32 a patch's map has the same bits in any batch and on any number of threads.

What the network is told of the sensor (`manifest.conditions`) becomes a constant before the model
is compiled, so that all that follows from it is computed once.
"""

import contextlib
import ctypes
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openvino
from openvino import opset13

from engines.base import IN_FLIGHT, Engine, Kind, Maps, Options, Patches
from engines.build import Build
from engines.cache import cache_folder
from engines.errors import EngineError
from engines.manifest import EngineManifest

MAX_LANES = 16
_libc = ctypes.CDLL(None)
ANYWHERE: list[int | None] = [None]
CAPABILITY = {"f32": "FP32", "f16": "FP16", "bf16": "BF16", "int8": "INT8"}
"""What OpenVINO calls a precision the CPU has instructions for."""


class OpenvinoCpu(Engine[Kind]):
    """Compiles the ONNX model when made, and warms up each lane, at one patch and at its most."""

    def __init__(self, manifest: Kind, model: Path, options: Options) -> None:
        super().__init__(manifest)
        try:
            network = openvino.Core().read_model(model)
        except RuntimeError as error:
            raise EngineError(
                f"{model}: OpenVINO cannot read it ({_last_line(error)}); export it again"
            ) from error
        for name in manifest.conditions:
            _tell(network, name, getattr(options, name), model)
        _check_shapes(network, manifest, model)
        _capabilities()  # OpenVINO counts the cores now, once for this process, not on a lane's one
        properties = _properties(manifest.build, options)
        cores = _cores(manifest, properties)
        if cores != ANYWHERE:
            properties |= {"INFERENCE_NUM_THREADS": 1, "ENABLE_CPU_PINNING": False}
        try:
            self._lanes = [_Lane(network, properties, core) for core in cores]
        except (RuntimeError, OSError) as error:
            raise EngineError(
                f"{model}: OpenVINO cannot compile it ({_last_line(error)}); export it again, or "
                "use another release of openvino"
            ) from error
        for batch in sorted({len(self._lanes), manifest.max_batch}):
            for _ in range(IN_FLIGHT):
                self.infer(np.zeros((batch, *manifest.patch_shape), np.float32))

    @classmethod
    def misfits(cls, build: Build) -> list[str]:
        """The precision, if this CPU would only imitate it."""
        if CAPABILITY[build.precision] in _capabilities():
            return []
        return [f"precision {build.precision}: this CPU has no instructions for it"]

    def _begin(self, slot: int, patch_BHW: Patches) -> None:
        # OpenVINO reads in place only what could be written to.
        shared = patch_BHW if patch_BHW.flags.writeable else patch_BHW.copy()
        shares = self._shares(len(shared))
        # Last the one on this core: its thread takes the core from this one, before it begins more.
        here = _libc.sched_getcpu() if len(shares) > 1 else None
        begun: list[_Lane] = []
        try:
            for lane, part in sorted(shares, key=lambda share: share[0].core == here):
                lane.begin(slot, shared[part])
                begun.append(lane)
        except BaseException:
            _wait(begun, slot)
            raise

    def _finish(self, slot: int, map_BHW: Maps) -> None:
        shares = self._shares(len(map_BHW))
        _wait([lane for lane, _ in shares], slot)
        for lane, part in shares:
            map_BHW[part] = lane.maps(slot)

    def _shares(self, number: int) -> list[tuple["_Lane", slice]]:
        """Which lane does which of so many patches, as evenly as can be."""
        if not self._lanes:
            raise RuntimeError(f"engine {self.manifest.name} is closed")
        lanes = self._lanes[:number]
        ends = [number * n // len(lanes) for n in range(len(lanes) + 1)]
        return [(lane, slice(*ends[n : n + 2])) for n, lane in enumerate(lanes)]

    def close(self) -> None:
        """Let go of the compiled model."""
        self._lanes = []


class _Lane:
    """A compiled network and its requests, one a slot; core: its threads run there alone."""

    def __init__(self, network: Any, properties: dict[str, Any], core: int | None) -> None:
        with contextlib.nullcontext() if core is None else _on(core), _signal_stack_kept():
            compiled = openvino.compile_model(network, "CPU", properties)
        self.core = core
        self._requests = [compiled.create_infer_request() for _ in range(IN_FLIGHT)]
        self._given: dict[int, openvino.Tensor] = {}  # requests keep no hold of their patches

    def begin(self, slot: int, patch_BHW: Patches) -> None:
        # Given to `start_async` itself, patches are dispatched in Python: 0.04 ms, cold 0.16.
        self._given[slot] = openvino.Tensor(patch_BHW, shared_memory=True)
        self._requests[slot].set_input_tensor(0, self._given[slot])
        self._requests[slot].start_async()

    def wait(self, slot: int) -> None:
        self._requests[slot].wait()

    def maps(self, slot: int) -> Maps:
        maps: Maps = self._requests[slot].get_output_tensor(0).data
        return maps


def _wait(lanes: list[_Lane], slot: int) -> None:
    """Until none of them reads its patches any more; then raises what one has failed with."""
    with contextlib.ExitStack() as every:
        for lane in lanes:
            every.callback(lane.wait, slot)


@contextlib.contextmanager
def _on(core: int) -> Iterator[None]:
    """Threads that are started meanwhile stay on this core, which they inherit."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


class _Stack(ctypes.Structure):
    """`stack_t` of sigaltstack(2)."""

    _fields_ = (("sp", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t))


@contextlib.contextmanager
def _signal_stack_kept() -> Iterator[None]:
    """Each of OpenVINO's plugins sets the stack this thread handles signals on: set it back.

    Left so, the second of two that end in the order they began would set that of the first again,
    which is gone by then, and the next signal somebody handles be a segmentation fault.
    """
    before = _Stack()
    _libc.sigaltstack(None, ctypes.byref(before))
    try:
        yield
    finally:
        _libc.sigaltstack(ctypes.byref(before), None)


def _cores(manifest: EngineManifest, properties: dict[str, Any]) -> list[int | None]:
    """The core of each lane; one lane ANYWHERE if patches are not shared out."""
    cores = sorted(os.sched_getaffinity(0))
    fewer = properties.get("INFERENCE_NUM_THREADS", len(cores)) < len(cores)
    if fewer or manifest.max_batch == 1 or properties["NUM_STREAMS"] > 1 or len(cores) > MAX_LANES:
        return ANYWHERE
    return [*cores[: manifest.max_batch]]


def _properties(build: Build | None, options: Options) -> dict[str, Any]:
    """OpenVINO's settings of what was built, or of a portable model, with these options."""
    precision = build.precision if build else options.precision
    threads = options.threads or (build.threads if build else None)
    properties: dict[str, Any] = {
        "INFERENCE_PRECISION_HINT": _rest() if precision == "int8" else precision,
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": build.streams if build else 1,
    }
    if threads is not None:
        properties["INFERENCE_NUM_THREADS"] = threads
    if (folder := cache_folder("openvino")) is not None:
        properties["CACHE_DIR"] = str(folder)
    return properties


def _capabilities() -> list[str]:
    found: list[str] = openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    return found


def _rest() -> str:
    """The precision of what is not quantised in an int8 model."""
    return "bf16" if CAPABILITY["bf16"] in _capabilities() else "f32"


def _tell(network: Any, name: str, value: float, model: Path) -> None:
    """Put a constant in the place of the input of this name."""
    for parameter in network.get_parameters():
        if name in parameter.output(0).get_names():
            constant = opset13.constant(np.array([value], np.float32))
            parameter.output(0).replace(constant.output(0))
            network.remove_parameter(parameter)
            network.validate_nodes_and_infer_types()
            return
    raise EngineError(f"{model}: has no input `{name}`, its manifest says so; export it again")


def _check_shapes(network: Any, manifest: EngineManifest, model: Path) -> None:
    """Refuse a model whose patches or maps are not what the manifest says."""
    sides = (
        ("takes patches", network.inputs, manifest.patch_shape),
        ("gives maps", network.outputs, manifest.map_shape),
    )
    for what, ports, shape in sides:
        shapes = [str(port.partial_shape) for port in ports]
        batch = -1 if manifest.max_batch > 1 or ports[0].partial_shape[0].is_dynamic else 1
        wanted = openvino.PartialShape([batch, *shape])
        if len(ports) != 1 or not ports[0].partial_shape.same_scheme(wanted):
            raise EngineError(
                f"{model}: {what} of shape {', '.join(shapes)}, its manifest says {wanted}; "
                "export it again with `trainer export`"
            )


def _last_line(error: Exception) -> str:
    """Of OpenVINO's message; the lines before are places in its own source."""
    return " ".join(str(error).strip().splitlines()[-1].split())
