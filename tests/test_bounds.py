"""Fisher information and the Cramér–Rao bound, against numbers found another way."""

import math

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose
from scipy.integrate import quad
from scipy.stats import norm

from pipeline.physics import noise
from pipeline.physics.arrays import NumpyRandom
from pipeline.physics.bounds import censored_information, cramer_rao, fisher_information, jacobian
from pipeline.physics.group_bounds import group_bounds
from pipeline.physics.inverse import inverses
from pipeline.physics.measurement import log_likelihood, measure
from pipeline.physics.psf import render
from pipeline.physics.sensor import Sensor

SHAPE = (11, 11)
SENSOR = Sensor(sigma_px=0.5, full_scale=65535, read_noise=6.0, gain=8.0)
BACKGROUND = 1000.0
GROUPS = {
    "one": (np.array([[5.21, 4.86]]), np.array([3000.0])),
    "two": (np.array([[4.6, 5.1], [5.5, 4.9]]), np.array([5000.0, 4000.0])),
}


def expected_counts(parameters, targets):
    """Mean images (B, 121) of parameters (B, 3K + 1) ordered as in `bounds`."""
    group = parameters[:, :-1].reshape(-1, targets, 3)
    signal = render(group[..., :2], group[..., 2], SHAPE, SENSOR.sigma_px)
    return signal.reshape(len(parameters), -1) + parameters[:, -1:]


def fit(counts, start, targets):
    """Maximum likelihood of each image (B, 121), by Fisher scoring from `start` (P,)."""
    parameters = np.repeat(start[None], len(counts), axis=0)
    for _ in range(25):
        group = parameters[:, :-1].reshape(-1, targets, 3)
        slope = jacobian(
            group[..., :2], group[..., 2], SHAPE, SENSOR.sigma_px, with_background=True
        )
        mean = expected_counts(parameters, targets)
        weighted = slope / noise.variance(mean, SENSOR)[:, None, :]
        score = weighted @ (counts - mean)[..., None]
        step = np.linalg.solve(weighted @ slope.swapaxes(1, 2), score)[..., 0]
        parameters = parameters + step
    assert np.abs(step[:, :2]).max() < 1e-6  # converged
    return parameters


@pytest.mark.parametrize("name", GROUPS)
def test_maximum_likelihood_reaches_the_bound(name):
    xy_px, intensity = GROUPS[name]
    targets, trials = len(intensity), 1500
    truth = np.append(np.concatenate([xy_px, intensity[:, None]], axis=1).ravel(), BACKGROUND)
    clean = np.repeat(expected_counts(truth[None], targets), trials, axis=0)
    counts = measure(clean, SENSOR, NumpyRandom(11))
    error = fit(counts, truth, targets) - truth

    information = fisher_information(
        xy_px, intensity, BACKGROUND, SHAPE, SENSOR, with_background=True
    )
    bound = cramer_rao(information)
    deviation = np.sqrt(np.diag(bound))
    assert (np.abs(error.mean(axis=0)) < 4.5 * deviation / math.sqrt(trials)).all()
    # A sample variance of n normals has the relative standard error √(2/n).
    ratio = error.var(axis=0) / np.diag(bound)
    assert_allclose(ratio, 1.0, atol=4.5 * math.sqrt(2.0 / trials))
    # All variances and correlations at once: eᵀ I e has mean P and variance 2P.
    squared = np.einsum("bp,pq,bq->b", error, information, error)
    wanted = len(truth)
    assert abs(squared.mean() - wanted) < 4.5 * math.sqrt(2.0 * wanted / trials)


def test_jacobian_against_finite_differences():
    xy_px, intensity = GROUPS["two"]
    truth = np.append(np.concatenate([xy_px, intensity[:, None]], axis=1).ravel(), BACKGROUND)
    found = jacobian(xy_px, intensity, SHAPE, SENSOR.sigma_px, with_background=True)
    step = np.diag(np.maximum(1e-5, 1e-7 * truth))
    difference = expected_counts(truth + step, 2) - expected_counts(truth - step, 2)
    assert_allclose(found, difference / (2.0 * np.diag(step))[:, None], rtol=1e-6, atol=1e-4)


