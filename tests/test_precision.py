"""Precision put into a graph: sound ONNX, near the original, exact where it must be."""

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from engines.loader import MODELS
from trainer.errors import TrainerError
from trainer.int8 import quantized, smoothed
from trainer.precision import read_model, simplified, with_precision

NETWORKS = ("off_grid", "off_grid_any", "dista_net")
ALLOWED = {"f16": 5e-3, "bf16": 5e-2, "int8": 0.2}


def inputs(name: str, number: int, seed: int = 1) -> dict[str, np.ndarray]:
    """Blobs of one or two targets, as an engine sees them."""
    rng = np.random.default_rng(seed)
    axis = np.arange(11.0)
    xy = rng.uniform(4.5, 5.5, (number, 2, 2))
    near = np.exp(-0.5 * ((axis - xy[..., None]) / 0.6) ** 2)  # (N, 2 targets, x or y, 11)
    patch = np.einsum("nti,ntj->nij", near[:, :, 1], near[:, :, 0])
    patch = (patch / patch.max(axis=(1, 2), keepdims=True)).astype(np.float32)
    if name != "off_grid_any":
        return {"patch": patch}
    planes = np.stack([patch, np.full_like(patch, 0.02)], axis=1)
    return {"patch": planes, "sigma_px": np.array([0.6], np.float32)}


def run(model: ModelProto, given: dict[str, np.ndarray]) -> np.ndarray:
    """By ONNX's own reference, which rounds as the types say."""
    with np.errstate(over="ignore", invalid="ignore"):
        (found,) = ReferenceEvaluator(model).run(None, given)
    return found


def error(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.sqrt(np.mean((found - wanted) ** 2) / np.mean(wanted**2)))


@pytest.fixture(scope="module", params=NETWORKS)
def network(request) -> tuple[str, ModelProto]:
    return request.param, read_model(MODELS / f"{request.param}.onnx")


def interface(model: ModelProto) -> list[tuple[str, int]]:
    return [
        (value.name, value.type.tensor_type.elem_type)
        for value in (*model.graph.input, *model.graph.output)
    ]


