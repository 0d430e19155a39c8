"""TensorRT, what a sensor's GPU runs: an engine is for the kind of GPU it was built on."""

from typing import Any

from engines.backends._tensorrt import Tensorrt
from engines.base import Kind
from engines.build import Build
from engines.cuda.driver import Gpu


class TensorrtCuda(Tensorrt[Kind]):
    """Runs what `trainer compile --target tensorrt` built."""

    name = "tensorrt"

    @classmethod
    def _unfit(cls, trt: Any, build: Build, here: Gpu) -> list[str]:  # noqa: ARG003
        found = []
        if build.compute_capability != here.compute_capability:
            found.append(
                f"built for compute capability {build.compute_capability}, this {here.name} has "
                f"{here.compute_capability}"
            )
        if build.device != here.name:
            found.append(f"built for {build.device}, here is {here.name}")
        return found

    def _execution_context(self, trt: Any) -> Any:
        return self._engine.create_execution_context(
            trt.ExecutionContextAllocationStrategy.USER_MANAGED
        )