def test_one_centred_target_has_the_textbook_bound():
    """White noise, fine sampling: var(x) = 8πσ⁴ v/g², as Σ (∂m/∂x)² = g²/(8πσ⁴)."""
    sensor = Sensor(sigma_px=3.0, full_scale=65535, read_noise=10.0)
    xy_px, intensity = np.array([[20.0, 20.0]]), np.array([2000.0])
    bound = cramer_rao(fisher_information(xy_px, intensity, 0.0, (41, 41), sensor))
    variance = 100.0 + 1.0 / 12.0
    # Integrating over pixels widens σ² by 1/12.
    wanted = 8.0 * math.pi * (3.0**2 + 1.0 / 12.0) ** 2 * variance / 2000.0**2
    assert_allclose(np.diag(bound)[:2], wanted, rtol=1e-3)


def test_the_bound_grows_as_targets_close_in():
    bounds = []
    for distance_px in (3.0, 1.5, 1.0, 0.7, 0.5):
        xy_px = np.array([[5.0 - distance_px / 2, 5.0], [5.0 + distance_px / 2, 5.0]])
        information = fisher_information(
            xy_px, np.array([3000.0, 3000.0]), BACKGROUND, SHAPE, SENSOR
        )
        bounds.append(cramer_rao(information)[0, 0])
    assert (np.diff(bounds) > 0).all()
    assert bounds[-1] > 10.0 * bounds[0]


def test_an_unknown_background_never_helps():
    xy_px, intensity = GROUPS["two"]
    known = cramer_rao(fisher_information(xy_px, intensity, BACKGROUND, SHAPE, SENSOR))
    unknown = cramer_rao(
        fisher_information(xy_px, intensity, BACKGROUND, SHAPE, SENSOR, with_background=True)
    )
    assert (np.diag(unknown)[:6] >= np.diag(known)).all()


def test_batches_and_torch_agree_with_single_groups():
    xy_px, intensity = GROUPS["two"]
    batch = np.stack([xy_px, xy_px + 0.3])
    bright = np.stack([intensity, 2.0 * intensity])
    level = np.array([100.0, 1000.0])
    found = fisher_information(batch, bright, level, SHAPE, SENSOR, with_background=True)
    for row in range(2):
        alone = fisher_information(
            batch[row], bright[row], level[row], SHAPE, SENSOR, with_background=True
        )
        assert_allclose(found[row], alone, rtol=1e-12)
    tensors = (torch.tensor(value) for value in (batch, bright, level))
    in_torch = fisher_information(*tensors, SHAPE, SENSOR, with_background=True)
    assert_allclose(in_torch.numpy(), found, rtol=1e-12, atol=1e-12)
    assert_allclose(cramer_rao(in_torch).numpy(), cramer_rao(found), rtol=1e-6)


def test_bound_is_the_inverse_and_stays_finite():
    xy_px, intensity = GROUPS["two"]
    information = fisher_information(xy_px, intensity, BACKGROUND, SHAPE, SENSOR)
    assert_allclose(cramer_rao(information) @ information, np.eye(6), atol=1e-8)
    outside = fisher_information(
        np.array([[5.0, 5.0], [60.0, 5.0]]), np.array([3000.0, 3000.0]), 0.0, SHAPE, SENSOR
    )
    bound = cramer_rao(outside)
    assert np.isfinite(bound).all()
    assert bound[3, 3] > 1e6 * bound[0, 0]
    coincident = fisher_information(
        np.array([[5.0, 5.0], [5.0, 5.0]]), np.array([3000.0, 3000.0]), 0.0, SHAPE, SENSOR
    )
    bound = cramer_rao(coincident)
    assert np.isfinite(bound).all()
    assert bound[0, 0] > 1.0


# --- censoring -----------------------------------------------------------------------------------

CENSORED = Sensor(full_scale=255, read_noise=5.0)  # its variance does not depend on the mean
DEVIATION = math.sqrt(25.0 + 1.0 / 12.0)
THRESHOLD = 254.5


def expected_log_likelihood(mean, truth):
    """E[log L(z; mean)] over z drawn about `truth`, continuous below the threshold."""
    seen = norm(truth, DEVIATION)

    def integrand(counts):
        return seen.pdf(counts) * log_likelihood(np.array(counts), np.array(mean), CENSORED)

    lowest = min(truth, THRESHOLD) - 12.0 * DEVIATION
    below = quad(integrand, lowest, THRESHOLD, epsabs=1e-13, epsrel=1e-11, limit=200)[0]
    return below + seen.sf(THRESHOLD) * log_likelihood(np.array(255.0), np.array(mean), CENSORED)


