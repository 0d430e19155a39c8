"""PSNR and SSIM of maps: by hand, by the formula of the paper in plain loops, and properties."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

from trainer.errors import TrainerError
from trainer.map_quality import IDENTICAL_DB, psnr_db, ssim

EXAMPLES = settings(max_examples=50, deadline=None, derandomize=True)
seeds = st.integers(0, 2**32 - 1)


def random_maps(rng, number=4, shape=(14, 13)):
    """Few targets on dark maps in whole grey levels, and the same with noise around them."""
    truth = np.where(rng.random((number, *shape)) < 0.05, rng.integers(1, 256, shape), 0)
    noisy = np.clip(truth + rng.integers(-20, 21, truth.shape), 0, 255)
    return noisy / 255.0, truth / 255.0


def ssim_by_definition(map_HW, truth_HW):
    """Wang et al. 2004, equations 13 to 17, one window after another."""
    a_HW, b_HW = np.rint(255.0 * map_HW), np.rint(255.0 * truth_HW)
    offset = np.arange(-5, 6)
    weight = np.exp(-(offset[:, None] ** 2 + offset**2) / (2 * 1.5**2))
    weight /= weight.sum()
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    values = []
    for row in range(a_HW.shape[0] - 10):
        for column in range(a_HW.shape[1] - 10):
            a, b = (x[row : row + 11, column : column + 11] for x in (a_HW, b_HW))
            mean_a, mean_b = (weight * a).sum(), (weight * b).sum()
            variance_a = (weight * (a - mean_a) ** 2).sum()
            variance_b = (weight * (b - mean_b) ** 2).sum()
            covariance = (weight * (a - mean_a) * (b - mean_b)).sum()
            luminance = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
            structure = (2 * covariance + c2) / (variance_a + variance_b + c2)
            values.append(luminance * structure)
    return np.mean(values)


def test_ssim_is_that_of_the_definition(rng):
    maps, truths = random_maps(rng)
    wanted = [ssim_by_definition(*pair) for pair in zip(maps, truths, strict=True)]
    assert_allclose(ssim(maps, truths), wanted, rtol=1e-12)
    assert min(wanted) > 0.0 and max(wanted) < 0.95


def test_ssim_of_flat_maps_is_that_of_their_levels():
    dark, bright = np.full((1, 11, 11), 51 / 255), np.full((1, 11, 11), 102 / 255)
    wanted = (2 * 51 * 102 + 2.55**2) / (51**2 + 102**2 + 2.55**2)
    assert ssim(dark, bright) == pytest.approx(wanted)


def test_psnr_by_hand():
    truth = np.zeros((3, 4, 5))
    maps = truth.copy()
    maps[0, 0, 0] = 1.0  # mean square 255²/20
    maps[1] = 51 / 255  # everywhere a fifth of full scale
    maps[2, 1, :2] = 30 / 255, 40 / 255  # mean square (900 + 1600)/20 = 125
    wanted = [10 * np.log10(20), 10 * np.log10(25), 10 * np.log10(255**2 / 125)]
    assert_allclose(psnr_db(maps, truth), wanted, rtol=1e-12)


def test_maps_are_compared_as_eight_bit_images():
    truth = np.full((4, 11, 11), 100 / 255)
    truth[3] = 1.0
    levels = np.array([100.4, 99.6, 100.6, 400.0])
    maps = np.broadcast_to((levels / 255)[:, None, None], truth.shape)
    assert_allclose(psnr_db(maps, truth), [100.0, 100.0, 20 * np.log10(255), 100.0])
    assert_array_equal(ssim(maps, truth) == 1.0, [True, True, False, True])
    assert_array_equal(psnr_db(-maps, np.zeros_like(maps)), 100.0)


def test_float32_maps_are_compared_like_float64(rng):
    maps, truths = random_maps(rng)
    single = maps.astype(np.float32), truths.astype(np.float32)
    assert_array_equal(psnr_db(*single), psnr_db(maps, truths))
    assert_array_equal(ssim(*single), ssim(maps, truths))


@EXAMPLES
@given(seed=seeds)
def test_bounds_symmetry_and_identity(seed):
    maps, truths = random_maps(np.random.default_rng(seed))
    inverse = 1.0 - truths
    for other in (maps, inverse):
        ratio_db, similarity = psnr_db(other, truths), ssim(other, truths)
        assert ((ratio_db >= 0.0) & (ratio_db < IDENTICAL_DB)).all()
        assert ((similarity >= -1.0) & (similarity < 1.0)).all()
        assert_array_equal(psnr_db(truths, other), ratio_db)
        assert_allclose(ssim(truths, other), similarity, rtol=1e-12)
    assert_array_equal(psnr_db(maps, maps), IDENTICAL_DB)
    assert_array_equal(ssim(maps, maps), 1.0)


def test_every_map_is_compared_with_its_own_truth_alone(rng, monkeypatch):
    monkeypatch.setattr("trainer.map_quality._MAPS_AT_ONCE", 3)
    maps, truths = random_maps(rng, 8)
    order = rng.permutation(8)
    for figure in (psnr_db, ssim):
        whole = figure(maps, truths)
        assert len(set(whole)) == 8
        assert_array_equal(figure(maps[order], truths[order]), whole[order])
        assert_array_equal(figure(maps[5:6], truths[5:6]), whole[5:6])


def test_more_noise_is_less_alike(rng):
    _, truth = random_maps(rng, 1, (33, 33))
    noise = rng.normal(size=truth.shape)
    noisy = np.concatenate([truth + level * noise for level in (0.01, 0.03, 0.1, 0.3)])
    truths = np.repeat(truth, 4, axis=0)
    assert (np.diff(psnr_db(noisy, truths)) < 0.0).all()
    assert (np.diff(ssim(noisy, truths)) < 0.0).all()


def test_maps_smaller_than_the_window_have_no_ssim():
    small = np.zeros((2, 11, 10))
    assert np.isnan(ssim(small, small)).all()
    assert_array_equal(psnr_db(small, small), IDENTICAL_DB)


@pytest.mark.parametrize("figure", [psnr_db, ssim])
def test_no_maps_have_no_figures_and_senseless_ones_are_refused(figure):
    maps = np.zeros((2, 12, 12))
    assert figure(maps[:0], maps[:0]).shape == (0,)
    with pytest.raises(ValueError, match=r"\(2, 12, 12\) but true maps \(1, 12, 12\)"):
        figure(maps, maps[:1])
    with pytest.raises(ValueError, match=r"\(12, 12\)"):
        figure(maps[0], maps[0])
    with pytest.raises(TrainerError, match="not finite"):
        figure(maps / np.inf + np.where(np.arange(12) == 3, np.nan, 0.0), maps)
