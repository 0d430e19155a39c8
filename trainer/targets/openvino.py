"""OpenVINO: the ONNX model itself, which it compiles when it is loaded.

Precision other than int8 is a setting then, not part of the graph.
"""

from importlib.metadata import version
from pathlib import Path

from trainer.targets import BuildFacts, cpu_name


def build(onnx: bytes, out: Path) -> BuildFacts:
    """Write the model file."""
    out.write_bytes(onnx)
    return BuildFacts(f"openvino {version('openvino')}", cpu_name())
