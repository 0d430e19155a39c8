# mypy: allow-untyped-defs, allow-untyped-calls
# ruff: noqa: ANN001, ANN202
"""How well anyone can do on `field`: the posterior, sampled at length, scored like a network.

    trainer generate --profile field --count 250 --seed 32 field.zarr
    python examples/ideal_observer.py field.zarr --engine off_grid_any.openvino

It knows all that the profile draws from: how groups lie, how bright they are, the noise, the
background to the count, σ to ±10 %. For each number of targets 1 to 5 a sequential Monte Carlo
sampler (Del Moral, Doucet and Jasra, J. R. Stat. Soc. B 68 (2006) 411) goes from that prior to the
posterior and gives the evidence on its way. Answered are the most probable number of targets and
the mean of the posterior of that number, whose targets are told apart by assignment to its most
probable sample. No estimator gets more numbers right, but for the sampler's own error, which shows
in how much surer it is of its numbers than it is right.
"""

import argparse
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from engines.loader import load
from pipeline.formats.csist import CsistDataset, read_csist
from pipeline.physics.arrays import NumpyRandom
from pipeline.physics.groups import MAX_TARGETS, PROFILES, Profile, draw_arrangements
from pipeline.physics.noise import variance
from trainer.evaluate import unmix
from trainer.honesty import mahalanobis, true_bounds
from trainer.metrics import cso_map, matched_errors

Array64 = NDArray[np.float64]

PARTICLES = 1024
MOVES = 10
"""Of each particle at each temperature, for each of its targets, half of them along differences."""

KEPT_SHARE = 0.5
"""A temperature is as much lower as leaves so large an effective share of the particles."""

NEAR_PX = 0.25
"""A detection's score is the probability of a target within that distance, whatever the number."""

compiled: Any = njit(cache=True, error_model="numpy", fastmath={"contract", "reassoc", "afn"})


@compiled
def _add(mean, x, y, g, sigma):
    """Add a target's expected counts to mean (n, n)."""
    n, scale = mean.shape[0], 1.0 / (math.sqrt(2.0) * sigma)
    row, column = np.empty(n), np.empty(n)
    below_x, below_y = math.erf((-0.5 - x) * scale), math.erf((-0.5 - y) * scale)
    for i in range(n):
        above = math.erf((i + 0.5 - x) * scale)
        column[i], below_x = 0.5 * (above - below_x), above
        above = math.erf((i + 0.5 - y) * scale)
        row[i], below_y = 0.5 * (above - below_y), above
    for i in range(n):
        for j in range(n):
            mean[i, j] += g * row[i] * column[j]


@compiled
def _log_likelihood(counts, mean, noise):
    """Of counts (n, n), none of them at full scale; noise: floor of the variance, and its slope."""
    total = 0.0
    for i in range(len(counts)):
        for j in range(len(counts)):
            variance = noise[0] + noise[1] * max(mean[i, j], 0.0)
            total -= 0.5 * ((counts[i, j] - mean[i, j]) ** 2 / variance + math.log(variance))
    return total


@compiled
def _likelihood_of(counts, state, sigma, background, noise):
    mean = np.full(counts.shape, background)
    for k in range(len(state)):
        _add(mean, state[k, 0], state[k, 1], math.exp(state[k, 2]), sigma)
    return _log_likelihood(counts, mean, noise)


@compiled
def _allowed(state, pixel, sigma, rules):
    """Whether a group (K, 3) of x, y, ln intensity is one that the profile draws."""
    half, separation, low, high, narrowest, widest = rules
    if not narrowest <= sigma <= widest:
        return False
    for k in range(len(state)):
        if abs(state[k, 0] - pixel[0]) > half or abs(state[k, 1] - pixel[1]) > half:
            return False
        if state[k, 2] < low or state[k, 2] > high:
            return False
        for other in range(k):
            x, y = state[k, 0] - state[other, 0], state[k, 1] - state[other, 1]
            if x * x + y * y < separation**2:
                return False
    return True


