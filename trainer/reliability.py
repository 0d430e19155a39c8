"""How honest a method is, as a picture: what it says of counts and errors against what is so."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import chi2

from pipeline.formats.csist import CsistDataset
from pipeline.physics.candidates import count_probabilities
from pipeline.physics.psf import RAYLEIGH_PER_SIGMA
from trainer.honesty import mahalanobis, published_covariances, true_bounds
from trainer.metrics import matched_errors
from trainer.reading import Detections

Array64 = NDArray[np.float64]

FEWEST = 20
"""Samples of a bin that is drawn."""

BINS = 10


def draw_reliability(
    dataset: CsistDataset,
    found: list[Detections],
    at_least: Array64,
    title: str,
    c: int,
    path: Path,
) -> None:
    """Four panels: the count, existence, position errors, and errors beside the bound.

    found and at_least: see `trainer.evaluate.Unmixed`; c: of the grid, if it answers on one.
    Methods that say nothing of existence have the first two panels empty.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 7.5), layout="constrained")
    figure.suptitle(f"{title} on {len(dataset)} images of {dataset.profile}, seed {dataset.seed}")
    (count, existence, position), (by_count, by_separation, _) = panels = figure.subplots(2, 3)
    panels[1, 2].axis("off")
    true = dataset.truths()
    number = np.array([len(rows) for rows in true])
    counted = ~np.isnan(at_least).any(axis=1)
    said, number_said = at_least[counted], number[counted]
    posterior = count_probabilities(said)
    _reliability(count, posterior.max(axis=1), posterior.argmax(axis=1) == number_said)
    count.set(title="number of targets", xlabel="stated probability", ylabel="share that is right")
    real = number_said[:, None] > np.arange(said.shape[1])
    _reliability(existence, said.ravel(), real.ravel())
    existence.set(title="existence of the k-th target", xlabel="stated probability")

    matched, error = matched_errors(found, true)
    covariance = published_covariances(dataset, found, matched, c)
    known = ~np.isnan(covariance).any(axis=(1, 2))
    squared = np.sort(mahalanobis(error[known, :2], covariance[known]))
    share = np.arange(1, len(squared) + 1) / max(len(squared), 1)
    position.plot(chi2.cdf(squared, 2), share, color="black")
    position.plot([0, 1], [0, 1], color="grey", lw=0.8)
    position.set(
        title="position", xlabel="stated probability of so small an error", ylabel="share of errors"
    )

    bounds = true_bounds(dataset, true)
    distance = np.hypot(*error[:, :2].T)
    bound = np.array([np.sqrt(np.trace(bounds[i][k])) for i, _, k in matched])
    fellows = number[matched[:, 0]]
    _beside_bound(by_count, fellows.astype(float), distance, bound, np.arange(0.5, 6.0))
    by_count.set(title="errors of all", xlabel="targets in the group", ylabel="median error, px")
    apart = np.array([_separation(true[image]) for image, _, _ in matched])
    rayleigh = apart / (RAYLEIGH_PER_SIGMA * dataset.sensor.sigma_px)
    pairs = fellows == 2
    _beside_bound(
        by_separation, rayleigh[pairs], distance[pairs], bound[pairs], np.arange(0.5, 2.6, 0.15)
    )
    by_separation.set(title="errors of pairs", xlabel="separation, Rayleigh distances")
    figure.savefig(path, dpi=90)


def _reliability(axes: Any, stated: Array64, right: NDArray[np.bool_]) -> None:
    """Share that is right over stated probability; bins of equal width, with their error."""
    axes.plot([0, 1], [0, 1], color="grey", lw=0.8)
    bins = np.minimum((stated * BINS).astype(np.int64), BINS - 1)
    for place in range(BINS):
        here = bins == place
        if here.sum() >= FEWEST:
            share = right[here].mean()
            error = np.sqrt(max(share * (1.0 - share), 0.25 / here.sum()) / here.sum())
            axes.errorbar(stated[here].mean(), share, 2.0 * error, fmt="o", color="black", ms=4)
    axes.set(xlim=(0.0, 1.0), ylim=(0.0, 1.0))


def _beside_bound(
    axes: Any, along: Array64, distance: Array64, bound: Array64, edges: Array64
) -> None:
    """Median error in each bin, beside the median of an estimator at the bound.

    A two-dimensional normal error of rms r has the median r √(ln 2) if it is round.
    """
    middle, found, best = [], [], []
    for low, high in pairwise(edges):
        here = (along >= low) & (along < high)
        if here.sum() >= FEWEST:
            middle.append(along[here].mean())
            found.append(np.median(distance[here]))
            best.append(np.median(bound[here]) * np.sqrt(np.log(2.0)))
    axes.plot(middle, found, "o-", color="black", ms=4, label="found")
    axes.plot(middle, best, "--", color="grey", label="Cramér–Rao bound")
    axes.set(yscale="log")
    axes.legend(frameon=False)


def _separation(rows: Array64) -> float:
    """Between the first two targets, px."""
    return float(np.hypot(*(rows[0, :2] - rows[1, :2]))) if len(rows) > 1 else np.inf
