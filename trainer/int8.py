"""INT8 put into an ONNX graph: QuantizeLinear and DequantizeLinear round to eight bits.

The convolutions where the time goes round what goes into them, and their weights; what they give
is not rounded. Everything is signed, around zero: all that TensorRT takes, and on CPUs a zero point
costs more than it gives. Channels of very different sizes share the steps of eight bits better once
each is divided by a factor, by which the weights that read it are multiplied (SmoothQuant, Xiao et
al., ICML 2023).
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, helper, numpy_helper

from trainer.errors import TrainerError

LEVELS = 127
"""Steps to either side of zero."""

WITHIN = 0.999
"""Share of a channel's values that its range holds; what is beyond is clipped."""

SMOOTHING = 0.9
"""Of a channel's size how much its weights take over: 0 none, 1 all (its exponent)."""

LEAST = 1e-3
"""Sizes of channels and weights count as at least that."""

LEAST_SHARE = 0.2
"""A convolution with fewer weights than this share of the largest's is cheap and stays exact."""

CALIBRATION_BATCH = 64

Values = NDArray[np.float32]
Sizes = NDArray[np.floating]


def quantized(model: ModelProto, inputs: Mapping[str, Values]) -> ModelProto:
    """The same network with its larger convolutions in INT8.

    inputs: calibration patches (N, …), and each condition (1,), by name of the input. Weights have
    a scale for each channel made. Raises TrainerError for a network without convolutions.
    """
    result = ModelProto()
    result.CopyFrom(model)
    graph = result.graph
    weights = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    large = _large(graph.node, weights)
    sizes = _sizes(model, list(dict.fromkeys(node.input[0] for node in large)), inputs)
    nodes: list[NodeProto] = []
    for node in graph.node:
        if node in large:
            before, tensors = _rounded(node, weights[node.input[1]], sizes[node.input[0]])
            nodes += before
            graph.initializer.extend(tensors)
        nodes.append(node)
    made = [NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:]
    graph.node.extend(made)
    used = {name for node in made for name in node.input}
    kept = [tensor for tensor in graph.initializer if tensor.name in used]
    del graph.initializer[:]
    graph.initializer.extend(kept)
    del graph.value_info[:]
    onnx.checker.check_model(result, full_check=True)
    return result


def _large(nodes: Any, weights: Mapping[str, Values]) -> list[NodeProto]:
    """Convolutions of all channels at once with as many weights as make them worth it."""
    found = [
        node
        for node in nodes
        if node.op_type == "Conv"
        and node.input[1] in weights
        and all(attribute.i == 1 for attribute in node.attribute if attribute.name == "group")
    ]
    if not found:
        raise TrainerError("int8: the network has no convolutions; use f16")
    most = max(weights[node.input[1]].size for node in found)
    return [node for node in found if weights[node.input[1]].size >= LEAST_SHARE * most]


def _sizes(
    model: ModelProto, names: list[str], inputs: Mapping[str, Values]
) -> dict[str, NDArray[np.float64]]:
    """What a share WITHIN of the values of each channel of these tensors is within, (C,) each."""
    import openvino

    probe = ModelProto()
    probe.CopyFrom(model)
    del probe.graph.output[:]
    probe.graph.output.extend(helper.make_empty_tensor_value_info(name) for name in names)
    compiled = openvino.compile_model(
        openvino.Core().read_model(probe.SerializeToString()),
        "CPU",
        {"INFERENCE_PRECISION_HINT": "f32"},
    )
    found: dict[str, list[Values]] = {name: [] for name in names}
    for start in range(0, len(inputs["patch"]), CALIBRATION_BATCH):
        part = {"patch": inputs["patch"][start : start + CALIBRATION_BATCH]}
        given = compiled({**inputs, **part})
        for name in names:
            found[name].append(np.abs(given[name]))
    return {
        name: np.quantile(np.concatenate(values), WITHIN, axis=(0, 2, 3))
        for name, values in found.items()
    }


def _rounded(
    node: NodeProto, weight: Values, size: NDArray[np.float64]
) -> tuple[list[NodeProto], list[onnx.TensorProto]]:
    """Have a convolution read rounded input and weights; → what goes before it, its constants."""
    factor, largest = smoothed(size, np.abs(weight).max(axis=(0, 2, 3)))
    shaped = factor[:, None, None]
    spread = weight * shaped
    step = np.abs(spread).max(axis=(1, 2, 3)) / LEVELS
    step = np.where(step > 0.0, step, 1.0)  # of a channel without weights
    whole = np.round(spread / step[:, None, None, None])
    name = node.name or node.output[0]
    constants = {
        "factor": (1.0 / shaped[None]).astype(np.float32),
        "step": np.float32(largest / LEVELS),
        "zero": np.int8(0),
        "weight": whole.astype(np.int8),
        "weight_step": step.astype(np.float32),
        "weight_zero": np.zeros(len(step), np.int8),
    }
    at = {key: f"{name}.{key}" for key in constants}
    around_zero = [at["step"], at["zero"]]
    by_channel = [at["weight_step"], at["weight_zero"]]
    even, eight, again, read = (f"{name}.{what}" for what in ("even", "eight", "again", "read"))
    before = [
        helper.make_node("Mul", [node.input[0], at["factor"]], [even], even),
        helper.make_node("QuantizeLinear", [even, *around_zero], [eight], eight),
        helper.make_node("DequantizeLinear", [eight, *around_zero], [again], again),
        helper.make_node("DequantizeLinear", [at["weight"], *by_channel], [read], read, axis=0),
    ]
    node.input[0], node.input[1] = again, read
    tensors = [
        numpy_helper.from_array(np.asarray(value), at[key]) for key, value in constants.items()
    ]
    return before, tensors


def smoothed(size: Sizes, weight: Sizes) -> tuple[Sizes, float]:
    """Factors (C,) that the channels of an input are divided by, and the range of all after that.

    size: (C,) range of each channel; weight: (C,) the largest that reads it.
    """
    size, weight = size.clip(LEAST), weight.clip(LEAST)
    factor: Sizes = size**SMOOTHING / weight ** (1.0 - SMOOTHING)
    return factor, float((size / factor).max())