@compiled
def _proposed(state, pixel, sigma, pixels, out, place):
    """Fill out (K, 3), place (2,); → σ, and ln of how volumes change. Steps of all sizes."""
    out[:], place[:] = state, pixel
    size = math.exp(np.random.uniform(math.log(1e-3), math.log(0.6)))
    kind = np.random.randint(8)
    k, other = np.random.randint(0, len(state), 2)
    if kind == 0:
        return sigma + 0.1 * size * np.random.normal(), 0.0
    if kind == 1:
        for axis in range(2):
            place[axis] = np.random.randint(pixels[0], pixels[1] + 1)
    elif kind <= 3 and other != k:  # what one gains the other loses
        moved = 1000.0 * size * np.random.normal()
        one, two = math.exp(state[k, 2]) + moved, math.exp(state[other, 2]) - moved
        if one <= 0.0 or two <= 0.0:
            return math.inf, 0.0
        out[k, 2], out[other, 2] = math.log(one), math.log(two)
        return sigma, state[k, 2] + state[other, 2] - out[k, 2] - out[other, 2]
    elif kind <= 5 and other != k:  # apart, about their common centre
        share = math.exp(state[k, 2] - state[other, 2])
        for axis in range(2):
            moved = size * np.random.normal()
            out[k, axis] += moved
            out[other, axis] -= moved * share
    else:
        for axis in range(3 if kind == 6 else 2):
            out[k, axis] += size * np.random.normal()
    return sigma, 0.0


@compiled
def _align(state):
    """Give all particles (P, K, 3) the first one's order of targets, in place.

    What is done with steps along differences that would change that order is not exact: at the
    prior the mean distance of targets drifts by half a percent.
    """
    targets = state.shape[1]
    for p in range(1, len(state)):
        for k in range(targets):
            nearest, least = k, np.inf
            for other in range(k, targets):
                x, y = state[p, other, 0] - state[0, k, 0], state[p, other, 1] - state[0, k, 1]
                if x * x + y * y < least:
                    nearest, least = other, x * x + y * y
            for axis in range(3):
                kept = state[p, k, axis]
                state[p, k, axis] = state[p, nearest, axis]
                state[p, nearest, axis] = kept


@compiled
def _along(state, sigma, cloud, sigmas, out):
    """Fill out (K, 3) with a step along the difference of two of the cloud; → σ.

    Differential evolution (ter Braak, Stat. Comput. 16 (2006) 239): steps as the posterior lies.
    """
    one, two = np.random.randint(0, len(cloud), 2)
    free = 3 * state.shape[0] + 1
    length = 2.38 / math.sqrt(2.0 * free) * np.random.uniform(0.2, 1.2)
    if np.random.random() < 0.1:
        length = 1.0  # to another mode
    out[:] = state + length * (cloud[one] - cloud[two])
    return sigma + length * (sigmas[one] - sigmas[two])


@compiled
def _move(counts, state, pixel, sigma, value, beta, rules, pixels, background, noise):
    """Metropolis steps of all particles (P, K, 3) at the likelihood to the power beta, in place."""
    particles, targets = state.shape[0], state.shape[1]
    out, place = np.empty((targets, 3)), np.empty(2)
    _align(state)
    cloud, sigmas = state.copy(), sigma.copy()
    for p in range(particles):
        for move in range(MOVES * targets):
            if move % 2:
                wide, volume = _along(state[p], sigma[p], cloud, sigmas, out), 0.0
                place[:] = pixel[p]
            else:
                wide, volume = _proposed(state[p], pixel[p], sigma[p], pixels, out, place)
            if not _allowed(out, place, wide, rules):
                continue
            tried = _likelihood_of(counts, out, wide, background, noise)
            if math.log(np.random.random()) < beta * (tried - value[p]) + volume:
                state[p], pixel[p], sigma[p], value[p] = out, place, wide, tried


