"""Groups of closely-spaced targets on a patch: the benchmark's profiles, drawn from a seed.

A group of K targets is uniform over all arrangements in its square that keep every pair at least
`separation_px` apart: the distribution of joint rejection (draw all K, keep the draw if all pairs
are far enough apart). Five targets in one pixel at 0.494 px pass 1 time in 7,000, so targets are
drawn one after another and an arrangement is thrown away, whole, at its first conflict: the same
distribution, since an arrangement is kept exactly when every pair is apart, at a hundredth of the
work. (Re-drawing only the last target would be faster still, and wrong.)
"""

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

from array_api_compat import array_namespace, device

from pipeline.physics.arrays import Array, Random
from pipeline.physics.measurement import measure
from pipeline.physics.psf import RAYLEIGH_PER_SIGMA, render
from pipeline.physics.sensor import Sensor

MAX_TARGETS = 5
SIZE_PX = 11
DRAW_BATCH = 1 << 18


@dataclass(frozen=True)
class Profile:
    """How groups are drawn on an 11 × 11 patch, and the sensor that measures them.

    pixel_range: first and last pixel, along both axes, the group's square may be centred on.
    half_width_px: half the side of that square. intensity: lowest and highest, counts.
    log_uniform: intensity uniform in its logarithm. sigma_spread: σ of each patch is uniform
    within ± this share of the sensor's. background: counts. fewest: targets a patch, at least.
    brightness: factor on all intensities of a patch, lowest and highest, uniform in its logarithm.
    sigma_range_px: of the sensors a network is trained for, if for more than one. blind_share: of
    the patches that have unusable pixels, in training.
    """

    name: str
    sensor: Sensor
    pixel_range: tuple[int, int]
    intensity: tuple[float, float]
    half_width_px: float = 0.5
    separation_px: float = 0.52 * RAYLEIGH_PER_SIGMA * 0.5
    log_uniform: bool = False
    sigma_spread: float = 0.0
    background: float = 0.0
    fewest: int = 1
    brightness: tuple[float, float] = (1.0, 1.0)
    sigma_range_px: tuple[float, float] | None = None
    blind_share: float = 0.0

    def at_sigma(self, sigma_px: float) -> "Profile":
        """The same groups for a sensor of another σ: as large and as far apart, measured in σ."""
        scale = sigma_px / self.sensor.sigma_px
        return replace(
            self,
            sensor=replace(self.sensor, sigma_px=sigma_px),
            half_width_px=self.half_width_px * scale,
            separation_px=self.separation_px * scale,
        )


BENCHMARK_SENSOR = Sensor(id="csist", sigma_px=0.5, full_scale=255)

FIELD_SIGMA_SPREAD = 0.1
FIELD_SENSOR = Sensor(
    sigma_px=0.5,
    full_scale=16383,
    read_noise=6.0,
    gain=8.0,
    sigma_error=FIELD_SIGMA_SPREAD / math.sqrt(3.0),  # of a uniform distribution
)

PROFILES = {
    profile.name: profile
    for profile in (
        Profile("csist-100k", BENCHMARK_SENSOR, pixel_range=(0, 10), intensity=(220.0, 250.0)),
        Profile("interior", BENCHMARK_SENSOR, pixel_range=(2, 8), intensity=(220.0, 250.0)),
        Profile(
            "field",
            replace(FIELD_SENSOR, id="field"),
            pixel_range=(4, 6),
            intensity=(300.0, 3000.0),
            half_width_px=1.0,
            log_uniform=True,
            sigma_spread=FIELD_SIGMA_SPREAD,
            background=1000.0,
        ),
        Profile(
            "sensors",
            replace(FIELD_SENSOR, id="sensors"),
            pixel_range=(3, 7),
            intensity=(300.0, 3000.0),
            half_width_px=1.0,
            log_uniform=True,
            sigma_spread=FIELD_SIGMA_SPREAD,
            background=1000.0,
            fewest=0,
            brightness=(0.4, 15.0),
            sigma_range_px=(0.4, 1.2),
            blind_share=0.15,
        ),
    )
}