def test_simplified_computes_the_same(network) -> None:
    name, slim = network
    whole = onnx.load(MODELS / f"{name}.onnx")
    given = inputs(name, 2)
    assert len(slim.graph.node) <= len(whole.graph.node)
    np.testing.assert_allclose(run(slim, given), run(whole, given), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("precision", ["f16", "bf16"])
def test_half_precision_is_near_and_float32_outside(network, precision: str) -> None:
    name, model = network
    given = inputs(name, 2)
    before = model.SerializeToString()
    half = with_precision(model, precision)
    assert model.SerializeToString() == before
    assert interface(half) == interface(model)
    found = run(half, given)
    assert found.dtype == np.float32
    off = error(found, run(model, given))
    assert 0.0 < off < ALLOWED[precision]
    heavy = sum(w.ByteSize() for w in model.graph.initializer)
    assert sum(w.ByteSize() for w in half.graph.initializer) < 0.55 * heavy


def test_int8_is_near_and_signed_around_zero(network) -> None:
    name, model = network
    given = inputs(name, 16, seed=9)
    eight = quantized(model, inputs(name, 96))
    assert interface(eight) == interface(model)
    assert 0.0 < error(run(eight, given), run(model, given)) < ALLOWED["int8"]
    values = {w.name: numpy_helper.to_array(w) for w in eight.graph.initializer}
    pairs = [n for n in eight.graph.node if n.op_type == "DequantizeLinear"]
    for node in pairs:
        assert values[node.input[2]].dtype == np.int8
        assert not values[node.input[2]].any()
    assert max(values[n.input[1]].size for n in pairs if n.input[0] in values) > 1
    by_eight = {n.output[0] for n in pairs}
    convolutions = [n for n in eight.graph.node if n.op_type == "Conv"]
    large = {n.output[0] for n in convolutions if n.input[1] in by_eight}
    assert large == {n.output[0] for n in convolutions if n.input[0] in by_eight}
    rounded = {n.input[0] for n in eight.graph.node if n.op_type == "QuantizeLinear"}
    assert not large & rounded  # what they give is not rounded


def test_smoothed_channels_nearly_fill_one_range() -> None:
    size, weight = np.array([0.1, 10.0]), np.array([1.0, 1.0])
    factor, largest = smoothed(size, weight)
    evened = size / factor
    assert largest == evened.max()
    assert evened.min() > 0.6 * evened.max()
    dark, _ = smoothed(np.zeros(2), np.zeros(2))  # a channel that is never lit
    assert np.isfinite(dark).all()
    assert (dark > 0.0).all()


def test_comparisons_and_small_divisors_stay_float32() -> None:
    """1e-9 vanishes in float16, 1e9 is beyond it and 1.0003 > 1 is lost: computed in float32."""
    graph = helper.make_graph(
        [
            helper.make_node("Greater", ["patch", "one"], ["above"]),
            helper.make_node("Cast", ["above"], ["flag"], to=TensorProto.FLOAT),
            helper.make_node("Div", ["patch", "tiny"], ["large"]),
            helper.make_node("Mul", ["large", "tiny"], ["again"]),
            helper.make_node("Add", ["again", "tiny"], ["guarded"]),
            helper.make_node("Div", ["guarded", "tiny"], ["once_more"]),
            helper.make_node("Log", ["once_more"], ["log"]),
            helper.make_node("Concat", ["flag", "log"], ["map"], axis=1),
        ],
        "edges",
        [helper.make_tensor_value_info("patch", TensorProto.FLOAT, ["batch", 1])],
        [helper.make_tensor_value_info("map", TensorProto.FLOAT, ["batch", 2])],
        [
            numpy_helper.from_array(np.float32([1.0]), "one"),
            numpy_helper.from_array(np.float32([1e-9]), "tiny"),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    half = with_precision(model, "f16")
    found = run(half, {"patch": np.float32([[1.0003], [0.9997]])})
    np.testing.assert_array_equal(found[:, 0], [1.0, 0.0])
    np.testing.assert_allclose(found[:, 1], np.log(1e9), rtol=2e-3)


def test_one_cast_for_all_who_want_it(network) -> None:
    _, model = network
    half = with_precision(model, "f16")
    casts = Counter(n.input[0] for n in half.graph.node if n.op_type == "Cast")
    assert set(casts.values()) == {1}


def test_weight_beyond_float16_is_refused() -> None:
    weight = numpy_helper.from_array(np.full((1, 2), 1e6, np.float32), "gain")
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["patch", "gain"], ["map"])],
        "large",
        [helper.make_tensor_value_info("patch", TensorProto.FLOAT, ["batch", 1])],
        [helper.make_tensor_value_info("map", TensorProto.FLOAT, ["batch", 2])],
        [weight],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    with pytest.raises(TrainerError, match=r"weight gain: 1e\+06 is beyond f16; use bf16 or f32"):
        with_precision(model, "f16")
    found = run(with_precision(model, "bf16"), {"patch": np.float32([[2.0]])})
    np.testing.assert_allclose(found, np.full((1, 2), 2e6), rtol=1e-2)
    with pytest.raises(TrainerError, match="int8: the network has no convolutions"):
        quantized(model, {"patch": np.zeros((1, 1), np.float32)})


def test_file_that_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "a.onnx").write_bytes(b"\xff\xff not a network")
    with pytest.raises(TrainerError, match=r"a.onnx: not an ONNX model"):
        read_model(tmp_path / "a.onnx")


def test_simplified_leaves_its_argument_alone() -> None:
    model = onnx.load(MODELS / "off_grid.onnx")
    before = model.SerializeToString()
    simplified(model)
    assert model.SerializeToString() == before
