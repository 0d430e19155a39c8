"""TensorRT-RTX: engines built without a GPU, finished on the one they run on."""

from typing import Any

from engines.backends._tensorrt import Tensorrt
from engines.base import Kind
from engines.build import Build
from engines.cuda.driver import Gpu

ON_REQUEST = ("75",)
"""Turing: engines are for it only if built for it alone."""


class TensorrtRtx(Tensorrt[Kind]):
    """Runs what `trainer compile --target tensorrt-rtx` built."""

    name = "tensorrt_rtx"

    _kernels: Any = None
    """What was compiled on this GPU so far, shared by all execution contexts."""

    @classmethod
    def _unfit(cls, trt: Any, build: Build, here: Gpu) -> list[str]:  # noqa: ARG003
        """The GPU, if the library, as it builds without being told of one, does not serve it."""
        known = [n[2:] for n in trt.ComputeCapability.__members__ if n.startswith("SM")]
        runs = [f"{digits[:-1]}.{digits[-1]}" for digits in known if digits not in ON_REQUEST]
        if here.compute_capability in runs:
            return []
        return [
            f"{cls.name} {trt.__version__} runs on compute capability {', '.join(runs)}, this "
            f"{here.name} has {here.compute_capability}: use --target tensorrt"
        ]

    def _execution_context(self, trt: Any) -> Any:
        """With kernels for its very shapes from the start: left lazy, a graph records stand-ins."""
        config = self._engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(
            trt.ExecutionContextAllocationStrategy.USER_MANAGED
        )
        config.dynamic_shapes_kernel_specialization_strategy = (
            trt.DynamicShapesKernelSpecializationStrategy.EAGER
        )
        if self._kernels is None:
            self._kernels = config.create_runtime_cache()
        config.set_runtime_cache(self._kernels)
        return self._engine.create_execution_context(config)