@compiled
def _seed(number):
    np.random.seed(number)


class Posterior:
    """Of a patch with a given number of targets: equally probable samples, and the evidence."""

    def __init__(
        self, counts: Array64, targets: int, profile: Profile, rng: np.random.Generator
    ) -> None:
        sensor, half = profile.sensor, profile.half_width_px
        low, high = np.log(profile.intensity)
        spread = sensor.sigma_px * profile.sigma_spread
        rules = (half, profile.separation_px, low, high)
        rules += (sensor.sigma_px - spread, sensor.sigma_px + spread)
        noise = (float(variance(np.zeros(1), sensor)[0]), 1.0 / sensor.gain)
        own = NumpyRandom(int(rng.integers(1 << 31)))
        pixel = rng.integers(profile.pixel_range[0], profile.pixel_range[1] + 1, (PARTICLES, 2))
        pixel = pixel.astype(float)
        state = np.empty((PARTICLES, targets, 3))
        arranged = draw_arrangements(PARTICLES, targets, half, profile.separation_px, own)
        state[..., :2] = arranged + pixel[:, None]
        state[..., 2] = rng.uniform(low, high, (PARTICLES, targets))
        sigma = rng.uniform(*rules[4:], PARTICLES)
        value = np.array(
            [
                _likelihood_of(counts, *own, profile.background, noise)
                for own in zip(state, sigma, strict=True)
            ]
        )
        beta, self.log_evidence = 0.0, 0.0
        while beta < 1.0:
            step = _next(value, 1.0 - beta)
            beta += step
            weight = step * (value - value.max())
            self.log_evidence += step * value.max() + math.log(np.exp(weight).mean())
            share = np.exp(weight) / np.exp(weight).sum()
            comb = (np.arange(PARTICLES) + rng.random()) / PARTICLES
            rows = np.minimum(np.searchsorted(np.cumsum(share), comb), PARTICLES - 1)
            state, pixel, sigma, value = state[rows], pixel[rows], sigma[rows], value[rows]
            _move(
                counts, state, pixel, sigma, value, beta, rules, profile.pixel_range,
                profile.background, noise,
            )  # fmt: skip
        self.state, self.value = state, value

    def targets(self) -> tuple[Array64, Array64]:
        """Mean (K, 2) px and covariance (K, 2, 2) px² of each, assigned to the best sample's."""
        xy_px = self.state[..., :2]
        middle = xy_px[np.argmax(self.value)]
        for _ in range(3):
            aligned = np.stack([sample[_assigned(middle, sample)] for sample in xy_px])
            middle = aligned.mean(axis=0)
        off = aligned - middle
        return middle, np.einsum("pki,pkj->kij", off, off) / len(off)

    def near(self, xy_px: Array64) -> Array64:
        """Probability (n,) of a target within NEAR_PX of each place (n, 2)."""
        distance = np.linalg.norm(self.state[:, None, :, :2] - xy_px[:, None], axis=-1)
        found: Array64 = (distance < NEAR_PX).any(axis=2).mean(axis=0)
        return found


def _next(value: Array64, left: float) -> float:
    """How much further the power of the likelihood may go."""

    def leaves_enough(step: float) -> bool:
        weight = np.exp(step * (value - value.max()))
        return bool(weight.sum() ** 2 / (weight**2).sum() >= KEPT_SHARE * len(value))

    if leaves_enough(left):
        return left
    low, high = 0.0, left
    for _ in range(40):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if leaves_enough(middle) else (low, middle)
    return high


def _assigned(middle: Array64, sample: Array64) -> NDArray[np.int64]:
    distance2 = ((middle[:, None] - sample[None]) ** 2).sum(axis=-1)
    return np.asarray(linear_sum_assignment(distance2)[1])


