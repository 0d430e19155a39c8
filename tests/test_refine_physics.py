"""Candidates to fitted targets: what a network says beforehand, several starts, covariances."""

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from pipeline.physics.arrays import NumpyRandom
from pipeline.physics.bounds import cramer_rao, fisher_information
from pipeline.physics.candidates import Candidates
from pipeline.physics.fit import Groups, Priors, Window, fit
from pipeline.physics.lone import lone_targets, with_lone
from pipeline.physics.measurement import measure
from pipeline.physics.psf import render
from pipeline.physics.refine import refine
from pipeline.physics.sensor import Sensor
from trainer.robustness import published

SENSOR = Sensor(sigma_px=0.5, full_scale=16383, read_noise=6.0, gain=8.0)
LEVEL = 1000.0
PAIR = np.array([[4.7, 5.1, 2500.0], [5.5, 4.9, 1800.0]])


def windows(group, number, seed=1):
    mean = LEVEL + render(group[:, :2], group[:, 2], (11, 11), SENSOR.sigma_px)
    counts = measure(np.repeat(mean[None], number, axis=0), SENSOR, NumpyRandom(seed))
    return Window(counts, np.full_like(counts, LEVEL), np.ones(counts.shape, bool))


def said(group, number, rng, sigma_px=0.05, sigma_counts=100.0, p_exist=0.97):
    """What a network with honest sigmas would say of each patch."""
    table = np.repeat(group[None], number, axis=0)
    table = table + rng.normal(size=table.shape) * [sigma_px, sigma_px, sigma_counts]
    patch = np.repeat(np.arange(number), len(group))
    rows = table.reshape(-1, 3)
    return Candidates.unsure(patch, rows[:, :2], rows[:, 2])._replace(
        p_exist=np.full(len(patch), p_exist),
        p_count=np.full(len(patch), p_exist),
        cov_px2=np.tile([sigma_px**2, 0.0, sigma_px**2], (len(patch), 1)),
        intensity_sigma=np.full(len(patch), sigma_counts),
    )


def test_errors_are_as_large_as_the_covariance_says(rng):
    number = 400
    network = said(PAIR, number, rng, p_exist=1.0)
    found = refine(windows(PAIR, number), network, SENSOR).candidates
    assert found.refined.mean() > 0.95 and len(found.patch) == 2 * number
    error = found.xy_px - np.tile(PAIR[:, :2], (number, 1))
    xx, xy, yy = found.cov_px2.T
    inverse = np.linalg.inv(np.stack([np.stack([xx, xy], 1), np.stack([xy, yy], 1)], 1))
    nees = np.einsum("mi,mij,mj->m", error, inverse, error).mean() / 2.0
    assert 0.8 < nees < 1.1
    ratio = (found.intensity - np.tile(PAIR[:, 2], number)) / found.intensity_sigma
    assert 0.45 < np.mean(ratio**2) < 1.1


def test_existence_is_kept_and_the_number_too(rng):
    found = refine(windows(PAIR, 3), said(PAIR, 3, rng), SENSOR).candidates
    assert_array_equal(found.patch, [0, 0, 1, 1, 2, 2])
    assert_allclose(found.p_exist, 0.97)


def test_what_is_known_beforehand_narrows_what_the_counts_leave_open(rng):
    close = np.array([[4.9, 5.0, 400.0], [5.1, 5.0, 400.0]])
    window = windows(close, 1)
    found = refine(window, said(close, 1, rng, sigma_px=0.03, sigma_counts=20.0), SENSOR).candidates
    bound = cramer_rao(
        fisher_information(
            close[None, :, :2], close[None, :, 2], LEVEL, (11, 11), SENSOR, with_background=True
        )
    )
    assert bound[0, 0, 0] > 0.04
    assert found.refined.all() and (found.cov_px2[:, 0] < 2.2 * 0.03**2).all()


def test_a_prior_pulls_the_fit_towards_it():
    window = windows(PAIR[:1], 1)
    start = PAIR[None, :1, :2], PAIR[None, :1, 2], np.ones((1, 1), bool)
    prior = PAIR[None, :1] + [0.1, 0.0, 0.0]
    free = fit(window, Groups.start(*start), SENSOR)
    precision = np.zeros((1, 1, 3))
    for strength, low, high in ((1e2, 0.0, 0.01), (1e9, 0.09, 0.11)):
        precision[..., 0] = strength
        pulled = fit(window, Groups.start(*start, prior, precision), SENSOR, iterations=40)
        assert low < pulled.xy_px[0, 0, 0] - free.xy_px[0, 0, 0] < high


