"""How far the truth scatters about what a network off the grid states, measured at its export."""

from collections.abc import Sequence

import numpy as np
from pydantic import BaseModel, ConfigDict, Field


class Spread(BaseModel):
    """At one σ of the PSF; the defaults are for a network of which it was not measured."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    sigma_px: float = Field(gt=0.0, description="of the sensor it was measured for")
    count: tuple[float, float] = Field(
        (0.05, 0.05), description="variance of the number of targets, a + b Σ p(1 − p)"
    )
    position: float = Field(1.0, gt=0.0, description="factor on the variances of positions")
    intensity: float = Field(1.0, gt=0.0, description="factor on the variances of intensities")


def spread_at(measured: Sequence[Spread], sigma_px: float) -> Spread:
    """Of a sensor of this σ: between what was measured, outside of that as at its nearer end."""
    if not measured:
        return Spread(sigma_px=sigma_px)
    ordered = sorted(measured, key=lambda spread: spread.sigma_px)
    table = np.array([[*spread.count, spread.position, spread.intensity] for spread in ordered])
    sigmas = [spread.sigma_px for spread in ordered]
    a, b, position, intensity = (float(np.interp(sigma_px, sigmas, row)) for row in table.T)
    return Spread(sigma_px=sigma_px, count=(a, b), position=position, intensity=intensity)
