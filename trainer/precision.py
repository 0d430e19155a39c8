"""Half precision put into an ONNX graph, for libraries that compute as the graph says.

Inputs and outputs stay float32, what computes is cast, and what half precision would harm stays
float32. For eight bits: trainer/int8.py.
"""

from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import onnx.version_converter
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from trainer.errors import TrainerError

HALF = {"f16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}

EXACT = frozenset(
    "BatchNormalization Clip Div Erf Exp InstanceNormalization LayerNormalization Log "  # noqa: SIM905
    "LogSoftmax Pow Reciprocal ReduceL2 ReduceLogSumExp ReduceMean ReduceProd ReduceSum "
    "ReduceSumSquare Softmax Softplus Sqrt Equal Greater GreaterOrEqual Less LessOrEqual".split()
)
"""Stay float32: sums of many, what half precision overflows or underflows in, and comparisons."""

MOVES = frozenset(
    "Concat Expand Flatten Gather Identity Pad Reshape Slice Split Squeeze "  # noqa: SIM905
    "Tile Transpose Unsqueeze".split()
)
"""Only move numbers: stay float32 where what they move is."""

FIXED_INPUTS = {"Resize": (1, 2)}
"""Inputs that ONNX wants in float32, by operator."""

OPSET = {"f16": 20, "bf16": 22}
"""At least: before 22 a convolution in bfloat16 is not ONNX."""


def read_model(path: Path) -> ModelProto:
    """An ONNX model, simplified; raises TrainerError if it is none."""
    try:
        model = onnx.load(path)
    except Exception as error:
        raise TrainerError(f"{path}: not an ONNX model ({error}); export it again") from error
    return simplified(model)


def simplified(model: ModelProto) -> ModelProto:
    """The same network with constants folded and nodes without effect removed, checked."""
    import onnxslim

    slim = onnxslim.slim(_copy(model))
    onnx.checker.check_model(slim, full_check=True)
    return slim


def with_precision(model: ModelProto, precision: Literal["f16", "bf16"]) -> ModelProto:
    """The same network computing in half precision.

    Raises TrainerError for a weight that float16 cannot hold.
    """
    halved = _Halved(model, HALF[precision], precision).model
    onnx.checker.check_model(halved, full_check=True)
    return halved


class _Halved:
    """One conversion: each float tensor has the type it is made in, and the other on demand."""

    def __init__(self, model: ModelProto, half: int, precision: str) -> None:
        self.model, self._half, self._precision = (
            _at_least(model, OPSET[precision]),
            half,
            precision,
        )
        graph = self.model.graph
        self._float = _float_tensors(self.model)
        self._weights = {tensor.name: tensor for tensor in graph.initializer}
        self._made_half: set[str] = set()
        self._cast: dict[tuple[str, int], str] = {}
        self._nodes: list[NodeProto] = []
        for node in list(graph.node):
            self._convert(node)
        for output in graph.output:
            self._restore(output.name)
        del graph.node[:]
        graph.node.extend(self._nodes)
        used = {name for node in self._nodes for name in node.input}
        kept = [tensor for tensor in self._weights.values() if tensor.name in used]
        del graph.initializer[:]
        graph.initializer.extend(kept)
        del graph.value_info[:]

    def _convert(self, node: NodeProto) -> None:
        into = TensorProto.FLOAT if self._stays(node) else self._half
        fixed = FIXED_INPUTS.get(node.op_type, ())
        if node.op_type != "Cast":
            for place, name in enumerate(node.input):
                if name in self._float:
                    wanted = TensorProto.FLOAT if place in fixed else into
                    node.input[place] = self._as(name, wanted)
        if into == self._half:
            self._made_half.update(name for name in node.output if name in self._float)
            for attribute in node.attribute:
                self._halve(node, attribute)
        self._nodes.append(node)

    def _stays(self, node: NodeProto) -> bool:
        if node.op_type in EXACT or any(self._lost(name) for name in node.input):
            return True
        moved = [name for name in node.input if name in self._float and name not in self._weights]
        return node.op_type in MOVES and not self._made_half.intersection(moved)

    def _lost(self, name: str) -> bool:
        """A single number half precision has nothing near, like the 1e-12 that keeps from 0 / 0."""
        if name not in self._weights or name not in self._float:
            return False
        exact = numpy_helper.to_array(self._weights[name])
        off = np.abs(self._rounded(exact).astype(np.float32) - exact)
        return bool(exact.size == 1 and not np.all(off <= 0.01 * np.abs(exact)))

    def _rounded(self, exact: NDArray[np.float32]) -> NDArray[Any]:
        with np.errstate(over="ignore"):
            return exact.astype(helper.tensor_dtype_to_np_dtype(self._half))

    def _halve(self, node: NodeProto, attribute: onnx.AttributeProto) -> None:
        """Constants inside a node, and what a Cast casts to."""
        if node.op_type == "Cast" and attribute.name == "to" and attribute.i == TensorProto.FLOAT:
            attribute.i = self._half
        elif attribute.t.data_type == TensorProto.FLOAT:
            attribute.t.CopyFrom(self._halved(attribute.t, attribute.t.name))

    def _as(self, name: str, wanted: int) -> str:
        """The name of this tensor in the wanted type; cast once, however many want it."""
        made = self._half if name in self._made_half else TensorProto.FLOAT
        if made == wanted:
            return name
        if (name, wanted) not in self._cast:
            told = self._precision if wanted == self._half else "f32"
            other = f"{name}.{told}"
            self._cast[name, wanted] = other
            if name in self._weights:
                self._weights[other] = self._halved(self._weights[name], other)
            else:
                self._nodes.append(helper.make_node("Cast", [name], [other], other, to=wanted))
        return self._cast[name, wanted]

    def _halved(self, tensor: TensorProto, name: str) -> TensorProto:
        exact = numpy_helper.to_array(tensor)
        half = self._rounded(exact)
        if not np.array_equal(np.isfinite(half.astype(np.float32)), np.isfinite(exact)):
            raise TrainerError(
                f"weight {tensor.name}: {np.abs(exact).max():.3g} is beyond {self._precision}; "
                "use bf16 or f32"
            )
        return numpy_helper.from_array(half, name)

    def _restore(self, name: str) -> None:
        """A graph's output is float32 again."""
        if name not in self._made_half:
            return
        half = f"{name}.{self._precision}"
        for node in self._nodes:
            for names in (node.input, node.output):
                for place, found in enumerate(names):
                    if found == name:
                        names[place] = half
        self._nodes.append(
            helper.make_node("Cast", [half], [name], f"{name}.f32", to=TensorProto.FLOAT)
        )


def _float_tensors(model: ModelProto) -> set[str]:
    """Names of all float32 tensors of a graph."""
    graph = onnx.shape_inference.infer_shapes(model, strict_mode=True).graph
    typed = [*graph.input, *graph.output, *graph.value_info]
    found = {v.name for v in typed if v.type.tensor_type.elem_type == TensorProto.FLOAT}
    return found | {t.name for t in graph.initializer if t.data_type == TensorProto.FLOAT}


def _at_least(model: ModelProto, opset: int) -> ModelProto:
    (has,) = (entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx"))
    if has >= opset:
        return _copy(model)
    return onnx.version_converter.convert_version(model, opset)


def _copy(model: ModelProto) -> ModelProto:
    copied = ModelProto()
    copied.CopyFrom(model)
    return copied