def test_where_solutions_compete_the_covariance_tells_of_them(rng):
    # A saturated pair whose sides the counts hardly tell apart: the fit alone is too sure.
    sensor = Sensor(sigma_px=0.5, full_scale=255)
    group = np.array([[4.8, 4.8, 240.0], [5.2, 5.2, 240.0], [4.8, 5.25, 240.0]])
    mean = render(group[:, :2], group[:, 2], (11, 11), sensor.sigma_px)
    counts = np.repeat(measure(mean, sensor, NumpyRandom(1))[None], 20, axis=0)
    window = Window(counts, np.zeros_like(counts), np.ones(counts.shape, bool))
    candidates = said(group, 20, rng, sigma_px=0.15, sigma_counts=10.0)
    once = refine(window, candidates, sensor).candidates
    often = refine(window, candidates, sensor, starts=6).candidates
    both = once.refined & often.refined
    assert both.sum() > 30
    assert np.median(often.cov_px2[both, 0] / once.cov_px2[both, 0]) >= 1.0 - 1e-9
    assert often.cov_px2[both, 0].mean() > once.cov_px2[both, 0].mean()
    again = refine(window, candidates, sensor, starts=6).candidates
    assert_array_equal(often.xy_px, again.xy_px)


def test_a_target_that_leaves_the_patch_gives_the_candidates_back(rng):
    outside = np.array([[10.3, 5.0, 3000.0]])
    window = windows(np.array([[11.4, 5.0, 60000.0]]), 1)
    candidates = said(outside, 1, rng, sigma_px=2.0, sigma_counts=1e5)
    found = refine(window, candidates, SENSOR).candidates
    assert not found.refined.any()
    for name in ("xy_px", "intensity", "p_exist", "cov_px2", "intensity_sigma"):
        assert_array_equal(getattr(found, name), getattr(candidates, name))


@pytest.mark.parametrize("starts", [1, 3])
def test_no_candidates_no_targets(starts):
    nothing = Candidates.unsure(np.zeros(0, int), np.zeros((0, 2)), np.zeros(0))
    found = refine(windows(PAIR, 2), nothing, SENSOR, starts=starts)
    assert len(found.candidates.patch) == 0
    assert found.converged.all() and np.isnan(found.reduced_chi2).all()


def test_neighbours_errors_are_correlated_as_the_joint_covariance_says(rng):
    number = 400
    close = np.array([[4.75, 5.0, 3000.0], [5.3, 5.0, 3000.0]])
    vague = said(close, number, rng, p_exist=1.0)
    vague = vague._replace(cov_px2=np.tile([1.0, 0.0, 1.0], (2 * number, 1)))
    found = refine(windows(close, number), vague, SENSOR)
    joint = found.joint_px2
    assert joint.shape == (number, 4, 4)
    own = found.candidates.cov_px2.reshape(number, 2, 3)
    assert_allclose(joint[:, 0, 0], own[:, 0, 0])
    assert_allclose(joint[:, 2, 3], own[:, 1, 1])
    error = found.candidates.xy_px.reshape(number, 4) - close[:, :2].ravel()
    stated = (joint[:, 0, 2] / np.sqrt(joint[:, 0, 0] * joint[:, 2, 2])).mean()
    assert abs(stated) > 0.05
    assert_allclose(np.corrcoef(error[:, 0], error[:, 2])[0, 1], stated, atol=0.15)
    together = np.einsum("bi,bij,bj->b", error, np.linalg.inv(joint), error).mean() / 4.0
    assert 0.8 < together < 1.3


def test_the_less_sure_the_count_the_nearer_to_the_networks_answer(rng):
    window = windows(PAIR, 1)
    network = said(PAIR, 1, rng)
    fitted = refine(window, network._replace(p_count=np.ones(2)), SENSOR)
    place, joint = [], []
    for p in (1.0, 0.8, 0.51):
        found = refine(window, network._replace(p_count=np.full(2, p)), SENSOR)
        assert found.candidates.refined.all()
        moved = found.candidates.xy_px - network.xy_px
        assert_allclose(moved, p**2 * (fitted.candidates.xy_px - network.xy_px), atol=1e-9)
        place.append(np.abs(moved).max())
        joint.append(found.joint_px2[0])
    assert place[0] > place[1] > place[2] > 0.0
    apart = (fitted.candidates.xy_px - network.xy_px).ravel()
    own = np.diag(network.cov_px2[:, [0, 2]].ravel())
    expected = 0.8**6 * fitted.joint_px2[0] + (1 - 0.8**6) * own
    assert_allclose(joint[1], expected + 0.64 * 0.36 * np.outer(apart, apart), rtol=1e-9)


