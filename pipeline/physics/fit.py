"""Maximum-likelihood fit of all targets of a patch at once, on the censored likelihood.

Levenberg-Marquardt with Fisher scoring: (J W Jᵀ + λ D) δ = J s, where J are the derivatives of
the expected counts, W the Fisher information of each (possibly censored) pixel, s the derivative
of its log-likelihood. Parameters: x, y, intensity of each target, a constant on top of the local
background, and σ. What is known beforehand, of a target or of all, enters as a Gaussian of each
parameter. `pipeline/physics/newton.py` does the work; groups are padded and masked.
"""

import math
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from pipeline.physics.inverse import inverses
from pipeline.physics.newton import fit_patches
from pipeline.physics.psf import render
from pipeline.physics.sensor import Sensor

Array64 = NDArray[np.float64]
Mask = NDArray[np.bool_]

SHARED = 2
"""Parameters of a patch that are not a target's: the offset of its background, and σ."""

WALL_PX = 0.03
"""Standard deviation of how far targets may come nearer than the least separation."""


@dataclass(frozen=True)
class Priors:
    """What is known of all targets beforehand; a benchmark has such rules, a sensor does not.

    intensity: lowest and highest, counts. separation_px: two targets are never nearer, 0: they
    may be. background_known: the local background given is exact.
    """

    intensity: tuple[float, float] | None = None
    separation_px: float = 0.0
    background_known: bool = False


NOTHING_KNOWN = Priors()


@dataclass(frozen=True)
class Window:
    """What was measured (B, H, W): counts, local background plane, pixels that say something."""

    counts_BHW: Array64
    background_BHW: Array64
    usable_BHW: Mask

    def take(self, rows: NDArray[np.int64]) -> "Window":
        """Some of the patches."""
        return Window(self.counts_BHW[rows], self.background_BHW[rows], self.usable_BHW[rows])


@dataclass(frozen=True)
class Groups:
    """An estimate for each patch; absent targets have intensity 0 and `present` False.

    The last four are of the last fit: nothing is known before the first one.
    """

    xy_px: Array64  # (B, K, 2)
    intensity: Array64  # (B, K) counts
    present: Mask  # (B, K)
    offset: Array64  # (B,) counts on top of the background plane
    sigma_px: Array64  # (B,) NaN: as the sensor has it
    prior: Array64  # (B, K, 3) x, y, intensity expected beforehand
    precision: Array64  # (B, K, 3) one over the variance of each; 0: nothing is known
    log_likelihood: Array64  # (B,) nats, with that of the prior; −inf before
    converged: Mask  # (B,)
    reduced_chi2: Array64  # (B,) about 1 where the estimate explains the counts; NaN before
    information: Array64  # (B, 3K + 2, 3K + 2) observed, with the prior's; absent: 1; 0 before

    @classmethod
    def start(
        cls,
        xy_px: Array64,
        intensity: Array64,
        present: Mask,
        prior: Array64 | None = None,
        precision: Array64 | None = None,
    ) -> "Groups":
        """An estimate that has not been fitted yet."""
        batch, columns = present.shape
        none = np.zeros(batch)
        unknown = np.zeros((batch, columns, 3))
        parameters = 3 * columns + SHARED
        return cls(
            xy_px=xy_px,
            intensity=intensity * present,
            present=present,
            offset=none,
            sigma_px=none + np.nan,
            prior=unknown if prior is None else prior,
            precision=unknown if precision is None else precision * present[..., None],
            log_likelihood=none - np.inf,
            converged=none > 0,
            reduced_chi2=none + np.nan,
            information=np.zeros((batch, parameters, parameters)),
        )

    @property
    def parameters(self) -> Array64:
        """(B, K, 3) x, y, intensity."""
        return np.concatenate([self.xy_px, self.intensity[..., None]], axis=2)

    def take(self, rows: NDArray[np.int64]) -> "Groups":
        """Some of the patches."""
        return Groups(**{name: getattr(self, name)[rows] for name in self.__dataclass_fields__})

    def put(self, rows: NDArray[np.int64], other: "Groups") -> "Groups":
        """The same with some of the patches replaced."""
        changed = {}
        for name in self.__dataclass_fields__:
            changed[name] = getattr(self, name).copy()
            changed[name][rows] = getattr(other, name)
        return replace(self, **changed)


