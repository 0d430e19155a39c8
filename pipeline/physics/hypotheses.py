"""Several answers to one patch: other numbers of targets, and other solutions of the same number.

Hypotheses are compared by their evidence in Laplace's approximation: the likelihood of the best
solution times the volume it fills, (2π)^{P/2} over the root of the information's determinant.
"""

import math
from dataclasses import replace

import numpy as np
from scipy.special import expit, logit

from pipeline.physics.candidates import LIKELY, Table
from pipeline.physics.fit import SHARED, Array64, Groups, Mask, Priors, Window, fit
from pipeline.physics.inverse import inverses
from pipeline.physics.sensor import Sensor

NEAR_PX = 0.02
"""Solutions no farther apart than this are one."""

SEED = 20261121
STARTS = 6
GROUP_SIGMA = 0.5
"""Targets of a hypothesis are expected as near their candidates, in σ of the PSF."""

START_SIGMA = 0.25
"""Starts of a hypothesis, drawn about the candidates with so many σ of the PSF."""

DOUBT = 0.02
"""A count is questioned if another one is at least this probable."""

EVIDENCE_WEIGHT = 0.25
"""What a nat of evidence counts beside the network's own odds, which rest on the same counts."""

EVIDENCE_LIMIT = 40.0


def recounted(window: Window, given: Table, sensor: Sensor, priors: Priors) -> Table:
    """Whether there is the last likely candidate, or the one after it, by the evidence too.

    Only where intensities are known beforehand, as in a benchmark: without, the evidence of a
    fainter or brighter target more says nothing that the network does not say better.
    """
    if priors.intensity is None:
        return given
    number = np.sum(given.present & (given.p_count >= LIKELY), axis=1)
    row = np.arange(len(number))
    padded = np.pad(np.where(given.present, given.p_count, 0.0), ((0, 0), (1, 1)))
    lost, gained = 1.0 - padded[row, number], padded[row, number + 1]
    spare = gained >= lost
    last = np.where(spare, number, number - 1)  # whose existence is in question
    asked = np.flatnonzero((np.maximum(lost, gained) >= DOUBT) & (last >= 0))
    if len(asked) == 0:
        return given
    here, place = window.take(asked), last[asked]
    column = np.arange(given.present.shape[1])
    parameters = given.parameters[asked]
    without, with_it = (
        _evidence(here, parameters, column < number[:, None], sensor, priors)
        for number in (place, place + 1)
    )
    news = np.clip(with_it - without, -EVIDENCE_LIMIT, EVIDENCE_LIMIT)
    p_exist, p_count = given.p_exist.copy(), given.p_count.copy()
    before = np.clip(p_count[asked, place], 1e-6, 1.0 - 1e-6)
    p_count[asked, place] = p_exist[asked, place] = expit(logit(before) + EVIDENCE_WEIGHT * news)
    # k or more are no more probable than k − 1 or more
    return given._replace(p_exist=p_exist, p_count=np.minimum.accumulate(p_count, axis=1))


def _evidence(
    window: Window, parameters: Array64, present: Mask, sensor: Sensor, priors: Priors
) -> Array64:
    """Log evidence (B,) of the targets present, the best of several starts."""
    rng = np.random.default_rng(SEED)
    best = np.full(len(present), -np.inf)
    spread_px = GROUP_SIGMA * sensor.sigma_px
    precision = np.zeros_like(parameters)
    precision[..., :2] = spread_px**-2
    for start in range(STARTS):
        moved = parameters[..., :2].copy()
        if start:
            moved += START_SIGMA * sensor.sigma_px * rng.normal(size=moved.shape)
        groups = Groups.start(moved, parameters[..., 2], present, parameters, precision)
        found = fit(window, groups, sensor, priors, iterations=40)
        best = np.maximum(best, found.log_likelihood + _log_volume(found))
    # A target's prior is normal in x and y; the factors of 2π are those of its volume.
    density = -2.0 * math.log(spread_px) - math.log(_intensity_sigma(priors))
    evidence: Array64 = best + density * present.sum(axis=1)
    return evidence


def _intensity_sigma(priors: Priors) -> float:
    """Standard deviation of the intensity expected beforehand, counts."""
    low, high = priors.intensity or (0.0, math.sqrt(12.0))
    return (high - low) / math.sqrt(12.0)


def averaged(
    window: Window,
    start: Groups,
    variance: Array64,
    sensor: Sensor,
    priors: Priors,
    starts: int,
) -> tuple[Groups, Array64]:
    """The fit, or the average over the different ones found, and its covariance (B, 3K, 3K).

    variance (B, K, 3): of x, y and intensity, as wide as the starts are drawn.
    """
    rng = np.random.default_rng(SEED)
    found = [fit(window, start, sensor, priors)]
    for _ in range(starts - 1):
        moved = start.xy_px + rng.normal(size=start.xy_px.shape) * np.sqrt(variance[..., :2])
        found.append(fit(window, replace(start, xy_px=moved), sensor, priors))
    spreads = [inverses(one.information)[:, :-SHARED, :-SHARED] for one in found]
    if starts == 1:
        return found[0], spreads[0]
    weight = _weights(found)  # (S, B)
    parameters = np.stack([one.parameters for one in found])
    mean = np.einsum("sb,sbkp->bkp", weight, parameters)
    away = (parameters - mean).reshape(*weight.shape, -1)
    total = np.stack(spreads) + away[..., :, None] * away[..., None, :]
    covariance = np.einsum("sb,sbpq->bpq", weight, total)
    average = replace(
        found[0],
        xy_px=mean[..., :2],
        intensity=mean[..., 2],
        log_likelihood=np.max([one.log_likelihood for one in found], axis=0),
        converged=np.any([one.converged for one in found], axis=0),
    )
    return average, covariance


def _weights(found: list[Groups]) -> Array64:
    """Probability (S, B) of each different solution: likelihood times the volume it fills."""
    present = found[0].present
    evidence = []
    for rank, one in enumerate(found):
        value = np.where(one.converged, one.log_likelihood + _log_volume(one), -np.inf)
        for other in found[:rank]:
            apart = np.abs(one.xy_px - other.xy_px).max(axis=2) * present
            value = np.where(apart.max(axis=1, initial=0.0) < NEAR_PX, -np.inf, value)
        evidence.append(value)
    stacked = np.stack(evidence)
    stacked[0] = np.where(np.isfinite(stacked).any(axis=0), stacked[0], 0.0)
    weight = np.exp(stacked - stacked.max(axis=0))
    result: Array64 = weight / weight.sum(axis=0)
    return result


def _log_volume(found: Groups) -> Array64:
    """What the fit leaves open (B,), nats, but for factors of the number of targets."""
    result: Array64 = -0.5 * np.linalg.slogdet(found.information)[1]
    return result
