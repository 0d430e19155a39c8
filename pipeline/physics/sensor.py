"""What the imaging model must know of a sensor."""

import math
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Sensor:
    """A sensor, as far as a point source is concerned.

    id: its name on the wire. sigma_px: of the Gaussian PSF, px. full_scale: the count at which a
    pixel saturates, DN. read_noise: DN rms. gain: electrons per DN (shot-noise variance is
    counts/gain; infinite = no shot noise). sigma_error: standard error of sigma_px, as a share of
    it. ifov_rad: angle of one pixel, radians, if known.
    """

    id: str = "sensor"
    sigma_px: float = 0.5
    full_scale: int = 16383
    read_noise: float = 0.0
    gain: float = math.inf
    ifov_rad: float | None = None
    sigma_error: float = 0.0

    def __post_init__(self) -> None:
        rules = (
            ("sigma_px", 0.1 <= self.sigma_px <= 5.0, "from 0.1 to 5 px"),
            ("full_scale", 1 <= self.full_scale <= 65535, "from 1 to 65535 DN"),
            ("read_noise", 0.0 <= self.read_noise < math.inf, "zero or more DN"),
            ("gain", self.gain > 0.0, "positive electrons per DN (null: no shot noise)"),
            ("sigma_error", 0.0 <= self.sigma_error <= 0.5, "a share of sigma_px, from 0 to 0.5"),
            ("ifov_rad", self.ifov_rad is None or self.ifov_rad > 0.0, "positive radians"),
        )
        for name, holds, rule in rules:
            if not holds:
                raise ValueError(f"sensor.{name} must be {rule}, got {getattr(self, name)}")

    @property
    def noiseless(self) -> bool:
        """True where only rounding separates a measurement from its expectation."""
        return self.read_noise == 0.0 and math.isinf(self.gain)

    def to_attributes(self) -> dict[str, Any]:
        """Plain JSON types; an infinite gain becomes null, what is not known is left out."""
        attributes = {
            "id": self.id,
            "sigma_px": self.sigma_px,
            "full_scale": self.full_scale,
            "read_noise": self.read_noise,
            "gain": None if math.isinf(self.gain) else self.gain,
        }
        if self.sigma_error:
            attributes["sigma_error"] = self.sigma_error
        if self.ifov_rad is not None:
            attributes["ifov_rad"] = self.ifov_rad
        return attributes

    @classmethod
    def from_attributes(cls, attributes: dict[str, Any]) -> "Sensor":
        """Inverse of `to_attributes`; raises ValueError or TypeError on values of another kind."""
        gain = attributes.get("gain")
        ifov_rad = attributes.get("ifov_rad")
        return cls(
            id=str(attributes.get("id", "sensor")),
            sigma_px=float(attributes["sigma_px"]),
            full_scale=int(attributes["full_scale"]),
            read_noise=float(attributes["read_noise"]),
            gain=math.inf if gain is None else float(gain),
            ifov_rad=None if ifov_rad is None else float(ifov_rad),
            sigma_error=float(attributes.get("sigma_error", 0.0)),
        )
