"""The manifest beside a model, `NAME.json` for `NAME.onnx`: what it is, for whom, from where."""

import hashlib
import os
from pathlib import Path
from typing import Any, Literal, Protocol

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from engines.errors import EngineError, first_fault
from engines.scaling import Plane, Scaling

SIGMA_TOLERANCE = 0.15
"""A sensor's σ may differ by this share: field engines are trained on ±10 %."""

Output = Literal["intensity-map", "cell-targets"]
"""What a network says of each cell: its intensity, or the target in it (7 channels)."""

UNMEASURED_SPREAD = (0.05, 0.05)
"""Of the count, where it was not measured; see `Manifest.count_spread`."""

CHANNELS = 7
"""Of cell-targets: probability, x, y, intensity, and the sigmas of these three."""

NAME_PATTERN = r"^[A-Za-z0-9_.-]{1,64}$"
Sha256 = Field(pattern=r"^[0-9a-f]{64}$")


class SensorLike(Protocol):
    """What an engine asks about a sensor; `pipeline.physics.sensor.Sensor` is one."""

    @property
    def sigma_px(self) -> float:
        """Of the Gaussian PSF, px."""
        ...

    @property
    def full_scale(self) -> int:
        """Count at which a pixel saturates, DN."""
        ...

    @property
    def noiseless(self) -> bool:
        """True where only rounding separates a measurement from its expectation."""
        ...


class SensorNeeds(BaseModel):
    """The sensor a network was trained for; a field left out may be anything."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    sigma_px: float | None = Field(None, gt=0.0)
    sigma_range_px: tuple[float, float] | None = Field(
        None, description="of a network that is told the sensor's σ"
    )
    full_scale: int | None = Field(None, ge=1)
    noiseless: bool | None = None

    @property
    def number(self) -> int:
        """How many fields are set: the more, the more specific."""
        return len(self.model_dump(exclude_none=True))

    def mismatches(self, sensor: SensorLike) -> list[str]:
        """What does not fit, e.g. "made for sigma_px 0.5, the sensor has 0.8"; empty if all does.

        sigma_px may differ by SIGMA_TOLERANCE of the engine's and must lie in sigma_range_px; the
        other fields must be equal.
        """
        found = []
        for name, wanted in self.model_dump(exclude_none=True).items():
            has = getattr(sensor, "sigma_px" if name == "sigma_range_px" else name)
            if not _serves(name, wanted, has):
                found.append(f"made for {_said(name, wanted)}, the sensor has {_plain(has)}")
        return found


def _serves(name: str, wanted: Any, has: float | bool) -> bool:
    if name == "sigma_px":
        return bool(abs(has - wanted) <= SIGMA_TOLERANCE * wanted)
    if name == "sigma_range_px":
        return bool(wanted[0] <= has <= wanted[1])
    return bool(has == wanted)


def _said(name: str, wanted: Any) -> str:
    if name == "sigma_range_px":
        return f"sigma_px {wanted[0]:g} to {wanted[1]:g}"
    return f"{name} {_plain(wanted)}"


def _plain(value: float | bool) -> str:
    return ("yes" if value else "no") if isinstance(value, bool) else f"{value:g}"


class Manifest(BaseModel):
    """Everything there is to know of an engine; unknown fields are errors.

    Patches (B, *patch_shape) and maps (B, *map_shape) are float32, intensities in network units
    (see engines/scaling.py); `output` says what the map holds of each cell.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    format: Literal["irst-engine/1"] = "irst-engine/1"
    name: str = Field(pattern=NAME_PATTERN)
    network: str = Field(description="file of trainer/networks it was made from")
    settings: dict[str, Any] = Field(description="that network's Config")
    size_px: int = Field(ge=3, le=255)
    c: int = Field(description="sub-pixel division: each pixel is c × c cells")
    sigma_px: float = Field(gt=0.0, description="PSF the network computes with, px")
    planes: tuple[Plane, ...] = ("signal",)
    output: Output = "intensity-map"
    scaling: Scaling
    sensor: SensorNeeds
    detection_threshold: float = Field(gt=0.0, description="network units")
    separate: float = Field(
        ge=0.0, le=1.0, description="a peak has this share of its largest neighbour; 0: any cell"
    )
    count_spread: tuple[float, float] = Field(
        UNMEASURED_SPREAD, description="of cell-targets: variance of the count, a + b Σ p(1 − p)"
    )
    max_batch: int = Field(16, ge=1, le=4096, description="patches inferred at a time")
    profile: str = Field(description="data it was trained on")
    seed: int
    samples: int = Field(ge=0, description="patches seen in training")
    training_s: float = Field(ge=0.0)
    loss: float = Field(description="training loss at the end; a log-likelihood may be negative")
    cso_map: float = Field(ge=0.0, le=1.0, description="on held-out patches of the profile")
    parameters: int = Field(ge=0)
    onnx_sha256: str = Sha256
    weights_sha256: str = Sha256
    versions: dict[str, str] = Field(description="library → version it was made with")

    @property
    def patch_shape(self) -> tuple[int, ...]:
        """Of what is given of one patch: (size_px, size_px), with the planes first if several."""
        image = (self.size_px, self.size_px)
        return image if self.planes == ("signal",) else (len(self.planes), *image)

    @property
    def map_shape(self) -> tuple[int, ...]:
        """Of one patch's map: (cells, cells), cells = c · size_px, or (7, cells, cells)."""
        cells = self.c * self.size_px
        return (cells, cells) if self.output == "intensity-map" else (CHANNELS, cells, cells)

    def fits(self, sensor: SensorLike) -> list[str]:
        """One line for each thing about the sensor this engine was not made for."""
        return self.sensor.mismatches(sensor)

    def write(self, path: Path) -> None:
        """Write as JSON, whole or not at all."""
        partial = path.with_name(path.name + ".part")
        with partial.open("w", encoding="utf-8") as file:
            file.write(self.model_dump_json(indent=2, exclude_none=True) + "\n")
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)


def read_manifest(path: Path) -> Manifest:
    """Read and check a manifest; raises EngineError naming the field that is wrong."""
    try:
        manifest = Manifest.model_validate_json(path.read_bytes())
    except OSError as error:
        raise EngineError(f"{path}: cannot read the manifest ({error.strerror})") from error
    except ValidationError as error:
        raise EngineError(
            f"{path}: {first_fault(error)}; write it again with `trainer export`"
        ) from error
    for name in ("size_px", "c"):
        value = getattr(manifest, name)
        if value < 1 or value % 2 == 0:
            raise EngineError(
                f"{path}: {name} must be odd, got {value}; train and export a network with an "
                f"odd {name}"
            )
    return manifest


def sha256_of(path: Path) -> str:
    """Hash of a file, 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
