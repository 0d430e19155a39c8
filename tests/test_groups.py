"""The benchmark's profiles: ranges, separation, and the distribution that results."""

import itertools
import math

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose
from scipy.stats import binomtest, chisquare, ks_2samp, kstest, trapezoid

from pipeline.physics.arrays import NumpyRandom
from pipeline.physics.groups import (
    MAX_TARGETS,
    PROFILES,
    draw_arrangements,
    draw_groups,
    draw_patches,
)
from pipeline.physics.psf import render
from trainer.data import TorchRandom

SEPARATION_PX = PROFILES["csist-100k"].separation_px
NUMBER = 1500


@pytest.fixture(scope="module", params=PROFILES)
def drawn(request):
    profile = PROFILES[request.param]
    return profile, draw_groups(profile, NUMBER, NumpyRandom(8))


def present(groups):
    return np.arange(MAX_TARGETS) < groups.count[:, None]


def test_the_benchmark_is_the_published_one():
    profile = PROFILES["csist-100k"]
    assert_allclose(profile.separation_px, 0.494)
    assert (profile.sensor.sigma_px, profile.sensor.full_scale) == (0.5, 255)
    assert profile.sensor.noiseless and profile.background == 0.0
    assert (profile.pixel_range, profile.intensity) == ((0, 10), (220.0, 250.0))
    assert PROFILES["interior"].pixel_range == (2, 8)


def test_reproducible_from_the_seed(drawn):
    profile, groups = drawn
    again = draw_groups(profile, NUMBER, NumpyRandom(8))
    for first, second in zip(groups, again, strict=True):
        np.testing.assert_array_equal(first, second)
    other = draw_groups(profile, NUMBER, NumpyRandom(9))
    both = present(groups) & present(other)
    assert (other.intensity[both] != groups.intensity[both]).all()


def test_counts_are_uniform(drawn):
    profile, groups = drawn
    assert groups.count.min() == profile.fewest
    number = np.bincount(groups.count, minlength=MAX_TARGETS + 1)[profile.fewest :]
    assert chisquare(number).pvalue > 1e-3


def test_targets_keep_apart(drawn):
    profile, groups = drawn
    for first, second in itertools.combinations(range(MAX_TARGETS), 2):
        both = groups.count > second
        distance = np.hypot(*(groups.xy_px[both, first] - groups.xy_px[both, second]).T)
        assert distance.min() >= profile.separation_px - 1e-12


def test_positions_fill_their_squares(drawn):
    profile, groups = drawn
    first, last = profile.pixel_range
    here = groups.xy_px[present(groups)]
    assert here.min() >= first - profile.half_width_px
    assert here.max() <= last + profile.half_width_px
    single = groups.xy_px[groups.count == 1, 0]
    if profile.half_width_px == 0.5:  # squares tile the range: a single target is uniform over it
        for axis in range(2):
            uniform = kstest(single[:, axis], "uniform", args=(first - 0.5, last - first + 1.0))
            assert uniform.pvalue > 1e-3
    # All targets of a group share one square.
    spread = np.ptp(np.where(present(groups)[..., None], groups.xy_px, groups.xy_px[:, :1]), axis=1)
    assert spread.max() <= 2.0 * profile.half_width_px


def test_intensities_and_sigma_have_their_distribution(drawn):
    profile, groups = drawn
    low, high = profile.intensity
    found = groups.intensity[present(groups)[:, 0], 0]
    if profile.log_uniform:  # and so is the brightness they share: a sum of two
        found, low, high = np.log(found), math.log(low), math.log(high)
    own, (dimmest, brightest) = high - low, np.log(profile.brightness)
    whole = own + brightest - dimmest
    edge = min(own, whole - own) / whole
    law = trapezoid(edge, 1.0 - edge, loc=low + dimmest, scale=whole)
    assert kstest(found, law.cdf).pvalue > 1e-3
    sigma_px, spread = profile.sensor.sigma_px, profile.sigma_spread
    if spread:
        bounds = (sigma_px * (1.0 - spread), 2.0 * sigma_px * spread)
        assert kstest(groups.sigma_px, "uniform", args=bounds).pvalue > 1e-3
    else:
        assert (groups.sigma_px == sigma_px).all()


def test_padding_is_zero(drawn):
    _, groups = drawn
    absent = ~present(groups)
    assert (groups.intensity[absent] == 0.0).all()
    assert (groups.xy_px[absent] == 0.0).all()


def test_patches_are_measurements_of_their_truth():
    profile = PROFILES["field"]
    patches, groups = draw_patches(profile, 2000, NumpyRandom(2))
    mean = profile.background + render(
        groups.xy_px, groups.intensity, (11, 11), groups.sigma_px[:, None]
    )
    sensor = profile.sensor
    variance = sensor.read_noise**2 + mean / sensor.gain + 1.0 / 12.0
    pull = (patches - mean) / np.sqrt(variance)
    assert abs(pull.mean()) < 5.0 / math.sqrt(pull.size)
    assert abs(pull.var() - 1.0) < 5.0 * math.sqrt(2.0 / pull.size)


