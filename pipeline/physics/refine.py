"""From a network's candidates to fitted targets, each with the covariance of its own fit.

A network that answers on a grid does not know how many targets there are: its candidates are
kept, merged or added to by the likelihood (`select`). One that answers off the grid has counted
them and says how sure it is of that: a fit of this number, with the network's word as prior for
what the counts leave open, is right only if the number is, while the network's own answer covers
the possibilities. What is published is between the two, by the probability of the number.
"""

from dataclasses import replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.physics.candidates import LIKELY, Candidates, Table, count_probabilities, table
from pipeline.physics.fit import NOTHING_KNOWN, SHARED, Array64, Groups, Mask, Priors, Window, fit
from pipeline.physics.hypotheses import averaged, recounted
from pipeline.physics.inverse import inverses
from pipeline.physics.select import select
from pipeline.physics.sensor import Sensor

PENALTY = 20.0
ADDITIONS = 2
PLACE, SPREAD = 2, 6
"""Powers of the count's probability that weigh the fit against the network's answer: its values,
and its covariance, since the curvature knows only its own solution. Chosen on csist-100k, interior
and field (seed 77)."""

NEWS = np.array([0.7, 0.7, 1.0])
"""Share of what the network says of x, y and intensity beyond the counts that is prior of the fit:
it has seen the same counts, and part of its errors is theirs. Chosen on the same patches."""

FAR_SIGMA = 3.0
"""A fit that moves a target farther than so many of the network's standard deviations, in x, y or
intensity, is another solution, and the network's answer stands: 3, 2 and 3 % of the patches of
csist-100k, interior and field (seed 77), and 0.2 points of CSO-mAP on the first two."""

MAX_CHI2 = 3.0
"""Reduced, of a group that point sources explain: over noise it is 1 ± 0.14, over the benchmark's
rounding and saturation 99 % are below 5."""

MISFIT_BEGINS, MISFIT_ENDS = 1.5, 6.5
"""Reduced χ². Chosen on 1,500 patches each of csist-100k and interior (seed 77): the NEES of all
targets went from 24 and 26 to 1.0 and 1.1."""


class Refined(NamedTuple):
    """Fitted targets, and what the fit says of each patch as a whole."""

    candidates: Candidates
    converged: Mask  # (B,) where not, the candidates are as they were given
    reduced_chi2: Array64  # (B,) about 1 where point sources explain the counts; NaN: no targets
    joint_px2: Array64  # (B, 2K, 2K) of x, y of a patch's targets together; NaN: not known


def refine(
    window: Window,
    candidates: Candidates,
    sensor: Sensor,
    priors: Priors = NOTHING_KNOWN,
    *,
    penalty: float = PENALTY,
    additions: int = ADDITIONS,
    starts: int = 1,
) -> Refined:
    """Fitted targets; the candidates where the fit did not converge, left the patch or went far.

    priors: what is known of all targets. penalty, additions: of `select`, for candidates without
    existence. starts: for those with, how many times to start, from positions drawn as the
    network's covariance says; the different solutions are averaged by their probability (Laplace),
    so that the covariance tells of them.
    """
    counted = candidates.counted
    given = table(candidates, len(window.counts_BHW), 0 if counted else additions)
    if counted:
        given = recounted(window, given, sensor, priors)
        found, covariance = averaged(
            window, _start(window, given, sensor, priors), given.variance, sensor, priors, starts
        )
        certain = _count_probability(given)
        unexplained = _unexplained(given, found.reduced_chi2)
    else:
        start = Groups.start(given.parameters[..., :2], given.parameters[..., 2], given.present)
        found = select(window, start, sensor, priors, penalty, additions)
        covariance = inverses(found.information)[:, :-SHARED, :-SHARED]
        certain = np.ones(len(found.present))
        unexplained = np.zeros(covariance.shape[:2])
    # Birge's ratio: what the fit does not explain is as if all errors were larger.
    covariance = covariance * np.maximum(found.reduced_chi2, 1.0)[:, None, None]
    covariance += unexplained[..., None] * np.eye(covariance.shape[1])
    good = found.converged & _inside(window, found) & _near(given, found)
    values, covariance = _between(given, found.parameters, covariance, certain)
    none = ~found.present.any(axis=1)
    return Refined(
        _merged(given, found.present, values, covariance, good),
        converged=found.converged | none,
        reduced_chi2=np.where(none, np.nan, found.reduced_chi2),
        joint_px2=_joint(covariance, found, good),
    )


def _start(window: Window, given: Table, sensor: Sensor, priors: Priors) -> Groups:
    """The likely candidates; as prior what the network knows of each beyond what the counts say.

    The network has seen the counts: of its precision only what exceeds the counts' own, the
    inverse of the Cramér–Rao bound at its estimate, is news to the fit, and of that NEWS.
    """
    xy_px, intensity = given.parameters[..., :2], given.parameters[..., 2]
    present = given.present & (given.p_count >= LIKELY)
    bare = Groups.start(xy_px, intensity, present)
    information = fit(window, bare, sensor, priors, iterations=0).information
    bound = np.einsum("bpp->bp", inverses(information))[:, :-SHARED].reshape(bare.prior.shape)
    told = 1.0 / np.where(present[..., None], given.variance, np.inf)
    precision = NEWS * np.clip(told - 1.0 / bound, 0.0, None)
    return replace(bare, prior=given.parameters, precision=precision * present[..., None])


