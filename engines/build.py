"""For whom a model was built: what `trainer compile` writes into the manifest.

A portable model (`build: null`) runs anywhere in float32. A built one belongs to a target, and may
belong to one machine: a TensorRT engine is for one version of the library and one kind of GPU.
"""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

Sha256 = Field(pattern=r"^[0-9a-f]{64}$")

Target = Literal["openvino", "tensorrt", "tensorrt-rtx", "torch"]
Precision = Literal["f32", "f16", "bf16", "int8"]

BACKEND: dict[Target, str] = {
    "tensorrt": "tensorrt_cuda",
    "tensorrt-rtx": "tensorrt_rtx",
    "openvino": "openvino_cpu",
    "torch": "torch_program",
}
"""What runs a build, the preferred first."""

SUFFIX: dict[Target, str] = {
    "tensorrt": ".engine",
    "tensorrt-rtx": ".engine",
    "openvino": ".onnx",
    "torch": ".pt2",
}
"""Of the model file beside `NAME.json`."""


class _Facts(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Batch(_Facts):
    """Patches at a time: what may come, and what it was tuned for."""

    least: int = Field(1, ge=1)
    best: int = Field(ge=1)
    most: int = Field(ge=1, le=4096)


class Parity(_Facts):
    """How near its maps are to the reference's, on held-out patches.

    Of an engine for sensors of several σ: at the one where it loses most.
    """

    reference: str = Field(description="e.g. torch 2.13.0 f32")
    patches: int = Field(ge=1)
    sigma_px: float | None = Field(None, gt=0.0, description="of the sensor; None: not unmixing")
    error: float = Field(ge=0.0, description="rms of the difference over rms of the map")
    cso_map: float | None = Field(None, ge=0.0, le=1.0, description="None: it does not unmix")
    reference_cso_map: float | None = Field(None, ge=0.0, le=1.0)

    @property
    def loss(self) -> float:
        """By how much its CSO-mAP is lower than the reference's; 0 if it does not unmix."""
        return (self.reference_cso_map or 0.0) - (self.cso_map or 0.0)


class Latency(_Facts):
    """Of one call, measured when it was built."""

    batch: int = Field(ge=1)
    p50_ms: float = Field(gt=0.0)
    p99_ms: float = Field(gt=0.0)


class Build(_Facts):
    """What a built model is for; a field that does not concern a target is left out."""

    target: Target
    model_sha256: str = Sha256
    precision: Precision
    library: str = Field(description="name and version, e.g. openvino 2026.4.1")
    device: str = Field(description="name of the CPU or GPU")
    compute_capability: str | None = Field(None, pattern=r"^\d+\.\d+$")
    driver: str | None = None
    batch: Batch
    threads: int | None = Field(None, ge=1, description="of a CPU in all; None = all cores")
    streams: int = Field(1, ge=1, le=2, description="batches computed side by side")
    optimisation_level: int | None = Field(None, ge=0, le=5)
    timing_cache_sha256: str | None = Field(None, pattern=r"^[0-9a-f]{64}$")
    parity: Parity | None = Field(None, description="None: it could not be run where it was built")
    latency: tuple[Latency, ...] = ()
