"""A TensorRT of our own for the fake GPU: the part of its Python interface the backends use.

Engines are JSON: what they take and give. A map is 2 x + σ of its patch, row by row as far as it
goes. tests/test_tensorrt.py checks that each name here is one of the real library's.
"""

import json
import types
from enum import Enum

import numpy as np
from fake_cuda import FakeCuda


class ExecutionContextAllocationStrategy(Enum):
    USER_MANAGED = 2


class DynamicShapesKernelSpecializationStrategy(Enum):
    EAGER = 1


class TensorIOMode(Enum):
    INPUT, OUTPUT = 1, 2


class ComputeCapability(Enum):
    NONE, CURRENT, SM75, SM86, SM120 = 0, 1, 75, 86, 120


class ILogger:
    INTERNAL_ERROR, ERROR, WARNING = range(3)

    def __init__(self) -> None:
        pass


class IRuntimeConfig:
    _strategy = None
    dynamic_shapes_kernel_specialization_strategy = None

    def set_execution_context_allocation_strategy(self, strategy) -> None:
        self._strategy = strategy

    def create_runtime_cache(self) -> object:
        return object()

    def set_runtime_cache(self, cache: object) -> bool:
        self._cache = cache
        return True


class IExecutionContext:
    def __init__(self, engine: "ICudaEngine") -> None:
        self.engine, self.addresses, self.shape, self.scratch = engine, {}, None, None
        self.recorded = False

    def set_device_memory(self, memory: int, size: int) -> None:
        assert len(self.engine.fake.memory[memory]) == size
        self.scratch = memory

    def set_tensor_address(self, name: str, address: int) -> bool:
        assert not self.recorded, "a graph of it is void now"
        self.addresses[name] = address
        return name in self.engine.tensors

    def set_input_shape(self, name: str, shape: tuple) -> bool:
        assert not self.recorded, "a graph of it is void now"
        self.shape = tuple(shape)
        return self.shape[0] <= self.engine.most

    def execute_async_v3(self, stream: int) -> bool:
        engine, fake = self.engine, self.engine.fake
        if engine.broken:
            engine.logger.log(ILogger.ERROR, "IExecutionContext::enqueueV3: Error Code 1: Myelin")
            return False
        assert self.scratch in fake.memory and set(self.addresses) == set(engine.tensors)
        self.recorded |= stream in fake.recording
        batch = self.shape[0]
        sides = [int(np.prod(engine.tensors[name][1:])) for name in ("patch", "map")]
        given = fake.floats(self.addresses["patch"], batch * sides[0]).reshape(batch, -1)
        made = fake.floats(self.addresses["map"], batch * sides[1]).reshape(batch, -1)
        sigma = 0.0
        if "sigma_px" in engine.tensors:
            sigma = float(fake.floats(self.addresses["sigma_px"], 1)[0])

        def compute() -> None:
            for row, out in zip(2.0 * given + np.float32(sigma), made, strict=True):
                out[...] = np.resize(row, len(out))

        fake.queue(stream, compute)
        return True


class ICudaEngine:
    device_memory_size_v2 = 4096

    def __init__(self, fake: FakeCuda, logger, facts: dict) -> None:
        self.fake, self.logger = fake, logger
        self.tensors, self.most = facts["tensors"], facts["most"]
        self.broken = facts.get("broken", False)

    @property
    def num_io_tensors(self) -> int:
        return len(self.tensors)

    def get_tensor_name(self, place: int) -> str:
        return list(self.tensors)[place]

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        return TensorIOMode.OUTPUT if name == "map" else TensorIOMode.INPUT

    def get_tensor_shape(self, name: str) -> list[int]:
        return self.tensors[name]

    def get_tensor_dtype(self, name: str) -> str:
        return "float32"

    def get_tensor_profile_shape(self, name: str, profile: int) -> list[list[int]]:
        return [[number, *self.tensors[name][1:]] for number in (1, self.most, self.most)]

    def create_runtime_config(self) -> IRuntimeConfig:
        return IRuntimeConfig()

    def create_execution_context(self, how) -> IExecutionContext:
        if isinstance(how, IRuntimeConfig):
            assert how.dynamic_shapes_kernel_specialization_strategy is not None
            how = how._strategy
        assert how is ExecutionContextAllocationStrategy.USER_MANAGED
        return IExecutionContext(self)


def module(fake: FakeCuda, name: str, version: str = "11.0.0") -> types.ModuleType:
    """A module to stand in for `tensorrt` or `tensorrt_rtx`."""
    made = types.ModuleType(name)

    class Runtime:
        engine_host_code_allowed = False

        def __init__(self, logger) -> None:
            self.logger = logger

        def deserialize_cuda_engine(self, data: bytes) -> ICudaEngine | None:
            assert not self.engine_host_code_allowed and fake.current
            try:
                return ICudaEngine(fake, self.logger, json.loads(data))
            except ValueError:
                said = "IRuntime::deserializeCudaEngine: Error Code 1: (In read at a.cpp:9 (magic"
                self.logger.log(ILogger.ERROR, f"{said}Tag does not match))")
                return None

    for found in (
        ExecutionContextAllocationStrategy,
        DynamicShapesKernelSpecializationStrategy,
        TensorIOMode,
        ComputeCapability,
        ILogger,
        IRuntimeConfig,
        IExecutionContext,
        ICudaEngine,
        Runtime,
    ):
        setattr(made, found.__name__, found)
    made.__version__, made.float32 = version, "float32"
    return made