def answer(posteriors: list[Posterior], number: int) -> Array64:
    """(number, 7) like `trainer.reading.Detections`, the intensity left out (0)."""
    evidence = np.array([posterior.log_evidence for posterior in posteriors])
    share = np.exp(evidence - evidence.max())
    xy_px, covariance = posteriors[number - 1].targets()
    score = sum(p * posterior.near(xy_px) for p, posterior in zip(share, posteriors, strict=True))
    cov = covariance.reshape(-1, 4)[:, [0, 1, 3]]
    return np.column_stack([xy_px, score / share.sum(), cov, np.zeros(number)])


def figures(dataset: CsistDataset, found: list[Array64], bounds: list[Array64]) -> dict[str, float]:
    """What is said of an answer."""
    true = dataset.truths()
    matched, error = matched_errors(found, true)
    number = np.array([len(rows) for rows in true])
    right = np.array([len(rows) for rows in found]) == number
    image = matched[:, 0]
    few, counted = number[image] <= 3, right[image]
    error2 = (error[:, :2] ** 2).sum(axis=1)
    bound2 = np.array([np.trace(bounds[i][t]) for i, _, t in matched])
    covariance = np.array([found[i][d, [3, 4, 4, 5]] for i, d, _ in matched]).reshape(-1, 2, 2)
    squared = mahalanobis(error[:, :2], covariance)
    return {
        "cso_map": cso_map(found, true).mean,
        "count_accuracy": float(right.mean()),
        "rmse_px": math.sqrt(error2.mean()),
        "rmse_over_bound_few": math.sqrt((error2 / bound2)[few].mean()),
        "rmse_over_bound_few_counted": math.sqrt((error2 / bound2)[few & counted].mean()),
        "rmse_over_rms_bound_few": math.sqrt(error2[few].mean() / bound2[few].mean()),
        "nees_few": float(squared[few].mean() / 2.0),
        "targets_few": int(few.sum()),
    }


def main() -> None:
    """Print one line of JSON for each answer."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("dataset", type=Path)
    parser.add_argument("--images", type=int, default=250)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--engine", default="off_grid_any.openvino")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, help="posteriors' answers, .npz")
    args = parser.parse_args()
    dataset = read_csist(args.dataset)
    part = slice(args.first, args.first + args.images)
    columns = ("image", "target_count", "target_xy_px", "target_intensity")
    dataset = replace(dataset, **{name: getattr(dataset, name)[part] for name in columns})
    if dataset.profile != "field":
        parser.error(f"{args.dataset}: is of profile {dataset.profile}; this is for `field`")
    profile = PROFILES["field"]
    rng = np.random.default_rng(args.seed)
    _seed(args.seed)
    guessed, told, probable = [], [], []
    for number, counts in enumerate(dataset.image.astype(float)):
        sampled = [
            Posterior(counts, targets, profile, rng) for targets in range(1, MAX_TARGETS + 1)
        ]
        evidence = [posterior.log_evidence for posterior in sampled]
        guessed.append(answer(sampled, int(np.argmax(evidence)) + 1))
        told.append(answer(sampled, int(dataset.target_count[number])))
        probable.append(evidence)
        if number % 50 == 49:
            print(number + 1, flush=True)
    if args.out:
        kept = {"evidence": np.array(probable)}
        kept |= {f"guessed_{n}": rows for n, rows in enumerate(guessed)}
        kept |= {f"told_{n}": rows for n, rows in enumerate(told)}
        np.savez(args.out, **kept)
    bounds = true_bounds(dataset, dataset.truths())
    answers = {"ideal": guessed, "ideal, number told": told}
    with load(args.engine, dataset.sensor) as engine:
        for name, refined in (("network", False), ("network and fit", True)):
            answers[name] = unmix(dataset, engine, refined=refined).found
    for name, found in answers.items():
        print(
            json.dumps({"answer": name, "images": len(dataset)} | figures(dataset, found, bounds))
        )


if __name__ == "__main__":
    main()