def test_three_benchmark_targets_usually_saturate():
    patches, groups = draw_patches(PROFILES["csist-100k"], 600, NumpyRandom(2))
    saturated = (patches == 255).any(axis=(1, 2))
    assert not saturated[groups.count == 1].any()
    # Those whose square the border does not cut.
    assert saturated[groups.count >= 4].mean() > 0.8
    assert patches.max() == 255 and patches.min() == 0


# --- the distribution of an arrangement ----------------------------------------------------------


def joint_rejection(wanted, targets, rng, batch=500_000):
    """Arrangements drawn by the definition: all targets at once, kept if all pairs are apart."""
    kept = []
    while sum(map(len, kept)) < wanted:
        points = rng.random((batch, targets, 2), dtype=np.float32) - np.float32(0.5)
        for first, second in itertools.combinations(range(targets), 2):
            offset = points[:, first] - points[:, second]
            points = points[(offset**2).sum(axis=1) >= SEPARATION_PX**2]
        kept.append(points)
    return np.concatenate(kept)[:wanted].astype(np.float64)


def redraw_the_last(wanted, targets, rng):
    """The faster and wrong way: only a target in conflict is drawn again."""
    points = rng.random((wanted, 1, 2)) - 0.5
    for _ in range(targets - 1):
        new = rng.random((wanted, 2)) - 0.5
        while True:
            apart = ((points - new[:, None]) ** 2).sum(axis=-1) >= SEPARATION_PX**2
            conflict = ~apart.all(axis=1)
            if not conflict.any():
                break
            new[conflict] = rng.random((conflict.sum(), 2)) - 0.5
        points = np.concatenate([points, new[:, None]], axis=1)
    return points


def statistics(points):
    """Figures of arrangements (N, K, 2), one value an arrangement so that all are independent."""
    targets = points.shape[1]
    pairs = list(itertools.combinations(range(targets), 2))
    offset = np.stack([points[:, a] - points[:, b] for a, b in pairs], axis=1)
    distance = np.hypot(offset[..., 0], offset[..., 1])
    return {
        "x of the first": points[:, 0, 0],
        "y of the last": points[:, -1, 1],
        "radius of the first": np.hypot(*points[:, 0].T),
        "radius of the last": np.hypot(*points[:, -1].T),
        "first to second": distance[:, 0],
        "first to last": distance[:, pairs.index((0, targets - 1))],
        "closest pair": distance.min(axis=1),
        "widest pair": distance.max(axis=1),
        "sum of distances": distance.sum(axis=1),
    }


def smallest_p(first, second):
    """Of all Kolmogorov–Smirnov tests between two sets of arrangements."""
    theirs = statistics(second)
    return min(ks_2samp(mine, theirs[name]).pvalue for name, mine in statistics(first).items())


def test_three_targets_have_the_distribution_of_joint_rejection():
    found = draw_arrangements(20_000, 3, 0.5, SEPARATION_PX, NumpyRandom(5))
    assert smallest_p(found, joint_rejection(20_000, 3, np.random.default_rng(6))) > 1e-4


def test_five_targets_have_the_distribution_of_joint_rejection():
    wanted = joint_rejection(500, 5, np.random.default_rng(6))
    found = draw_arrangements(2000, 5, 0.5, SEPARATION_PX, NumpyRandom(5))
    assert smallest_p(found, wanted) > 1e-4


def test_redrawing_only_the_last_target_would_be_noticed():
    wrong = redraw_the_last(20_000, 3, np.random.default_rng(5))
    assert smallest_p(wrong, joint_rejection(20_000, 3, np.random.default_rng(6))) < 1e-12


def test_five_targets_are_as_rare_as_is_said():
    rng = np.random.default_rng(1)
    points = rng.random((1_000_000, 5, 2), dtype=np.float32)
    for first, second in itertools.combinations(range(5), 2):
        offset = points[:, first] - points[:, second]
        points = points[(offset**2).sum(axis=1) >= SEPARATION_PX**2]
    assert binomtest(len(points), 1_000_000, 1 / 7000).pvalue > 1e-3


def test_torch_draws_the_same_distribution():
    found = draw_arrangements(4000, 3, 0.5, SEPARATION_PX, TorchRandom(3))
    assert isinstance(found, torch.Tensor) and found.shape == (4000, 3, 2)
    wanted = draw_arrangements(4000, 3, 0.5, SEPARATION_PX, NumpyRandom(5))
    assert smallest_p(found.double().numpy(), wanted) > 1e-4
