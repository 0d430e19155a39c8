"""An engine so simple that its maps are known: map = reshape(flatten(patch) @ W)."""

import json
from pathlib import Path

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from engines.manifest import sha256_of

SIZE, C, MAX_BATCH = 11, 3, 16


def weights(c: int = C) -> np.ndarray:
    rng = np.random.default_rng(7)
    return rng.normal(size=(SIZE**2, (c * SIZE) ** 2)).astype(np.float32) / SIZE


def write_model(path: Path, c: int = C) -> None:
    """A linear network, map = reshape(flatten(patch) @ W): small enough to know its answer."""
    nodes = [
        helper.make_node("Reshape", ["patch", "flat"], ["row"]),
        helper.make_node("MatMul", ["row", "w"], ["cells"]),
        helper.make_node("Reshape", ["cells", "square"], ["map"]),
    ]
    graph = helper.make_graph(
        nodes,
        "linear",
        [helper.make_tensor_value_info("patch", TensorProto.FLOAT, ["batch", SIZE, SIZE])],
        [helper.make_tensor_value_info("map", TensorProto.FLOAT, ["batch", c * SIZE, c * SIZE])],
        [
            numpy_helper.from_array(weights(c), "w"),
            numpy_helper.from_array(np.array([-1, SIZE**2]), "flat"),
            numpy_helper.from_array(np.array([-1, c * SIZE, c * SIZE]), "square"),
        ],
    )
    opset = [helper.make_opsetid("", 20)]
    path.write_bytes(
        helper.make_model(graph, opset_imports=opset, ir_version=10).SerializeToString()
    )


def write_engine(folder: Path, name: str = "linear", **fields: object) -> Path:
    """A model and its manifest, with `fields` of the manifest changed; the manifest's path."""
    model = folder / f"{name}.onnx"
    if not model.exists():
        write_model(model)
    plain = {
        "name": name,
        "network": "linear",
        "settings": {},
        "size_px": SIZE,
        "c": C,
        "sigma_px": 0.5,
        "scaling": "full_scale",
        "sensor": {"sigma_px": 0.5},
        "detection_threshold": 50 / 255,
        "separate": 0.0,
        "max_batch": MAX_BATCH,
        "profile": "csist-100k",
        "seed": 1,
        "samples": 0,
        "training_s": 0.0,
        "loss": 0.0,
        "cso_map": 0.4,
        "parameters": 1,
        "onnx_sha256": sha256_of(model),
        "weights_sha256": "0" * 64,
        "versions": {},
        **fields,
    }
    path = model.with_suffix(".json")
    path.write_text(json.dumps(plain))
    return path


def patches(number: int) -> np.ndarray:
    return np.random.default_rng(3).random((number, SIZE, SIZE), np.float32)