def test_a_fit_the_network_thinks_impossible_is_not_taken(rng):
    network = said(PAIR, 1, rng, sigma_px=0.01, p_exist=1.0)
    for shift, taken in ((0.0, True), (0.05, False)):
        moved = network._replace(xy_px=network.xy_px + shift)
        vague = moved._replace(intensity_sigma=np.full(2, 1e4))
        found = refine(windows(PAIR, 1), vague, SENSOR).candidates
        assert (found.refined == taken).all()
        assert taken or (found.xy_px == moved.xy_px).all()


def test_an_extended_object_is_no_group_of_points(rng):
    y, x = np.mgrid[:11, :11]
    disc = 2000.0 * (np.hypot(x - 5, y - 5) < 3.2)
    window = windows(PAIR, 1)
    extended = Window(window.background_BHW + disc, window.background_BHW, window.usable_BHW)
    assert refine(extended, said(PAIR, 1, rng), SENSOR).reduced_chi2[0] > 10.0
    assert refine(window, said(PAIR, 1, rng), SENSOR).reduced_chi2[0] < 1.5


@pytest.mark.parametrize("number", [3, 4])
def test_known_intensities_tell_how_many_there_are(rng, number):
    sensor = Sensor(sigma_px=0.5, full_scale=255)
    corners = np.array([[-1, -1], [1, -1], [-1, 1], [1, 1]]) * 0.3 + 5.0
    four = np.column_stack([corners, np.full(4, 235.0)])
    mean = render(four[:number, :2], four[:number, 2], (11, 11), sensor.sigma_px)
    counts = measure(mean[None], sensor, NumpyRandom(1))
    window = Window(counts, np.zeros_like(counts), np.ones(counts.shape, bool))
    doubtful = said(four, 1, rng, sigma_counts=10.0)._replace(p_count=np.array([1, 1, 0.99, 0.5]))
    rules = Priors(intensity=(220.0, 250.0), separation_px=0.494, background_known=True)
    found = refine(window, doubtful, sensor, rules).candidates
    assert (found.p_count >= 0.5).sum() == number
    assert found.refined[:number].all()
    without = refine(window, doubtful, sensor).candidates
    assert_array_equal(without.p_count, doubtful.p_count)


def test_what_is_published_is_likely_probable_and_significant(rng):
    group = PAIR[[0, 0, 0]] + [[0, 0, 0], [2, 0, 0], [0, 2, 0]]
    group[2, 2] = 30.0  # counts: below the noise
    window = windows(group, 4)
    found = said(group, 4, rng, sigma_counts=1.0, p_exist=0.9)
    p_exist, p_count = found.p_exist.copy(), found.p_count.copy()
    p_exist[3], p_count[7] = 0.4, 0.4
    kept = published(found._replace(p_exist=p_exist, p_count=p_count), window, SENSOR)
    assert_array_equal(np.bincount(kept.patch), [2, 1, 1, 2])
    assert (kept.intensity > 1000.0).all()


@pytest.mark.parametrize(("second", "number"), [(0.0, 1), (0.3, 0)])
def test_a_lone_target_with_a_wide_saturated_core_is_one(rng, second, number):
    group = np.array([[5.2, 4.7, 1e5], [6.1, 4.9, second * 1e5]])
    window = windows(group, 20)
    assert ((window.counts_BHW >= SENSOR.full_scale).sum(axis=(1, 2)) > 1).all()
    lone = lone_targets(window, SENSOR)
    assert len(lone.patch) == 20 * number
    assert_allclose(lone.xy_px, np.tile(group[:1, :2], (20 * number, 1)), atol=0.02)
    network = said(np.array([[5.0, 4.6, 6e4], [5.4, 4.8, 6e4]]), 20, rng)
    found = with_lone(network, lone)
    assert_array_equal(np.bincount(found.patch), 1 if number else 2)
    if number:
        assert refine(window, found, SENSOR).candidates.refined.all()
