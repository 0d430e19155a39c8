"""The maximum-likelihood fit, and how many targets the likelihood calls for."""

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from pipeline.physics.arrays import NumpyRandom
from pipeline.physics.fit import Groups, Window, fit, information
from pipeline.physics.measurement import log_likelihood, measure, score
from pipeline.physics.psf import render
from pipeline.physics.select import select
from pipeline.physics.sensor import Sensor

QUIET = Sensor(sigma_px=0.5, full_scale=16383)
NOISY = Sensor(sigma_px=0.5, full_scale=16383, read_noise=6.0, gain=8.0)
LEVEL = 1000.0


def window_of(groups, sensor, seed=1):
    """Measured patches of groups given as arrays (K, 3) of x, y, intensity."""
    mean = [LEVEL + render(g[:, :2], g[:, 2], (11, 11), sensor.sigma_px) for g in groups]
    counts = measure(np.array(mean), sensor, NumpyRandom(seed))
    return Window(counts, np.full_like(counts, LEVEL), np.ones(counts.shape, bool))


def start_of(groups, room=0):
    width = max(len(g) for g in groups) + room
    padded = np.zeros((len(groups), width, 3))
    for row, group in zip(padded, groups, strict=True):
        row[: len(group)] = group
    return Groups.start(padded[..., :2], padded[..., 2], padded[..., 2] > 0)


def targets(found, row):
    rows = np.column_stack([found.xy_px[row], found.intensity[row]])[found.present[row]]
    return rows[np.lexsort(rows.T[::-1])]


@pytest.mark.parametrize("counts", [900.0, 1003.0, 16383.0])
@pytest.mark.parametrize("mean", [950.0, 1003.0, 16380.0, 16500.0])
def test_score_is_the_slope_of_the_log_likelihood(counts, mean):
    sensor = Sensor(full_scale=16383, read_noise=20.0)  # its variance does not follow the mean
    step = 1e-3
    at = np.array([mean - step, mean + step])
    low, high = log_likelihood(np.full(2, counts), at, sensor)
    found = score(np.array([counts]), np.array([mean]), sensor)[0]
    assert_allclose(found, (high - low) / (2 * step), rtol=1e-5, atol=1e-9)


ONE = np.array([[5.2, 4.7, 3000.0]])
TWO = np.array([[4.7, 5.1, 2500.0], [5.5, 4.9, 1800.0]])
THREE = np.array([[4.3, 4.5, 2500.0], [5.0, 5.6, 2800.0], [5.8, 4.6, 2000.0]])


def test_without_noise_the_truth_is_recovered():
    groups = [ONE, TWO, THREE]
    window = window_of(groups, QUIET)
    nearby = [g + np.array([0.12, -0.1, 200.0]) for g in groups]
    found = fit(window, start_of(nearby), QUIET, iterations=40)
    assert found.converged.all()
    for row, group in enumerate(groups):
        assert_allclose(targets(found, row)[:, :2], group[:, :2], atol=2e-3)
        assert_allclose(targets(found, row)[:, 2], group[:, 2], rtol=5e-3)
    assert_allclose(found.offset, 0.0, atol=0.3)


def test_saturated_pixels_bound_the_fit_but_are_no_residual():
    sensor = Sensor(sigma_px=0.5, full_scale=2000)
    bright = np.array([[5.1, 4.9, 6000.0]])  # its peak would be near 3800
    window = window_of([bright], sensor)
    assert (window.counts_BHW >= 2000).any()
    found = fit(window, start_of([bright + np.array([0.1, 0.1, -2000.0])]), sensor, iterations=60)
    assert_allclose(targets(found, 0)[0, :2], bright[0, :2], atol=0.01)
    assert_allclose(targets(found, 0)[0, 2], 6000.0, rtol=0.02)


@pytest.mark.parametrize("group", [ONE, TWO], ids=["one", "two"])
def test_errors_are_what_the_information_says(group):
    trials = 600
    truth = [group] * trials
    window = window_of(truth, NOISY, seed=5)
    found = fit(window, start_of(truth), NOISY, iterations=30)
    assert found.converged.all()
    error = np.concatenate([found.xy_px, found.intensity[..., None]], axis=2) - group
    parameters = 3 * len(group)
    covariance = np.linalg.inv(information(window, found, NOISY))[:, :parameters, :parameters]
    bound = np.sqrt(np.einsum("bii->bi", covariance).mean(axis=0))
    # three standard errors of a deviation, and the bound is one for small errors only
    assert_allclose(error.reshape(trials, -1).std(axis=0) / bound, 1.0, atol=0.12)


def test_a_patch_is_fitted_alike_whatever_its_batch_mates():
    groups = [ONE, TWO, THREE]
    window, start = window_of(groups, NOISY), start_of([g + 0.05 for g in groups])
    together = fit(window, start, NOISY)
    for row in range(3):
        rows = np.array([row])
        alone = fit(window.take(rows), start.take(rows), NOISY)
        assert_array_equal(alone.xy_px[0], together.xy_px[row])


def test_bad_pixels_say_nothing():
    window = window_of([ONE], QUIET)
    window.counts_BHW[0, 5, 6] = 16000.0
    window.usable_BHW[0, 5, 6] = False
    found = fit(window, start_of([ONE + 0.05]), QUIET, iterations=40)
    assert_allclose(targets(found, 0)[0, :2], ONE[0, :2], atol=2e-3)


def test_a_target_split_in_two_becomes_one():
    halves = np.array([[5.05, 4.7, 1500.0], [5.4, 4.7, 1500.0]])
    found = select(window_of([ONE], NOISY), start_of([halves], room=2), NOISY, penalty=20.0)
    assert found.present.sum() == 1
    assert_allclose(targets(found, 0)[0, :2], ONE[0, :2], atol=0.03)


def test_a_target_that_was_missed_is_added():
    blurred = np.array([[5.0, 5.0, 4000.0]])
    found = select(window_of([TWO], NOISY), start_of([blurred], room=2), NOISY, penalty=20.0)
    assert found.present.sum() == 2
    normal = information(window_of([TWO], NOISY), found, NOISY)
    sigma_px = np.sqrt(np.diag(np.linalg.inv(normal[0]))[:2].max())
    assert_allclose(targets(found, 0)[:, :2], TWO[:, :2], atol=4.0 * sigma_px)


def test_noise_alone_hardly_ever_adds_a_target():
    trials = 300
    window = window_of([ONE] * trials, NOISY, seed=9)
    found = select(window, start_of([ONE] * trials, room=2), NOISY, penalty=20.0)
    assert (found.present.sum(axis=1) > 1).mean() < 0.02