def expected(window: Window, groups: Groups, sensor: Sensor) -> Array64:
    """Expected counts (B, H, W)."""
    shape = window.counts_BHW.shape[1:]
    sigma_px = _sigma_px(groups, sensor)[:, None]
    signal = render(groups.xy_px, groups.intensity, (shape[0], shape[1]), sigma_px)
    mean: Array64 = window.background_BHW + groups.offset[:, None, None] + signal
    return mean


def fit(
    window: Window,
    groups: Groups,
    sensor: Sensor,
    priors: Priors = NOTHING_KNOWN,
    iterations: int = 12,
) -> Groups:
    """The most likely parameters of each patch, from the estimate given.

    `converged`: what a further full step promises is less than a hundredth of a nat, and the
    counts say something about every parameter.
    """
    batch, columns = groups.present.shape
    targets = groups.parameters
    shared = np.stack([groups.offset, _sigma_px(groups, sensor)], axis=1)
    prior, precision = _with(priors, groups)
    log_likelihood, chi2 = np.empty((2, batch))
    converged = np.empty(batch, dtype=np.bool_)
    size = 3 * columns + SHARED
    information = np.zeros((batch, size, size))
    information[:] = np.eye(size)
    fit_patches(
        np.ascontiguousarray(window.counts_BHW),
        np.ascontiguousarray(window.background_BHW),
        np.array(window.usable_BHW, order="C"),  # read-only if received: it would compile anew
        targets,
        groups.present,
        shared,
        prior,
        precision,
        np.array([0.0, sensor.sigma_px]),
        np.array([math.inf if priors.background_known else 0.0, _sigma_precision(sensor)]),
        (priors.separation_px, WALL_PX**-2),
        (float(sensor.full_scale), sensor.read_noise**2, 1.0 / sensor.gain),
        iterations,
        log_likelihood,
        converged,
        chi2,
        information,
    )
    return replace(
        groups,
        xy_px=targets[..., :2],
        intensity=targets[..., 2] * groups.present,
        offset=shared[:, 0],
        sigma_px=shared[:, 1],
        log_likelihood=log_likelihood,
        converged=converged,
        reduced_chi2=chi2,
        information=information,
    )


def _sigma_px(groups: Groups, sensor: Sensor) -> Array64:
    """Of each patch (B,): as fitted, or as the sensor has it."""
    return np.where(np.isnan(groups.sigma_px), sensor.sigma_px, groups.sigma_px)


def _sigma_precision(sensor: Sensor) -> float:
    """One over the variance of σ, 1/px²; infinite where it is known exactly."""
    error_px = sensor.sigma_error * sensor.sigma_px
    return math.inf if error_px == 0.0 else error_px**-2


def _with(priors: Priors, groups: Groups) -> tuple[Array64, Array64]:
    """The groups' prior and precision (B, K, 3), their intensities' by the common one too."""
    if priors.intensity is None:
        return groups.prior, groups.precision
    low, high = priors.intensity
    own = 12.0 / (high - low) ** 2  # of a uniform distribution
    prior, precision = groups.prior.copy(), groups.precision.copy()
    precision[..., 2] += own * groups.present
    told = groups.precision[..., 2] * groups.prior[..., 2] + own * (low + high) / 2.0
    prior[..., 2] = np.where(groups.present, told / np.maximum(precision[..., 2], 1e-300), 0.0)
    return prior, precision


def compile_fit() -> None:
    """Have the inner loop compiled, or read from its cache, now instead of with the first patch."""
    nothing = np.zeros((0, 1, 1))
    window = Window(nothing, nothing, nothing > 0.0)
    found = fit(
        window, Groups.start(np.zeros((0, 1, 2)), nothing[..., 0], nothing[..., 0] > 0.0), Sensor()
    )
    inverses(found.information)
