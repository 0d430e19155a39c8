"""A detector in the layout of YOLO made of five operators: bright cells of 8 × 8 px are points."""

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from engines.detector_manifest import DetectorManifest
from engines.manifest import sha256_of

CELL_PX = 8
BRIGHT = 3.0
"""asinh of about ten times the noise."""


def write_tiny_yolo(
    folder: Path, height: int = 128, width: int = 160, *, batch: str | int = "batch", **fields
) -> Path:
    """tiny.onnx and its manifest; classes point and extended, of which the second is never seen."""
    rows, columns = height // CELL_PX, width // CELL_PX
    number = rows * columns
    y, x = np.mgrid[:rows, :columns].reshape(2, 1, -1) * CELL_PX + CELL_PX / 2
    side = np.full_like(x, CELL_PX)
    box = np.stack([x, y, side, side], axis=1).astype(np.float32)  # (1, 4, N) cxcywh
    constants = {"box": box, "shape": np.array([0, 1, number]), "bright": np.float32(BRIGHT)}
    constants["zero"] = np.float32(0.0)
    nodes = [
        helper.make_node(
            "MaxPool", ["images"], ["peak"], kernel_shape=[CELL_PX] * 2, strides=[CELL_PX] * 2
        ),
        helper.make_node("Reshape", ["peak", "shape"], ["flat"]),
        helper.make_node("Sub", ["flat", "bright"], ["above"]),
        helper.make_node("Sigmoid", ["above"], ["score"]),
        helper.make_node("Mul", ["score", "zero"], ["nothing"]),
        helper.make_node("Add", ["nothing", "box"], ["boxes"]),
        helper.make_node("Concat", ["boxes", "score", "nothing"], ["output0"], axis=1),
    ]
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, [batch, 1, height, width])],
        [helper.make_tensor_value_info("output0", TensorProto.FLOAT, [batch, 6, number])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    path = folder / "tiny.onnx"
    path.write_bytes(model.SerializeToString())
    tiny_manifest(
        height=height,
        width=width,
        candidates=number,
        max_batch=1 if batch == 1 else 4,
        onnx_sha256=sha256_of(path),
        **fields,
    ).write(path.with_suffix(".json"))
    return path


def tiny_manifest(**fields) -> DetectorManifest:
    """Of a network that takes one plane pixel by pixel; `fields` go before."""
    given = {
        "name": "tiny",
        "classes": ("point", "extended"),
        "point_sources": ("point",),
        "channels": 1,
        "height": 128,
        "width": 160,
        "candidates": 320,
        "stretch": "noise",
        "resize": False,
        "min_score": 0.5,
        "margin_px": 2.0,
        "seed": 0,
        "samples": 0,
        "training_s": 0.0,
        "loss": 0.0,
        "parameters": 0,
        "onnx_sha256": "0" * 64,
        "weights_sha256": "0" * 64,
        "versions": {},
    }
    return DetectorManifest(**{**given, **fields})
