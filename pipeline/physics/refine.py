"""From a network's candidates to fitted targets, each with the covariance of its own fit.

A network that answers on a grid does not know how many targets there are: its candidates are
kept, merged or added to by the likelihood (`select`). One that answers off the grid has counted
them and says how sure it is of each: its word is taken as prior, and only the fit is left.
"""

from dataclasses import replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.physics.bounds import cramer_rao
from pipeline.physics.fit import Array64, Groups, Window, fit, information, reduced_chi2
from pipeline.physics.select import select
from pipeline.physics.sensor import Sensor

PENALTY = 20.0
ADDITIONS = 2
TRUST = 0.5
"""Share of a network's word that counts as prior: it has seen the same counts. Measured on
held-out patches of csist-100k, CSO-mAP 0.836 with a quarter, 0.842 with half, 0.841 with all."""

NEAR_PX = 0.02
"""Solutions no farther apart than this are one."""

MISFIT_BEGINS, MISFIT_ENDS = 1.5, 6.5
"""Reduced χ². Chosen on 1,500 patches each of csist-100k and interior (seed 77): the NEES of all
targets went from 24 and 26 to 1.0 and 1.1."""

SEED = 20261121


class Candidates(NamedTuple):
    """Targets of many patches, in the order of the patches; positions in patch coordinates.

    NaN where nothing is known of existence, covariance or sigma.
    """

    patch: NDArray[np.integer]  # (M,) which patch
    xy_px: Array64  # (M, 2)
    intensity: Array64  # (M,) counts
    refined: NDArray[np.bool_]  # (M,) fitted to the counts
    p_exist: Array64  # (M,)
    cov_px2: Array64  # (M, 3) xx, xy, yy
    intensity_sigma: Array64  # (M,) counts

    @classmethod
    def unsure(cls, patch: NDArray[np.integer], xy_px: Array64, intensity: Array64) -> "Candidates":
        """Of which nothing more is known, as from a network on the grid."""
        unknown = np.full(len(patch), np.nan)
        refined = np.zeros(len(patch), dtype=np.bool_)
        cov_px2 = np.full((len(patch), 3), np.nan)
        return cls(patch, xy_px, intensity, refined, unknown, cov_px2, unknown)


def refine(
    window: Window,
    candidates: Candidates,
    sensor: Sensor,
    *,
    penalty: float = PENALTY,
    additions: int = ADDITIONS,
    starts: int = 1,
) -> Candidates:
    """Fitted targets; where the fit did not converge, or one left the patch, the candidates.

    penalty, additions: of `select`, for candidates without existence. starts: for those with, how
    many times to start, from positions drawn as the network's covariance says; the different
    solutions are averaged by their probability (Laplace), so that the covariance tells of them.
    """
    counted = len(candidates.patch) > 0 and not np.isnan(candidates.p_exist).any()
    start, column = _padded(window, candidates, 0 if counted else additions)
    if counted:
        found, covariance = _averaged(window, start, sensor, starts)
    else:
        found = select(window, start, sensor, penalty, additions)
        covariance = _covariance(information(window, found, sensor), found)
    covariance = _owned_up(covariance, start, reduced_chi2(window, found, sensor))
    height, width = window.counts_BHW.shape[1:]
    last = np.array([width, height]) - 0.5
    inside = ((found.xy_px >= -0.5) & (found.xy_px <= last)).all(axis=2) | ~found.present
    good = found.converged & inside.all(axis=1)
    known = np.full((*start.present.shape, 5), np.nan)  # p_exist, xx, xy, yy, intensity sigma
    own = (candidates.patch, column)
    known[own] = np.column_stack(
        [candidates.p_exist, candidates.cov_px2, candidates.intensity_sigma]
    )
    known[good, :, 1:4] = covariance[good][:, :, [0, 0, 1], [0, 1, 1]]
    known[good, :, 4] = np.sqrt(covariance[good][:, :, 2, 2])
    rows = np.flatnonzero(good)
    best = start.put(rows, found.take(rows))
    patch, column = at = np.nonzero(best.present)
    return Candidates(
        patch,
        best.xy_px[at],
        best.intensity[at],
        good[patch],
        known[at][:, 0],
        known[at][:, 1:4],
        known[at][:, 4],
    )


