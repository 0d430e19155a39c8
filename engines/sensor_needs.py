"""The sensors a network was trained for, and whether one of them is before us."""

from typing import Any, Protocol

from pydantic import BaseModel, ConfigDict, Field

SIGMA_TOLERANCE = 0.15
"""A sensor's σ may differ by this share: field engines are trained on ±10 %."""


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