class Groups(NamedTuple):
    """Groups on patches, padded with intensity 0 and position 0 to MAX_TARGETS."""

    count: Array  # (B,) 0…MAX_TARGETS
    xy_px: Array  # (B, K, 2)
    intensity: Array  # (B, K) counts
    sigma_px: Array  # (B,) of the PSF that patch was seen through


def draw_arrangements(
    number: int, targets: int, half_width_px: float, separation_px: float, rng: Random
) -> Array:
    """`number` independent arrangements of `targets` points, (number, targets, 2) px.

    Uniform in [−half_width, half_width)² given that all pairs are ≥ separation_px apart.
    """
    kept: list[Array] = []
    found = 0
    rate = 1.0
    while found < number:
        batch = min(DRAW_BATCH, int((number - found) * 1.2 / rate) + 16)
        side = 2.0 * half_width_px
        points = ((rng.uniform((batch, 2)) - 0.5) * side)[:, None, :]
        for _ in range(targets - 1):
            xp = array_namespace(points)
            new = (rng.uniform((points.shape[0], 2)) - 0.5) * side
            apart = xp.sum((points - new[:, None, :]) ** 2, axis=-1) >= separation_px**2
            keep = xp.all(apart, axis=-1)
            points = xp.concat([points, new[:, None, :]], axis=1)[keep]
        rate = max(points.shape[0] / batch, 1e-5)
        found += points.shape[0]
        kept.append(points)
    return array_namespace(points).concat(kept, axis=0)[:number]


def draw_groups(
    profile: Profile, number: int, rng: Random, max_targets: int = MAX_TARGETS
) -> Groups:
    """Draw `number` groups; counts are uniform over fewest…max_targets, in random order."""
    draw = rng.uniform((number,))
    xp = array_namespace(draw)
    counts = max_targets + 1 - profile.fewest
    count = xp.astype(xp.floor(draw * counts), xp.int64) + profile.fewest
    offset = xp.zeros((number, MAX_TARGETS, 2), dtype=draw.dtype, device=device(draw))
    for targets in range(1, max_targets + 1):
        chosen = xp.nonzero(count == targets)[0]
        if chosen.shape[0]:
            offset[chosen, :targets, :] = draw_arrangements(
                chosen.shape[0], targets, profile.half_width_px, profile.separation_px, rng
            )
    first, last = profile.pixel_range
    pixel = first + xp.floor(rng.uniform((number, 1, 2)) * (last - first + 1))
    low, high = profile.intensity
    share = rng.uniform((number, MAX_TARGETS))
    intensity = low * (high / low) ** share if profile.log_uniform else low + (high - low) * share
    dimmest, brightest = profile.brightness
    if brightest > dimmest:
        intensity = intensity * dimmest * (brightest / dimmest) ** rng.uniform((number, 1))
    present = xp.arange(MAX_TARGETS, device=device(count)) < count[:, None]
    spread = profile.sigma_spread * (2.0 * rng.uniform((number,)) - 1.0)
    return Groups(
        count=count,
        xy_px=xp.where(present[..., None], pixel + offset, 0.0 * offset),
        intensity=xp.where(present, intensity, 0.0 * intensity),
        sigma_px=profile.sensor.sigma_px * (1.0 + spread),
    )


def draw_patches(
    profile: Profile, number: int, rng: Random, max_targets: int = MAX_TARGETS
) -> tuple[Array, Groups]:
    """Measured patches (number, 11, 11) in counts, background included, and their truth."""
    groups = draw_groups(profile, number, rng, max_targets)
    mean = profile.background + render(
        groups.xy_px, groups.intensity, (SIZE_PX, SIZE_PX), groups.sigma_px[:, None]
    )
    return measure(mean, profile.sensor, rng), groups
