"""What the backends of both libraries share, `tensorrt` and `tensorrt_rtx`.

An execution context belongs to one slot and one batch size, since a CUDA graph that recorded it is
void once its shapes change. The contexts of a slot run one after the other and share its scratch
memory. A serialised engine is a program, so host code in it stays forbidden and the loader reads it
only from where nobody else can write.
"""

from abc import abstractmethod
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from engines.base import IN_FLIGHT, Engine, Kind, Maps, Options, Patches
from engines.build import Build
from engines.cuda.context import Context
from engines.cuda.driver import Gpu, gpu
from engines.cuda.lane import Lane
from engines.errors import EngineError
from engines.tensorrt_log import Library, library, logger, told


class Tensorrt(Engine[Kind]):
    """Deserialises `NAME.engine`, and has run every batch size in use before it is ready."""

    name: ClassVar[Library]

    def __init__(self, manifest: Kind, model: Path, options: Options) -> None:
        super().__init__(manifest)
        if manifest.build is None:
            raise EngineError(
                f"{model}: a portable model, and {self.name} runs what was built for it; run "
                f"`trainer compile {model} --target {self.name.replace('_', '-')}`"
            )
        trt = library(self.name)
        self._engine: Any = None
        self._runtime: Any = None
        self._context = Context(options.device)
        with ExitStack() as made:
            made.callback(self._context.close)
            if wrong := self._faults(trt, manifest.build, self._context.gpu):
                raise EngineError(f"{model}: {'; '.join(wrong)}; compile it again on this machine")
            made.callback(self._inside, self._forget)
            with self._context:
                self._runtime = trt.Runtime(logger(trt))
                self._engine = _deserialised(trt, self._runtime, model)
                _check(trt, self._engine, manifest, model)
                conditions: dict[str, int] = {
                    name: self._told(made, getattr(options, name)) for name in manifest.conditions
                }
                self._lanes = [self._lane(made, trt, conditions) for _ in range(IN_FLIGHT)]
            self._held = made.pop_all()

    @classmethod
    def misfits(cls, build: Build) -> list[str]:
        """Version of the library, GPU and driver; or that there is none of these."""
        try:
            return cls._faults(library(cls.name), build, gpu(0))
        except EngineError as error:
            return [str(error)]

    @classmethod
    def _faults(cls, trt: Any, build: Build, here: Gpu) -> list[str]:
        found = []
        version = f"{cls.name} {trt.__version__}"
        if version != build.library:
            found.append(f"built for {build.library}, here is {version}")
        if build.driver is not None and _number(here.driver) < _number(build.driver):
            found.append(f"built with a driver for CUDA {build.driver}, here is {here.driver}")
        return found + cls._unfit(trt, build, here)

    @classmethod
    @abstractmethod
    def _unfit(cls, trt: Any, build: Build, here: Gpu) -> list[str]:
        """What of the GPU does not fit, a line each."""

    @abstractmethod
    def _execution_context(self, trt: Any) -> Any:
        """Without memory of its own, and such that a CUDA graph can record it."""

    def _told(self, made: ExitStack, value: float) -> int:
        """Address of a value on the GPU that does not change."""
        memory = self._context.cuda.mem_alloc(4)
        made.callback(self._inside, memory.free)
        self._context.cuda.memcpy_htod(memory, np.array([value], np.float32))
        return int(memory)

    def _lane(self, made: ExitStack, trt: Any, conditions: Mapping[str, int]) -> Lane:
        size = max(self._engine.device_memory_size_v2, 1)
        scratch = self._context.cuda.mem_alloc(size)
        made.callback(self._inside, scratch.free)
        (patch,), (maps,) = _tensors(trt, self._engine, conditions)
        executions: dict[int, Any] = {}

        def prepared(given: int, output: int, batch: int) -> Any:
            execution = self._execution_context(trt)
            if execution is None:
                raise EngineError(f"{self.name}: no execution context ({told(trt)})")
            execution.set_device_memory(int(scratch), size)
            shape = (batch, *self.manifest.patch_shape)
            places = {patch: given, maps: output, **conditions}
            ready = [execution.set_tensor_address(name, place) for name, place in places.items()]
            if not all(ready) or not execution.set_input_shape(patch, shape):
                raise EngineError(f"{self.name}: batch {batch} is refused ({told(trt)})")
            return execution

        def enqueue(stream: int, given: int, output: int, batch: int) -> None:
            if batch not in executions:
                executions[batch] = prepared(given, output, batch)
            if not executions[batch].execute_async_v3(stream):
                raise EngineError(f"{self.name}: batch {batch} does not run ({told(trt)})")

        made.callback(self._inside, executions.clear)
        shapes = (self.manifest.patch_shape, self.manifest.map_shape)
        lane = Lane(self._context, enqueue, *shapes, self.manifest.max_batch)
        made.callback(self._inside, lane.close)
        return lane

    def _inside(self, act: Callable[[], None]) -> None:
        with self._context:
            act()

    def _begin(self, slot: int, patch_BHW: Patches) -> None:
        if not self._lanes:
            raise RuntimeError(f"engine {self.manifest.name} is closed")
        with self._context:
            self._lanes[slot].begin(patch_BHW)

    def _finish(self, slot: int, map_BHW: Maps) -> None:
        with self._context:
            self._lanes[slot].finish(map_BHW)

    def close(self) -> None:
        """Wait for what runs, free all memory and give the GPU back; in the thread that loaded."""
        if not self._lanes:
            return
        with self._context:  # refuses another thread before anything is freed
            self._lanes = []
        self._held.close()

    def _forget(self) -> None:
        """The engine frees its weights on the GPU, so that must still be current."""
        self._engine = self._runtime = None


