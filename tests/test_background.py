"""The plane under a blob, in spite of the blob and its neighbours."""

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose

from pipeline.physics.arrays import NumpyRandom
from pipeline.physics.background import plane_background
from pipeline.physics.measurement import measure
from pipeline.physics.plane_fit import fit_plane
from pipeline.physics.psf import render
from pipeline.physics.sensor import Sensor

Y, X = np.mgrid[:11, :11].astype(float)
PLANE = 1000.0 + 7.0 * X - 4.0 * Y
CENTRE_XY_PX = np.array([[5.2, 4.9]])
USABLE = np.ones((1, 11, 11), dtype=bool)


def fit_planes(counts, centre, usable):
    """`fit_plane`, which is compiled, of a batch."""
    plane, rms, weight = np.empty(counts.shape), np.empty(len(counts)), np.empty((11, 11), bool)
    for b, (x_px, y_px) in enumerate(centre):
        rms[b] = fit_plane(counts[b], x_px, y_px, usable[b], weight, plane[b])
    return plane, rms


@pytest.fixture(params=[plane_background, fit_planes])
def fit(request):
    """The definition, and the same compiled."""
    return request.param


def patch(neighbours_xy_px=(), intensity=3000.0):
    """The plane under a bright group at the centre, and neighbours beyond the guard."""
    xy_px = np.array([CENTRE_XY_PX[0], [4.6, 5.3], *neighbours_xy_px])
    bright = np.array([30000.0, 20000.0, *[intensity] * len(neighbours_xy_px)])
    return (PLANE + render(xy_px, bright, (11, 11), 0.5))[None]


def test_tilted_plane_under_a_bright_group_is_recovered(fit):
    plane, rms = fit(patch(), CENTRE_XY_PX, USABLE)
    assert_allclose(plane[0], PLANE, atol=1e-3)
    assert rms[0] < 1e-3


@pytest.mark.parametrize("neighbour", [[9.5, 5.0], [1.0, 9.0], [5.0, 0.0]])
def test_a_neighbour_does_not_pull_the_plane(fit, neighbour):
    plane, rms = fit(patch([neighbour]), CENTRE_XY_PX, USABLE)
    assert_allclose(plane[0], PLANE, atol=0.05)
    assert rms[0] < 0.05


def test_neighbours_bias_the_plane_by_less_than_a_fifth_of_the_noise(fit):
    sensor = Sensor(sigma_px=0.5, full_scale=65535, read_noise=6.0)
    clean = np.repeat(patch([[9.3, 1.6], [0.7, 8.2]]), 400, axis=0)
    counts = measure(clean, sensor, NumpyRandom(3))
    centre = np.repeat(CENTRE_XY_PX, 400, axis=0)
    usable = np.repeat(USABLE, 400, axis=0)
    plane, rms = fit(counts, centre, usable)
    error = (plane - PLANE)[:, 5, 5]
    assert abs(error.mean()) < 1.2
    assert error.std() < 1.5  # 6 counts over some 60 pixels, and their slope
    assert_allclose(np.median(rms), 6.0, rtol=0.2)


def test_bad_pixels_take_no_part(fit):
    counts, usable = patch(), USABLE.copy()
    counts[0, 0, :4] = 16383.0
    usable[0, 0, :4] = False
    plane, _ = fit(counts, CENTRE_XY_PX, usable)
    assert_allclose(plane[0], PLANE, atol=1e-3)


def test_a_patch_with_few_pixels_outside_gets_the_mean(fit):
    usable = np.zeros((1, 11, 11), dtype=bool)
    usable[0, 4:6, 4:6] = True
    counts = np.where(usable, 500.0, 9999.0)
    plane, _ = fit(counts, CENTRE_XY_PX, usable)
    assert_allclose(plane, 500.0, atol=1e-2)


def test_no_usable_pixel_gives_a_finite_plane(fit):
    plane, rms = fit(patch(), CENTRE_XY_PX, np.zeros_like(USABLE))
    assert np.isfinite(plane).all() and np.isfinite(rms).all()


def test_a_constant_patch_is_its_own_background(fit):
    plane, rms = fit(np.full((1, 11, 11), 77.0), CENTRE_XY_PX, USABLE)
    assert_allclose(plane, 77.0, atol=1e-4)
    assert_allclose(rms, 0.0, atol=1e-4)


def test_patches_of_a_batch_are_independent(fit):
    both = np.concatenate([patch(), patch([[9.5, 5.0]])])
    twice = np.repeat(CENTRE_XY_PX, 2, axis=0)
    plane, rms = fit(both, twice, np.repeat(USABLE, 2, axis=0))
    for row in range(2):
        alone, alone_rms = fit(both[row : row + 1], CENTRE_XY_PX, USABLE)
        assert_allclose(plane[row], alone[0], rtol=1e-9)
        assert_allclose(rms[row], alone_rms[0], rtol=1e-6, atol=1e-9)


def test_compiled_it_is_the_same_plane(rng):
    counts = rng.normal(1000.0, 6.0, (300, 11, 11))
    counts[np.arange(300), *rng.integers(0, 11, (2, 300))] += 5000.0  # some about the blob
    usable = rng.random((300, 11, 11)) > rng.random((300, 1, 1))  # few to nearly all
    centre = rng.uniform(0.0, 10.0, (300, 2))
    for found, wanted in zip(
        fit_planes(counts, centre, usable), plane_background(counts, centre, usable), strict=True
    ):
        assert_allclose(found, wanted, rtol=1e-7, atol=1e-6)


def test_torch_gives_the_same_plane():
    counts = patch([[9.5, 5.0]])
    wanted, rms = plane_background(counts, CENTRE_XY_PX, USABLE)
    found, found_rms = plane_background(
        torch.tensor(counts), torch.tensor(CENTRE_XY_PX), torch.tensor(USABLE)
    )
    assert_allclose(found.numpy(), wanted, rtol=1e-7)
    assert_allclose(found_rms.numpy(), rms, rtol=1e-4)
