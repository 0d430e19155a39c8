"""The maximum-likelihood fit, and how many targets the likelihood calls for."""

import dataclasses

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from pipeline.physics.arrays import NumpyRandom
from pipeline.physics.bounds import censored_information, jacobian
from pipeline.physics.fit import NOTHING_KNOWN, Groups, Priors, Window, expected, fit
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
    covariance = np.linalg.inv(found.information)[:, :parameters, :parameters]
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
    found = select(
        window_of([ONE], NOISY), start_of([halves], room=2), NOISY, NOTHING_KNOWN, penalty=20.0
    )
    assert found.present.sum() == 1
    assert_allclose(targets(found, 0)[0, :2], ONE[0, :2], atol=0.03)


def test_a_target_that_was_missed_is_added():
    blurred = np.array([[5.0, 5.0, 4000.0]])
    found = select(
        window_of([TWO], NOISY), start_of([blurred], room=2), NOISY, NOTHING_KNOWN, penalty=20.0
    )
    assert found.present.sum() == 2
    sigma_px = np.sqrt(np.diag(np.linalg.inv(found.information[0]))[:2].max())
    assert_allclose(targets(found, 0)[:, :2], TWO[:, :2], atol=4.0 * sigma_px)


def test_noise_alone_hardly_ever_adds_a_target():
    trials = 300
    window = window_of([ONE] * trials, NOISY, seed=9)
    found = select(window, start_of([ONE] * trials, room=2), NOISY, NOTHING_KNOWN, penalty=20.0)
    assert (found.present.sum(axis=1) > 1).mean() < 0.02


def test_from_one_candidate_the_others_are_found_by_the_model_alone():
    groups = [ONE, TWO, THREE]
    middle = start_of([np.array([[5.0, 5.0, 4000.0]])] * 3, room=4)
    window = window_of(groups, NOISY)
    found = select(window, middle, NOISY, NOTHING_KNOWN, penalty=20.0, additions=4)
    assert found.present.sum(axis=1).tolist() == [1, 2, 3]
    for row, group in enumerate(groups):
        assert_allclose(targets(found, row)[:, :2], group[:, :2], atol=0.25)


# --- the compiled loop is the imaging model ------------------------------------------------------


@pytest.mark.parametrize("sensor", [NOISY, Sensor(sigma_px=0.5, full_scale=2300, gain=8.0)])
def test_likelihood_and_information_are_those_of_the_model(sensor):
    window = window_of([THREE], sensor)
    start = start_of([THREE + np.array([0.03, -0.02, 60.0])])
    at = fit(window, start, sensor, iterations=0)
    mean = expected(window, at, sensor)
    if sensor.full_scale < 16383:
        assert (window.counts_BHW >= sensor.full_scale).any()
    assert_allclose(
        at.log_likelihood[0], log_likelihood(window.counts_BHW, mean, sensor).sum(), rtol=1e-10
    )
    rows = jacobian(at.xy_px, at.intensity, (11, 11), sensor.sigma_px, with_background=True)
    weight = censored_information(mean, sensor).reshape(1, 1, -1)
    wanted = (rows * weight) @ rows.transpose(0, 2, 1)
    # what is observed differs from what is expected by the residuals, a few of their errors
    deviation = np.sqrt(np.einsum("bpp->bp", wanted))
    correlation = (at.information[:, :-1, :-1] - wanted) / deviation[..., None] / deviation[:, None]
    assert np.abs(correlation).max() < 0.35
    assert_allclose(correlation[0, -1], 0.0, atol=0.01)  # the offset's, which is linear


def test_observed_information_is_the_curvature_of_the_likelihood():
    sensor = Sensor(sigma_px=0.5, full_scale=3000, read_noise=20.0)  # variance not of the mean
    window = window_of([TWO], sensor)
    at = fit(window, start_of([TWO]), sensor, iterations=30)
    step = np.array([1e-3, 1e-3, 1.0])
    for target, axis in ((0, 0), (1, 1), (0, 2)):
        value = []
        for side in (-1.0, 0.0, 1.0):
            moved = at.parameters.copy()
            moved[0, target, axis] += side * step[axis]
            there = Groups.start(moved[..., :2], moved[..., 2], at.present)
            there = dataclasses.replace(there, offset=at.offset)
            value.append(fit(window, there, sensor, iterations=0).log_likelihood[0])
        curvature = -(value[0] - 2.0 * value[1] + value[2]) / step[axis] ** 2
        place = 3 * target + axis
        assert_allclose(at.information[0, place, place], curvature, rtol=0.02)


# --- what is known beforehand --------------------------------------------------------------------


def test_an_uncertain_sigma_is_fitted_and_widens_the_covariance():
    wide = dataclasses.replace(NOISY, sigma_px=0.55)
    window = window_of([ONE * [1, 1, 4]] * 50, wide)
    start = start_of([ONE * [1, 1, 4]] * 50)
    exact, unsure = (
        fit(window, start, dataclasses.replace(NOISY, sigma_error=error), iterations=30)
        for error in (0.0, 0.06)
    )
    assert_allclose(exact.sigma_px, 0.5)
    assert_allclose(unsure.sigma_px.mean(), 0.55, atol=0.003)
    of_intensity = [np.linalg.inv(one.information)[:, 2, 2].mean() for one in (exact, unsure)]
    assert of_intensity[1] > 1.3 * of_intensity[0]
    assert unsure.reduced_chi2.mean() < exact.reduced_chi2.mean()
    assert abs(unsure.reduced_chi2.mean() - 1.0) < 0.1


def test_a_known_background_is_not_fitted():
    window = window_of([ONE], NOISY)
    found = fit(window, start_of([ONE]), NOISY, Priors(background_known=True))
    assert found.offset[0] == 0.0
    assert fit(window, start_of([ONE]), NOISY).offset[0] != 0.0


def test_rules_of_a_benchmark_are_kept():
    window = window_of([TWO], NOISY)
    near = start_of([np.array([[5.0, 5.0, 2000.0], [5.15, 5.05, 2000.0]])])
    free = fit(window, near, NOISY, iterations=60)
    kept = fit(window, near, NOISY, Priors(separation_px=1.2), iterations=60)
    apart = [np.hypot(*(one.xy_px[0, 0] - one.xy_px[0, 1])) for one in (free, kept)]
    assert apart[0] < 1.0 < apart[1]
    low = fit(window, near, NOISY, Priors(intensity=(1000.0, 1010.0)), iterations=60)
    assert_allclose(low.intensity[0], 1005.0, atol=20.0)