@pytest.mark.parametrize("offset", [-8.0, -2.0, -0.5, 0.0, 0.7, 2.0])
def test_censored_information_is_the_curvature_of_the_expected_likelihood(offset):
    truth, step = THRESHOLD + offset * DEVIATION, 0.05 * DEVIATION
    low, middle, high = (
        expected_log_likelihood(truth + shift, truth) for shift in (-step, 0.0, step)
    )
    curvature = -(high - 2.0 * middle + low) / step**2
    found = float(censored_information(np.array(truth), CENSORED))
    assert_allclose(found, curvature, rtol=3e-3, atol=1e-7)


def test_saturation_takes_the_information_away():
    means = np.array([100.0, 254.5, 254.5 + 6.0 * DEVIATION, 400.0, 10_000.0])
    share = censored_information(means, CENSORED) * DEVIATION**2
    assert_allclose(share[0], 1.0, rtol=1e-9)
    assert_allclose(share[1], 0.5 + 1.0 / math.pi, rtol=1e-9)
    assert (share[2:] < 1e-6).all() and (share >= 0.0).all()
    falling = censored_information(np.linspace(200.0, 320.0, 500), CENSORED)
    assert (np.diff(falling) <= 1e-15).all()


def test_a_saturated_centre_loosens_the_bound():
    xy_px, intensity = np.array([[5.2, 5.1]]), np.array([600.0])
    bounds = [
        cramer_rao(
            fisher_information(
                xy_px, intensity, 0.0, SHAPE, Sensor(full_scale=full_scale, read_noise=5.0)
            )
        )
        for full_scale in (4095, 255)
    ]
    assert (np.diag(bounds[1]) > np.diag(bounds[0])).all()
    assert bounds[1][2, 2] > 1.5 * bounds[0][2, 2]


def test_a_batch_of_inverses_is_each_bound_by_itself(rng):
    near = rng.normal(size=(4, 7, 7))
    information = near @ near.transpose(0, 2, 1) + 0.1 * np.eye(7)
    information[1, 3] = information[1, :, 3] = 0.0  # says nothing of one
    information[2, 4:] = information[2, :, 4:] = 0.0  # nor of three
    information[3] = np.ones((7, 7))  # cannot tell any from the others
    for found, one in zip(inverses(information), information, strict=True):
        bound = cramer_rao(one)
        assert np.isfinite(found).all()
        assert_allclose(found, bound, rtol=1e-6, atol=1e-9 * np.abs(bound).max())


@pytest.mark.parametrize("sigma_error", [0.0, 0.1])
def test_a_frame_of_groups_at_once_is_each_group_by_itself(rng, sigma_error):
    sensor = Sensor(full_scale=16383, read_noise=6.0, gain=8.0, sigma_error=sigma_error)
    sizes = np.array([1, 3, 2, 5, 1, 2])  # patch 3 has none
    patch = np.repeat([0, 1, 2, 4, 5, 6], sizes).astype(np.int32)
    xy_px = 5.0 + rng.uniform(-1.6, 1.6, (len(patch), 2))
    intensity = rng.uniform(800.0, 30_000.0, len(patch))  # some saturate
    intensity[-1] = 0.0  # what says nothing of its own position gets a large bound, no NaN
    level = rng.uniform(500.0, 1500.0, 7)
    usable_BHW = rng.random((7, *SHAPE)) > 0.03
    found = group_bounds(patch, xy_px, intensity, level, usable_BHW, sensor)
    for row in np.unique(patch):
        here = patch == row
        information = fisher_information(
            xy_px[here], intensity[here], level[row], SHAPE, sensor,
            with_background=True, usable=usable_BHW[row],
        )  # fmt: skip
        bound, of = cramer_rao(information), 3 * np.arange(here.sum())
        snr = intensity[here] * np.sqrt(information[of + 2, of + 2])
        cov = np.stack([bound[of, of], bound[of, of + 1], bound[of + 1, of + 1]], axis=-1)
        assert_allclose(found.snr[here], snr, rtol=1e-9)
        error = np.abs(found.cov_px2[here] - cov)
        assert (error <= 1e-9 * np.sqrt(cov[:, :1] * cov[:, 2:])).all()
        assert_allclose(found.intensity_sigma[here], np.sqrt(bound[of + 2, of + 2]), rtol=1e-9)
