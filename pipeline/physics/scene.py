"""Whole frames of a staring sensor: clouds, a horizon, bad pixels and moving targets with truth.

frame(i) = measure(sky or ground + Σ targets, noise of frame i), then the bad pixels. All of it
follows from the settings' seed and i alone, so a recording can be made anew and read from any
frame.

Sky and ground are Gaussian fields with the power spectrum |f|^−β, drawn once; the clouds drift
along x. The ground lies below a wavy line, which is blurred by the PSF like everything else.

Time is cut into episodes of `episode_frames`. In each, every track is straight and of constant
velocity, and the following holds for all its frames: no target comes closer than `margin_px` to
the edge of the frame or to the highest point of the horizon, so all lie over sky; targets of
different groups (a single target is a group of one) stay at least `group_separation_px` apart;
targets of a group move together, in a square of 2 · `group_half_width_px`, at least
`separation_px` apart. The next episode has new tracks with new identities.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr

from pipeline.physics import noise
from pipeline.physics.arrays import Array, NumpyRandom
from pipeline.physics.groups import MAX_TARGETS, PROFILES, draw_arrangements
from pipeline.physics.measurement import measure
from pipeline.physics.psf import render
from pipeline.physics.sensor import Sensor

ATTEMPTS = 2000
CLOUD_SLOPE = 3.2
GROUND_SLOPE = 2.6
CLOUDS, EPISODE, NOISE, BAD = range(4)  # streams of random numbers under one seed


@dataclass(frozen=True)
class SceneSettings:
    """What the scene holds. Lengths in px, velocities in px a frame, levels in counts (DN).

    snr: lowest and highest peak SNR, drawn uniform in its logarithm: a target's brightest pixel
    over the noise of the sky, *wherever in that pixel the target lies* (in its middle a target of
    sigma_px 0.5 is 2.05 times as high as on its corner, where this holds with equality).
    horizon: where the ground begins, as a share of the height; 1 for no ground.
    """

    seed: int = 0
    width: int = 640
    height: int = 512
    sensor: Sensor = field(default_factory=lambda: PROFILES["field"].sensor)
    singles: int = 8
    groups: int = 8
    snr: tuple[float, float] = (8.0, 40.0)
    speed_px: tuple[float, float] = (0.05, 0.4)
    episode_frames: int = 200
    sky: float = 1000.0
    cloud_rms: float = 60.0
    cloud_drift_px: float = 0.1
    horizon: float = 0.8
    ground_excess: float = 400.0
    ground_rms: float = 40.0
    bad_share: float = 0.0003
    group_half_width_px: float = PROFILES["field"].half_width_px
    separation_px: float = PROFILES["field"].separation_px
    group_separation_px: float = 16.0
    margin_px: float = 12.0

    @property
    def intensity_per_snr(self) -> float:
        """Intensity (DN) of a target of peak SNR 1: noise over the share of its brightest pixel.

        The share is that of a target on the corner of four pixels, the noise that of sky twice
        the clouds' rms above its mean.
        """
        level = self.sky + 2.0 * self.cloud_rms
        deviation = math.sqrt(float(noise.variance(np.asarray(level), self.sensor)))
        return deviation / math.erf(1.0 / (math.sqrt(2.0) * self.sensor.sigma_px)) ** 2 * 4.0


class SceneFrame(NamedTuple):
    """A frame and the targets in it."""

    pixels_HW: NDArray[np.uint16]  # counts
    xy_px: NDArray[np.float64]  # (M, 2)
    target_id: NDArray[np.int32]  # (M,) never used again in another episode
    intensity: NDArray[np.float32]  # (M,) counts


class Tracks(NamedTuple):
    """The targets of one episode."""

    start_px: NDArray[np.float64]  # (M, 2) in the episode's first frame
    velocity_px: NDArray[np.float64]  # (M, 2) a frame
    intensity: NDArray[np.float32]  # (M,) counts


class Scene:
    """Frames of one scene, in any order.

    bad_pixels_HW: bool (H, W), True where a pixel is dead (reads a constant near 0) or hot (reads
    too much by a constant, from 200 DN to half of full scale). Raises ValueError if the targets
    do not fit into the sky, or the sky not below full scale.
    """

    def __init__(self, settings: SceneSettings) -> None:
        self.settings = settings
        if settings.sky + settings.ground_excess >= settings.sensor.full_scale:
            raise ValueError(
                f"scene: sky and ground of {settings.sky + settings.ground_excess:g} counts do not "
                f"fit below sensor.full_scale, {settings.sensor.full_scale}; raise it"
            )
        shape = (settings.height, settings.width)
        rng = NumpyRandom([settings.seed, CLOUDS])
        clouds = _power_law(shape, CLOUD_SLOPE, rng)
        self._clouds = np.tile(settings.cloud_rms * clouds, (1, 2)).astype(np.float32)
        line = _horizon_line(settings, rng)
        self._horizon_top_px = float(line.min())
        below = np.arange(settings.height)[:, None] - line
        self._ground_share = ndtr(below / settings.sensor.sigma_px).astype(np.float32)
        texture = settings.ground_rms * _power_law(shape, GROUND_SLOPE, rng)
        ground = self._ground_share * (settings.ground_excess + texture)
        self._still = (settings.sky + ground).astype(np.float32)
        rng = NumpyRandom([settings.seed, BAD])
        self.bad_pixels_HW = rng.uniform(shape) < settings.bad_share
        number = int(self.bad_pixels_HW.sum())
        self._dead = rng.uniform((number,)) < 0.5
        self._dead_counts = np.floor(20.0 * rng.uniform((number,)))
        half_scale = max(0.5 * settings.sensor.full_scale / 200.0, 1.0)
        self._hot_excess = np.round(200.0 * half_scale ** rng.uniform((number,)))
        self._episode = (-1, self._draw_tracks(0))

    def truth(
        self, index: int
    ) -> tuple[NDArray[np.float64], NDArray[np.int32], NDArray[np.float32]]:
        """Positions (M, 2) px, identities and intensities (M,) in frame `index`, without pixels."""
        episode, step = divmod(index, self.settings.episode_frames)
        if self._episode[0] != episode:
            self._episode = (episode, self._draw_tracks(episode))
        tracks = self._episode[1]
        first = episode * (self.settings.singles + MAX_TARGETS * self.settings.groups)
        target_id = np.arange(first, first + len(tracks.intensity), dtype=np.int32)
        return tracks.start_px + step * tracks.velocity_px, target_id, tracks.intensity

    def frame(self, index: int) -> SceneFrame:
        """Frame `index` ≥ 0 with its truth."""
        xy_px, target_id, intensity = self.truth(index)
        mean = self._background(index)
        _add_targets(mean, xy_px, intensity, self.settings.sensor.sigma_px)
        counts = measure(mean, self.settings.sensor, _Random32([self.settings.seed, NOISE, index]))
        pixels = counts.astype(np.uint16)
        bad = pixels[self.bad_pixels_HW]
        hot = np.minimum(bad + self._hot_excess, self.settings.sensor.full_scale)
        pixels[self.bad_pixels_HW] = np.where(self._dead, self._dead_counts, hot)
        return SceneFrame(pixels, xy_px, target_id, intensity)

    def _background(self, index: int) -> NDArray[np.float32]:
        """Expected counts without targets (H, W)."""
        width = self.settings.width
        whole, part = divmod(index * self.settings.cloud_drift_px, 1.0)
        first = int(whole) % width
        near = self._clouds[:, first : first + width]
        far = self._clouds[:, first + 1 : first + 1 + width]
        clouds = np.float32(1.0 - part) * near + np.float32(part) * far
        result: NDArray[np.float32] = self._still + clouds * (1.0 - self._ground_share)
        return result

    def _draw_tracks(self, episode: int) -> Tracks:
        """All targets of an episode, by drawing a track anew until it keeps clear of the others."""
        settings = self.settings
        rng = NumpyRandom([settings.seed, EPISODE, episode])
        counts = [1] * settings.singles
        counts += [2 + int((MAX_TARGETS - 1) * share) for share in rng.uniform((settings.groups,))]
        reach = settings.group_half_width_px
        clear = settings.group_separation_px + 2.0 * math.sqrt(2.0) * reach
        low = np.full(2, settings.margin_px + reach)
        lowest_row = min(settings.height - 1.0, self._horizon_top_px) - settings.margin_px - reach
        high = np.array([settings.width - 1.0 - settings.margin_px - reach, lowest_row])
        last = settings.episode_frames - 1
        starts = np.empty((0, 2))
        velocities = np.empty((0, 2))
        for number in range(len(counts)):
            for _ in range(ATTEMPTS):
                angle, share, *place = rng.uniform((4,))
                slow, fast = settings.speed_px
                speed = slow + (fast - slow) * share
                velocity = speed * np.array(
                    [math.cos(math.tau * angle), math.sin(math.tau * angle)]
                )
                start = low + (high - low) * np.asarray(place)
                end = start + last * velocity
                inside = bool(np.all((high >= low) & (end >= low) & (end <= high)))
                if inside and _closest(starts - start, velocities - velocity, last) >= clear:
                    break
            else:
                raise ValueError(
                    f"scene: no room for target {number + 1} of {len(counts)} in the sky of a "
                    f"{settings.width}×{settings.height} frame; use fewer or slower targets or "
                    "shorter episodes"
                )
            starts = np.vstack([starts, start])
            velocities = np.vstack([velocities, velocity])
        offsets = [
            draw_arrangements(1, count, reach, settings.separation_px, rng)[0]
            if count > 1
            else np.zeros((1, 2))
            for count in counts
        ]
        start_px = np.repeat(starts, counts, axis=0) + np.concatenate([np.zeros((0, 2)), *offsets])
        dim, bright = settings.snr
        snr = dim * (bright / dim) ** rng.uniform((sum(counts),))
        intensity = (settings.intensity_per_snr * snr).astype(np.float32)
        return Tracks(start_px, np.repeat(velocities, counts, axis=0), intensity)


class _Random32(NumpyRandom):
    """Normals in float32, twice as fast for a whole frame."""

    def normal(self, shape: Sequence[int]) -> Array:
        return self.generator.standard_normal(tuple(shape), dtype=np.float32)


def _power_law(shape: tuple[int, int], slope: float, rng: NumpyRandom) -> NDArray[np.float64]:
    """Periodic Gaussian field with power spectrum |f|^−slope, mean 0 and rms 1."""
    f_y = np.fft.fftfreq(shape[0])[:, None]
    f_x = np.fft.rfftfreq(shape[1])
    frequency = np.hypot(f_y, f_x)
    frequency[0, 0] = np.inf
    spectrum = np.fft.rfft2(rng.normal(shape)) * frequency ** (-0.5 * slope)
    field_HW = np.fft.irfft2(spectrum, s=shape)
    result: NDArray[np.float64] = field_HW / field_HW.std()
    return result


def _horizon_line(settings: SceneSettings, rng: NumpyRandom) -> NDArray[np.float64]:
    """Row of the horizon in each column (W,), a sum of three slow waves."""
    x = np.arange(settings.width)
    line = np.full(settings.width, settings.horizon * settings.height)
    for wavelength_px, phase in zip((500.0, 210.0, 90.0), rng.uniform((3,)), strict=True):
        line += 0.008 * wavelength_px * np.sin(math.tau * (x / wavelength_px + phase))
    if settings.horizon >= 1.0:
        line[:] = np.inf
    return line


def _closest(offset_px: NDArray[np.float64], velocity_px: NDArray[np.float64], last: int) -> float:
    """Least distance, over times 0…last, of points at `offset` moving with `velocity` (N, 2)."""
    if len(offset_px) == 0:
        return math.inf
    square = np.maximum((velocity_px**2).sum(axis=1), 1e-12)
    time = np.clip(-(offset_px * velocity_px).sum(axis=1) / square, 0.0, last)
    return float(np.hypot(*(offset_px + time[:, None] * velocity_px).T).min())


def _add_targets(
    mean_HW: NDArray[np.float32],
    xy_px: NDArray[np.float64],
    intensity: NDArray[np.float32],
    sigma_px: float,
) -> None:
    """Add point sources in place, each in a window of 6 sigma round it, cut by the frame."""
    height, width = mean_HW.shape
    reach = math.ceil(6.0 * sigma_px) + 1
    size = 2 * reach + 1
    corner = np.round(xy_px).astype(np.int64) - reach  # (M, 2)
    local = (xy_px - corner)[:, None, :]
    windows = render(local, intensity[:, None].astype(np.float64), (size, size), sigma_px)
    for (x, y), window in zip(corner.tolist(), windows.astype(np.float32), strict=True):
        left, top = max(x, 0), max(y, 0)
        right, bottom = min(x + size, width), min(y + size, height)
        mean_HW[top:bottom, left:right] += window[top - y : bottom - y, left - x : right - x]
