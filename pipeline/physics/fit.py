"""Maximum-likelihood fit of all targets of a patch at once, on the censored likelihood.

Levenberg-Marquardt with Fisher scoring: (J W Jᵀ + λ D) δ = J s, where J are the derivatives of
the expected counts, W the Fisher information of each (possibly censored) pixel, s the derivative
of its log-likelihood. Parameters: x, y, intensity of each target, and a constant on top of the
local background. What is known of a target beforehand enters as a Gaussian of each parameter.
Numpy, a batch of patches at a time, ragged groups padded and masked.
"""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from pipeline.physics import noise
from pipeline.physics.bounds import censored_information, jacobian
from pipeline.physics.measurement import log_likelihood, score
from pipeline.physics.psf import render
from pipeline.physics.sensor import Sensor

Array64 = NDArray[np.float64]
Mask = NDArray[np.bool_]

MAX_STEP_PX = 0.4
CONVERGED_GAIN = 1e-2  # nats: a hundredth of what one standard deviation is worth, and less
STIFFEST = 1e8
ROUNDED_AWAY = 0.3
"""Counts; a pixel that expects no more, and has no noise, is 0 whatever it expects exactly."""


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
    """An estimate for each patch; absent targets have intensity 0 and `present` False."""

    xy_px: Array64  # (B, K, 2)
    intensity: Array64  # (B, K) counts
    present: Mask  # (B, K)
    offset: Array64  # (B,) counts on top of the background plane
    log_likelihood: Array64  # (B,) nats, with that of the prior; −inf before the first fit
    converged: Mask  # (B,)
    prior: Array64  # (B, K, 3) x, y, intensity expected beforehand
    precision: Array64  # (B, K, 3) one over the variance of each; 0: nothing is known

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
        batch = len(xy_px)
        none = np.zeros(batch)
        unknown = np.zeros((*present.shape, 3))
        return cls(
            xy_px,
            intensity * present,
            present,
            none,
            none - np.inf,
            none > 0,
            unknown if prior is None else prior,
            unknown if precision is None else precision * present[..., None],
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
    signal = render(groups.xy_px, groups.intensity, (shape[0], shape[1]), sensor.sigma_px)
    mean: Array64 = window.background_BHW + groups.offset[:, None, None] + signal
    return mean


def information(window: Window, groups: Groups, sensor: Sensor) -> Array64:
    """Fisher information (B, 3K + 1, 3K + 1) at the estimate; 1 on the diagonal of the absent."""
    derivatives = _derivatives(window, groups, sensor)
    weight = _flat(censored_information(expected(window, groups, sensor), sensor))
    return _normal(derivatives, weight * _flat(window.usable_BHW), groups)


def reduced_chi2(window: Window, groups: Groups, sensor: Sensor) -> Array64:
    """χ² of the residuals over degrees of freedom (B,), about 1 where the estimate explains them.

    Of the usable pixels below full scale that expect enough counts not to be rounded away.
    """
    mean = expected(window, groups, sensor)
    telling = window.usable_BHW & (window.counts_BHW < sensor.full_scale) & (mean > ROUNDED_AWAY)
    residual = (window.counts_BHW - mean) ** 2 / noise.variance(mean, sensor)
    freedom = telling.sum(axis=(1, 2)) - 3 * groups.present.sum(axis=1)
    reduced: Array64 = np.sum(residual * telling, axis=(1, 2)) / np.maximum(freedom, 1)
    return reduced


def fit(window: Window, groups: Groups, sensor: Sensor, iterations: int = 12) -> Groups:
    """The most likely parameters of each patch, from the estimate given.

    `converged`: what a further full step promises is less than CONVERGED_GAIN, and the counts say
    something about every parameter.
    """
    groups = replace(groups, log_likelihood=_total(window, groups, sensor))
    damping = np.full(len(groups.offset), 1e-3)
    active = np.arange(len(groups.offset))
    for _ in range(iterations):
        if len(active) == 0:
            break
        now, here = groups.take(active), window.take(active)
        tried, promised = _step(here, now, sensor, damping[active])
        better = tried.log_likelihood >= now.log_likelihood
        done = promised < CONVERGED_GAIN
        taken = np.flatnonzero(better)
        now = replace(now.put(taken, tried.take(taken)), converged=done)
        groups = groups.put(active, now)
        damping[active] = np.where(better, damping[active] * 0.2, damping[active] * 8.0)
        stuck = damping[active] > STIFFEST
        active = active[~done & ~stuck]
    return groups


def _step(
    window: Window, groups: Groups, sensor: Sensor, damping: Array64
) -> tuple[Groups, Array64]:
    """One damped step, kept within MAX_STEP_PX and to intensities above zero.

    Also the gain in log-likelihood (B,) that an undamped step would promise, infinite where the
    counts say nothing about some parameter.
    """
    mean = expected(window, groups, sensor)
    usable = _flat(window.usable_BHW)
    derivatives = _derivatives(window, groups, sensor)
    normal = _normal(derivatives, _flat(censored_information(mean, sensor)) * usable, groups)
    slope = _flat(score(window.counts_BHW, mean, sensor)) * usable
    gradient = (derivatives @ slope[..., None])[..., 0]
    pull = groups.precision * (groups.prior - groups.parameters)
    gradient[:, :-1] += pull.reshape(len(pull), -1)
    known = np.einsum("bpp->bp", normal).min(axis=1) > 0.0
    full = _solve(normal, gradient, np.full(len(damping), 1e-9))
    promised = np.where(known, 0.5 * np.einsum("bp,bp->b", gradient, full), np.inf)
    step = _solve(normal, gradient, damping)
    batch, targets = groups.intensity.shape
    by_target = step[:, :-1].reshape(batch, targets, 3)
    largest = np.abs(by_target[..., :2]).max(axis=(1, 2), initial=0.0)
    shorter = np.minimum(1.0, MAX_STEP_PX / np.maximum(largest, 1e-12))
    by_target = by_target * shorter[:, None, None]
    # An intensity is at most halved in a step, so it never reaches zero.
    intensity = np.maximum(groups.intensity + by_target[..., 2], 0.5 * groups.intensity)
    height, width = window.counts_BHW.shape[1:]
    moved = replace(
        groups,
        xy_px=np.clip(groups.xy_px + by_target[..., :2], -1.0, [width, height]),
        intensity=intensity * groups.present,
        offset=groups.offset + step[:, -1] * shorter,
    )
    return replace(moved, log_likelihood=_total(window, moved, sensor)), promised


def _solve(normal: Array64, gradient: Array64, damping: Array64) -> Array64:
    """Step (B, P) of the normal equations with each diagonal raised by the share `damping`."""
    diagonal = np.einsum("bpp->bp", normal)
    added = (damping[:, None] * diagonal + 1e-12)[..., None] * np.eye(normal.shape[1])
    step: Array64 = np.linalg.solve(normal + added, gradient[..., None])[..., 0]
    return step


def _derivatives(window: Window, groups: Groups, sensor: Sensor) -> Array64:
    """(B, 3K + 1, H·W); zero for absent targets."""
    height, width = window.counts_BHW.shape[1:]
    found = jacobian(
        groups.xy_px, groups.intensity, (height, width), sensor.sigma_px, with_background=True
    )
    rows = np.append(
        np.repeat(groups.present, 3, axis=1), np.ones((len(groups.present), 1), bool), axis=1
    )
    result: Array64 = found * rows[..., None]
    return result


def _normal(derivatives: Array64, weight: Array64, groups: Groups) -> Array64:
    normal: Array64 = (derivatives * weight[:, None, :]) @ derivatives.transpose(0, 2, 1)
    index = np.arange(normal.shape[1] - 1)
    known = np.where(groups.present[..., None], groups.precision, 1.0)
    normal[:, index, index] += known.reshape(len(normal), -1)
    return normal


def _total(window: Window, groups: Groups, sensor: Sensor) -> Array64:
    """Log-likelihood (B,) of the usable pixels, and of the parameters by their prior."""
    each = log_likelihood(window.counts_BHW, expected(window, groups, sensor), sensor)
    total: Array64 = np.sum(each * window.usable_BHW, axis=(1, 2))
    missed = groups.precision * (groups.parameters - groups.prior) ** 2
    total -= 0.5 * missed.sum(axis=(1, 2))
    return total


def _flat(images: NDArray[np.generic]) -> Array64:
    return images.reshape(len(images), -1).astype(np.float64, copy=False)