def _padded(
    window: Window, candidates: Candidates, spare: int
) -> tuple[Groups, NDArray[np.integer]]:
    """Candidates as one row a patch with `spare` columns more than they need; their columns."""
    patch, batch = candidates.patch, len(window.counts_BHW)
    count = np.bincount(patch, minlength=batch)
    column = np.arange(len(patch)) - (np.cumsum(count) - count)[patch]
    columns = count.max(initial=0) + spare
    values = np.zeros((batch, columns, 6))  # x, y, intensity, and the precision of each
    variance = np.column_stack([candidates.cov_px2[:, ::2], candidates.intensity_sigma**2])
    precision = np.nan_to_num(TRUST / variance)
    values[patch, column] = np.column_stack([candidates.xy_px, candidates.intensity, precision])
    prior = values[..., :3]
    present = np.arange(columns) < count[:, None]
    return Groups.start(prior[..., :2], prior[..., 2], present, prior, values[..., 3:]), column


def _averaged(window: Window, start: Groups, sensor: Sensor, starts: int) -> tuple[Groups, Array64]:
    """The fit, or the average over the different ones found, and its covariance (B, K, 3, 3)."""
    rng = np.random.default_rng(SEED)
    sigma_px = np.sqrt(_network_variance(start)[..., :2])
    found = [fit(window, start, sensor)]
    for _ in range(starts - 1):
        moved = start.xy_px + rng.normal(size=start.xy_px.shape) * sigma_px
        again = Groups.start(moved, start.intensity, start.present, start.prior, start.precision)
        found.append(fit(window, again, sensor))
    normals = [information(window, one, sensor) for one in found]
    spreads = [_covariance(normal, one) for normal, one in zip(normals, found, strict=True)]
    if starts == 1:
        return found[0], spreads[0]
    weight = _weights(found, normals)  # (S, B)
    parameters = np.stack([one.parameters for one in found])
    mean = np.einsum("sb,sbkp->bkp", weight, parameters)
    away = parameters - mean
    total = np.stack(spreads) + away[..., :, None] * away[..., None, :]
    covariance = np.einsum("sb,sbkpq->bkpq", weight, total)
    average = replace(
        found[0],
        xy_px=mean[..., :2],
        intensity=mean[..., 2],
        log_likelihood=np.max([one.log_likelihood for one in found], axis=0),
        converged=np.any([one.converged for one in found], axis=0),
    )
    return average, covariance


def _weights(found: list[Groups], normals: list[Array64]) -> Array64:
    """Probability (S, B) of each different solution: likelihood times the volume it fills.

    The volume is what the fit leaves open, one over the root of the information's determinant.
    """
    present = found[0].present
    evidence = []
    for rank, (one, normal) in enumerate(zip(found, normals, strict=True)):
        volume = -0.5 * np.linalg.slogdet(normal)[1]
        value = np.where(one.converged, one.log_likelihood + volume, -np.inf)
        for other in found[:rank]:
            apart = np.abs(one.xy_px - other.xy_px).max(axis=2) * present
            value = np.where(apart.max(axis=1, initial=0.0) < NEAR_PX, -np.inf, value)
        evidence.append(value)
    stacked = np.stack(evidence)
    stacked[0] = np.where(np.isfinite(stacked).any(axis=0), stacked[0], 0.0)
    weight = np.exp(stacked - stacked.max(axis=0))
    result: Array64 = weight / weight.sum(axis=0)
    return result


def _covariance(normal: Array64, groups: Groups) -> Array64:
    """Of each target's x, y and intensity (B, K, 3, 3), its fellows and the offset unknown."""
    batch, columns = groups.present.shape
    bound = cramer_rao(normal)[:, :-1, :-1]
    own: Array64 = np.einsum("bkpkq->bkpq", bound.reshape(batch, columns, 3, columns, 3))
    return own


def _owned_up(covariance: Array64, start: Groups, chi2: Array64) -> Array64:
    """The covariance of a fit (B, K, 3, 3) made honest about what the fit does not explain.

    It is scaled by the reduced χ² where that is above 1 (Birge's ratio). A fit that explains the
    counts badly may be the wrong one of several solutions, of which the network, unlike the fit,
    has an idea: from MISFIT_BEGINS on the network's variance is added, in full from MISFIT_ENDS.
    """
    misfit = np.clip((chi2 - MISFIT_BEGINS) / (MISFIT_ENDS - MISFIT_BEGINS), 0.0, 1.0)
    scaled = covariance * np.maximum(chi2, 1.0)[:, None, None, None]
    added = _network_variance(start)[..., None] * np.eye(3) * misfit[:, None, None, None]
    total: Array64 = scaled + added
    return total


def _network_variance(start: Groups) -> Array64:
    """Variance (B, K, 3) of x, y and intensity as the network gave it; 0 where it did not."""
    told = start.precision > 0.0
    return np.where(told, TRUST / np.where(told, start.precision, 1.0), 0.0)
