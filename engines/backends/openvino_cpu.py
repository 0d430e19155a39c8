"""OpenVINO on the CPU: the engine wherever there is no better one.

Precision is set on purpose: left alone, OpenVINO computes in bfloat16 on CPUs that have it, with
map errors of a few percent. The batch is dynamic. Measured with the shipped network in f32, a
patch's map has the same bits at every batch size from 1 to 64 and on one or two threads, so
nothing is padded; patches/s on one thread at batches of 1, 2, 5, 8, 16, 32, 64 were 240, 273,
328, 338, 357, 354, 312. A model of fixed batch is a tenth faster but differs in the last bits.
"""

from pathlib import Path
from typing import Any

import numpy as np
import openvino

from engines.base import Engine, Maps, Options, Patches
from engines.errors import EngineError
from engines.manifest import Manifest


class OpenvinoCpu(Engine):
    """Compiles the ONNX model once, when made, and warms it up."""

    def __init__(self, manifest: Manifest, model: Path, options: Options) -> None:
        super().__init__(manifest)
        properties: dict[str, Any] = {
            "INFERENCE_PRECISION_HINT": options.precision,
            "PERFORMANCE_HINT": "LATENCY",
        }
        if options.threads is not None:
            properties["INFERENCE_NUM_THREADS"] = options.threads
        try:
            network = openvino.Core().read_model(model)
        except RuntimeError as error:
            raise EngineError(
                f"{model}: OpenVINO cannot read it ({_first_line(error)}); export it again"
            ) from error
        _check_shapes(network, manifest, model)
        compiled = openvino.compile_model(network, "CPU", properties)
        self._request = compiled.create_infer_request()
        for batch in sorted({1, manifest.max_batch}):
            self.infer(np.zeros((batch, *manifest.patch_shape), np.float32))

    def _infer_into(self, map_BHW: Maps, patch_BHW: Patches) -> None:
        if self._request is None:
            raise RuntimeError(f"engine {self.manifest.name} is closed")
        # share_inputs: the patches are read in place; the output is a view until the next call.
        result = self._request.infer([patch_BHW], share_inputs=True, share_outputs=True)
        map_BHW[...] = result[0]

    def close(self) -> None:
        """Let go of the compiled model."""
        self._request = None


def _check_shapes(network: Any, manifest: Manifest, model: Path) -> None:
    """Refuse a model whose patches or maps are not what the manifest says."""
    sides = (
        ("takes patches", network.inputs, manifest.patch_shape),
        ("gives maps", network.outputs, manifest.map_shape),
    )
    for what, ports, shape in sides:
        shapes = [str(port.partial_shape) for port in ports]
        wanted = openvino.PartialShape([-1, *shape])
        if len(ports) != 1 or not ports[0].partial_shape.same_scheme(wanted):
            raise EngineError(
                f"{model}: {what} of shape {', '.join(shapes)}, its manifest says {wanted} "
                f"(size_px {manifest.size_px}, c {manifest.c}); "
                "export it again with `trainer export`"
            )


def _first_line(error: RuntimeError) -> str:
    """The last line of OpenVINO's message; the ones before are places in its own source."""
    return " ".join(str(error).strip().splitlines()[-1].split())