def _deserialised(trt: Any, runtime: Any, model: Path) -> Any:
    engine = runtime.deserialize_cuda_engine(model.read_bytes())
    if engine is None:
        raise EngineError(
            f"{model}: {trt.__name__} {trt.__version__} cannot read it ({told(trt)}); compile it "
            "again on this machine"
        )
    return engine


def _tensors(trt: Any, engine: Any, conditions: Any) -> tuple[list[str], list[str]]:
    """Names of what it takes besides conditions, and of what it gives."""
    names = [engine.get_tensor_name(place) for place in range(engine.num_io_tensors)]
    inputs = [n for n in names if engine.get_tensor_mode(n) == trt.TensorIOMode.INPUT]
    outputs = [n for n in names if n not in inputs]
    return [n for n in inputs if n not in conditions], outputs


def _check(trt: Any, engine: Any, manifest: Any, model: Path) -> None:
    """Refuse an engine whose tensors or batch are not what the manifest says.

    Of a network that takes one at a time the batch may be fixed.
    """
    inputs, outputs = _tensors(trt, engine, manifest.conditions)
    fixed = manifest.max_batch == 1 and all(engine.get_tensor_shape(n)[0] == 1 for n in inputs)
    sides = (
        ("takes patches", inputs, manifest.patch_shape),
        ("gives maps", outputs, manifest.map_shape),
    )
    for what, names, shape in sides:
        found = [tuple(engine.get_tensor_shape(name)) for name in names]
        floats = all(engine.get_tensor_dtype(name) == trt.float32 for name in names)
        wanted = (1 if fixed else -1, *shape)
        if found != [wanted] or not floats:
            shapes = ", ".join(f"{n} {s}" for n, s in zip(names, found, strict=True))
            raise EngineError(
                f"{model}: {what} {shapes}, its manifest says float32 {wanted}; compile it again"
            )
    if fixed:
        return
    least, _, most = (shape[0] for shape in engine.get_tensor_profile_shape(inputs[0], 0))
    if least > 1 or most < manifest.max_batch:
        raise EngineError(
            f"{model}: takes {least} to {most} patches, its manifest says 1 to "
            f"{manifest.max_batch}; compile it again"
        )


def _number(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")))
