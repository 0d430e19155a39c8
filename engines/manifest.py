"""The manifest beside a model, `NAME.json`: what it is, for whom, from where.

Common to all engines is `EngineManifest`; `Manifest` is that of networks that unmix.
"""

import hashlib
from abc import abstractmethod
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from engines.build import Build, Sha256
from engines.errors import EngineError, first_fault
from engines.scaling import Plane, Scaling
from engines.sensor_needs import SensorLike, SensorNeeds
from engines.spread import Spread
from engines.whole import write_whole

Output = Literal["intensity-map", "cell-targets"]
"""What a network says of each cell: its intensity, or the target in it (7 channels)."""

CHANNELS = 7
"""Of cell-targets; see pipeline/physics/cell_targets.py."""

NAME_PATTERN = r"^[A-Za-z0-9_.-]{1,64}$"

Condition = Literal["sigma_px"]
"""What a network is told of the sensor besides patches: σ of its PSF, px."""


class EngineManifest(BaseModel):
    """What every engine says of itself; unknown fields are errors.

    The model is `NAME.onnx`, portable and run in float32, unless it was built for a target
    (`trainer compile`): then `build` says for which machine, and what the model file is called.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    format: Literal["irst-engine/1"] = "irst-engine/1"
    name: str = Field(pattern=NAME_PATTERN)
    max_batch: int = Field(16, ge=1, le=4096, description="patches inferred at a time")
    conditions: tuple[Condition, ...] = Field(
        (), description="inputs besides `patch`, of shape (1,), that do not change while it runs"
    )
    seed: int
    samples: int = Field(ge=0, description="patches seen in training")
    training_s: float = Field(ge=0.0)
    loss: float = Field(description="training loss at the end; a log-likelihood may be negative")
    parameters: int = Field(ge=0)
    onnx_sha256: str = Sha256
    weights_sha256: str = Sha256
    versions: dict[str, str] = Field(description="library → version it was made with")
    build: Build | None = None

    @property
    @abstractmethod
    def patch_shape(self) -> tuple[int, ...]:
        """Of what is given of one patch."""

    @property
    @abstractmethod
    def map_shape(self) -> tuple[int, ...]:
        """Of what one patch becomes."""

    @property
    def engine_id(self) -> str:
        """12 hexadecimal digits that tell which engine a message came from.

        Of the portable model's hash, or of the built model's with its target and precision.
        """
        if self.build is None:
            return self.onnx_sha256[:12]
        built = f"{self.build.model_sha256} {self.build.target} {self.build.precision}"
        return hashlib.sha256(built.encode()).hexdigest()[:12]

    def write(self, path: Path) -> None:
        """Write as JSON, whole or not at all."""
        write_whole(path, (self.model_dump_json(indent=2, exclude_none=True) + "\n").encode())


class Manifest(EngineManifest):
    """Of a network that unmixes.

    Patches (B, *patch_shape) and maps (B, *map_shape) are float32, intensities in network units
    (see engines/scaling.py); `output` says what the map holds of each cell.
    """

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
    spreads: tuple[Spread, ...] = Field((), description="of cell-targets; see `spread_at`")
    profile: str = Field(description="data it was trained on")
    cso_map: float = Field(ge=0.0, le=1.0, description="on held-out patches of the profile")

    @property
    def patch_shape(self) -> tuple[int, ...]:
        """Of what is given of one patch: (size_px, size_px), with the planes first if several."""
        image = (self.size_px, self.size_px)
        return image if self.planes == ("signal",) else (len(self.planes), *image)

    @property
    def map_shape(self) -> tuple[int, ...]:
        """Of one patch's map: (cells, cells), cells = c · size_px, or (7 c², size_px, size_px)."""
        cells = self.c * self.size_px
        if self.output == "intensity-map":
            return (cells, cells)
        return (CHANNELS * self.c**2, self.size_px, self.size_px)

    def fits(self, sensor: SensorLike) -> list[str]:
        """One line for each thing about the sensor this engine was not made for."""
        return self.sensor.mismatches(sensor)


AnyManifest = TypeVar("AnyManifest", bound=EngineManifest)


def read_manifest(path: Path) -> Manifest:
    """Read and check a manifest; raises EngineError naming the field that is wrong."""
    manifest = parse_manifest(path, Manifest)
    for name in ("size_px", "c"):
        value = getattr(manifest, name)
        if value < 1 or value % 2 == 0:
            raise EngineError(
                f"{path}: {name} must be odd, got {value}; train and export a network with an "
                f"odd {name}"
            )
    return manifest


def parse_manifest(path: Path, kind: type[AnyManifest]) -> AnyManifest:
    """Read a manifest of this kind; raises EngineError naming the field that is wrong."""
    try:
        return kind.model_validate_json(path.read_bytes())
    except OSError as error:
        raise EngineError(f"{path}: cannot read the manifest ({error.strerror})") from error
    except ValidationError as error:
        raise EngineError(
            f"{path}: {first_fault(error)}; write it again with `trainer export`"
        ) from error


def sha256_of(path: Path) -> str:
    """Hash of a file, 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