def _count_probability(given: Table) -> Array64:
    """Of the number of likely candidates (B,): as many and no more."""
    at_least = np.where(given.present, given.p_count, 0.0)
    number = np.sum(given.present & (given.p_count >= LIKELY), axis=1)
    probability: Array64 = count_probabilities(at_least)[np.arange(len(number)), number]
    return probability


def _unexplained(given: Table, chi2: Array64) -> Array64:
    """Variance (B, 3K) to add to that of a fit that explains the counts badly.

    It may be the wrong one of several solutions, of which the network, unlike the fit, has an idea:
    from MISFIT_BEGINS on the network's variance is added, in full from MISFIT_ENDS.
    """
    misfit = np.clip((chi2 - MISFIT_BEGINS) / (MISFIT_ENDS - MISFIT_BEGINS), 0.0, 1.0)
    variance: Array64 = given.variance.reshape(len(chi2), -1) * misfit[:, None]
    return variance


def _inside(window: Window, found: Groups) -> Mask:
    """Whether all targets of a patch (B,) lie on it."""
    height, width = window.counts_BHW.shape[1:]
    last = np.array([width, height]) - 0.5
    outside = ((found.xy_px < -0.5) | (found.xy_px > last)).any(axis=2)
    inside: Mask = np.logical_not(np.any(outside & found.present, axis=1))
    return inside


def _near(given: Table, found: Groups) -> Mask:
    """Whether a patch's targets (B,) are where the method thinks possible, if it says."""
    moved = (found.parameters - given.parameters) ** 2 > FAR_SIGMA**2 * given.variance
    both = given.present & found.present
    near: Mask = np.logical_not((moved.any(axis=2) & both).any(axis=1))
    return near


def _between(
    given: Table, fitted: Array64, covariance: Array64, certain: Array64
) -> tuple[Array64, Array64]:
    """Values (B, K, 3) and covariance (B, 3K, 3K) between the given and the fitted ones.

    certain (B,): that the fit is of the right number, by which the two are weighed, the given ones
    with no correlation between targets; how far they are apart is part of the covariance.
    """
    batch, columns = given.present.shape
    weight = certain[:, None, None] ** PLACE
    apart = fitted - given.parameters
    own = np.zeros((batch, columns, 3, columns, 3))
    place = np.arange(columns)
    spread = np.zeros((columns, batch, 3, 3))
    spread[..., [0, 0, 1, 1], [0, 1, 0, 1]] = np.moveaxis(given.cov_px2[..., [0, 1, 1, 2]], 1, 0)
    spread[..., 2, 2] = given.intensity_sigma.T**2
    own[:, place, :, place] = np.nan_to_num(spread)
    flat = apart.reshape(batch, 3 * columns)
    trust = certain[:, None, None] ** SPREAD
    total = trust * covariance + (1.0 - trust) * own.reshape(covariance.shape)
    total += weight * (1.0 - weight) * flat[:, :, None] * flat[:, None, :]
    return given.parameters + weight * apart, total


def _merged(
    given: Table, present: Mask, values: Array64, covariance: Array64, good: Mask
) -> Candidates:
    """The fitted targets of the good patches, and what was given of the others and of the unlikely.

    The likely ones of a patch come first, so it keeps its order.
    """
    batch, columns = given.present.shape
    own = np.einsum("bkpkq->bkpq", covariance.reshape(batch, columns, 3, columns, 3))
    fitted = good[:, None] & present
    likely = ~(given.p_count < LIKELY)
    at = np.nonzero(fitted | (given.present & ~(good[:, None] & likely)))
    take = fitted[at]
    values = np.where(take[:, None], values[at], given.parameters[at])
    return Candidates(
        at[0],
        values[:, :2],
        values[:, 2],
        take,
        given.p_exist[at],
        given.p_count[at],
        np.where(take[:, None], own[at][:, [0, 0, 1], [0, 1, 1]], given.cov_px2[at]),
        np.where(take, np.sqrt(own[at][:, 2, 2]), given.intensity_sigma[at]),
    )


def _joint(covariance: Array64, found: Groups, good: Mask) -> Array64:
    """Of x and y of the targets present (B, 2K, 2K), first those of the first; NaN elsewhere."""
    number = found.present.sum(axis=1)
    columns = int(number.max(initial=0))
    order = np.argsort(~found.present, axis=1, kind="stable")[:, :columns]
    place = (3 * order[..., None] + np.arange(2)).reshape(len(order), 2 * columns)
    row = np.arange(len(order))[:, None, None]
    joint: Array64 = covariance[row, place[:, :, None], place[:, None, :]]
    known: NDArray[np.bool_] = (np.arange(2 * columns) // 2 < number[:, None]) & good[:, None]
    joint[~(known[:, :, None] & known[:, None, :])] = np.nan
    return joint
