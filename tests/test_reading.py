"""From maps to detections: cells of a grid, and targets that cells off the grid speak of."""

import numpy as np
import pytest
from cell_maps import cell_map
from numpy.testing import assert_allclose, assert_array_equal
from scipy.stats import norm

from pipeline.physics.cell_targets import SPEAKING, count_at_least, read_cell_targets
from pipeline.physics.finite import all_finite
from pipeline.physics.score import expected_hits
from pipeline.stages.unmix import strongest
from trainer.reading import Reading, detections, read_maps

SPREAD = (0.04, 0.1)
CELLS = Reading("cell-targets", 3, 0.5)
UNITS = np.array([100.0, 1.0, 200.0])


def said(batch=1, cells=33):
    """Maps in which no cell speaks of a target; every cell points at pixel (0, 0)."""
    maps = np.zeros((batch, 7, cells, cells), np.float32)
    maps[:, 4:] = 0.01
    return maps


def read(maps):
    return read_cell_targets(cell_map(maps), 3, 0.5, SPREAD)


def say(maps, image, cell, p, x, y, intensity=1.0, sigma=0.02):
    maps[image, :, cell[0], cell[1]] = [p, x, y, intensity, sigma, sigma, 0.05]


def test_cells_of_a_grid_are_detections_in_pixels_and_counts():
    maps = np.zeros((3, 33, 33), np.float32)
    maps[0, 3, 7] = 0.5  # row 3 = pixel 1, first cell; column 7 = pixel 2, middle cell
    maps[2, 0, 0] = 0.19
    maps[2, 32, 32] = 1.0
    rows = detections(read_maps(maps, UNITS, Reading("intensity-map", 3, 0.5, threshold=0.2)), 3)
    assert_allclose(rows[0], [[2.0, 1.0 - 1 / 3, 50.0, *[np.nan] * 3, 50.0]])
    assert rows[1].shape == (0, 7)
    assert_allclose(rows[2], [[10 + 1 / 3, 10 + 1 / 3, 200.0, *[np.nan] * 3, 200.0]])


def test_a_sure_cell_is_a_target_where_it_says():
    maps = said(3)
    say(maps, 0, (16, 16), 0.99, 5.03, 4.97, intensity=0.9)
    say(maps, 2, (16, 13), 0.98, 4.1, 5.2)
    say(maps, 2, (16, 16), 0.97, 5.1, 5.2)
    found = read(maps)
    assert_array_equal(found.image, [0, 2, 2])
    assert_allclose(found.xy_px, [[5.03, 4.97], [4.1, 5.2], [5.1, 5.2]], atol=1e-6)
    assert_allclose(found.p_exist, [0.99, 0.98, 0.97], atol=1e-6)
    assert (found.p_count > 0.98).all()
    assert_allclose(found.cov_px2, [[0.02**2, 0, 0.02**2]] * 3, rtol=1e-5, atol=1e-12)
    assert_allclose(found.intensity_sigma, 0.05, rtol=1e-6)
    wider = read_cell_targets(cell_map(maps), 3, 0.5, SPREAD, 1.5)
    assert_allclose(wider.cov_px2, 1.5 * found.cov_px2)
    assert_array_equal(wider.intensity_sigma, found.intensity_sigma)
    rows = detections(read_maps(cell_map(maps), UNITS, CELLS), 3)
    assert [len(part) for part in rows] == [1, 0, 2]
    assert rows[0][0, 6] == pytest.approx(90.0) and rows[2][0, 6] == pytest.approx(200.0)


def test_a_target_between_cells_is_one_target_with_their_spread():
    maps = said()
    say(maps, 0, (16, 16), 0.6, 5.10, 5.0, intensity=1.0, sigma=0.03)
    say(maps, 0, (16, 17), 0.4, 5.20, 5.0, intensity=0.8, sigma=0.03)
    found = read(maps)
    assert_allclose(found.xy_px, [[5.14, 5.0]], atol=1e-6)
    assert_allclose(found.intensity, [0.92], rtol=1e-5)
    assert_allclose(found.p_exist, [1.0], rtol=1e-5)
    assert found.p_count[0] > 0.95
    across = 0.6 * 0.04**2 + 0.4 * 0.06**2
    assert_allclose(found.cov_px2, [[0.03**2 + across, 0, 0.03**2]], rtol=1e-4, atol=1e-9)


def test_two_targets_share_the_cell_between_them():
    maps = said()
    say(maps, 0, (16, 15), 0.7, 4.80, 5.0)
    say(maps, 0, (16, 16), 0.6, 5.00, 5.0)
    say(maps, 0, (16, 18), 0.7, 5.25, 5.0)
    found = read(maps)
    assert len(found.image) == 2 and (found.p_count > 0.9).all()
    assert_allclose(np.sort(found.p_exist), [1.0, 1.0], atol=1e-6)
    assert found.xy_px[:, 0].min() < 4.9 and found.xy_px[:, 0].max() > 5.1


@pytest.mark.parametrize(("p", "number"), [(0.45, 0), (0.55, 1)])
def test_as_many_targets_as_the_probabilities_add_up_to(p, number):
    maps = said()
    say(maps, 0, (10, 10), p, 3.0, 3.0)
    found = read(maps)
    assert (found.p_count >= 0.5).sum() == number
    assert_allclose(found.p_exist, p, rtol=1e-6)
    assert_allclose(found.p_count, count_at_least(np.array([[p]]), 1, SPREAD)[0])


def test_a_target_that_may_be_there_is_read_as_unlikely():
    maps = said(2)
    for image, p in ((0, 0.3), (1, 0.001)):
        say(maps, image, (10, 10), 1.0, 3.0, 3.0)
        say(maps, image, (20, 20), p, 6.5, 6.5)
    found = read(maps)
    assert_array_equal(found.image, [0, 0, 1])
    assert_allclose(found.xy_px[1], 6.5, atol=1e-6)
    assert 0.02 < found.p_count[1] < 0.5
    assert [len(part) for part in detections(read_maps(cell_map(maps), UNITS, CELLS), 2)] == [1, 1]


def test_the_count_is_normal_about_the_sum_of_the_probabilities():
    p = np.array([[1.0, 0.5, 0.0], [1.0, 1.0, 1.0]])
    found = count_at_least(p, 4, (0.04, 0.84))
    assert_allclose(found[0], norm.sf([0.5, 1.5, 2.5, 3.5], loc=1.5, scale=0.5))
    assert_allclose(found[1], norm.sf([0.5, 1.5, 2.5, 3.5], loc=3.0, scale=0.2))


def test_senseless_maps_give_a_bounded_number_of_targets():
    maps = said(2)
    maps[1, 0] = 1.0
    found = read(maps)
    assert len(found.image) == SPEAKING and set(found.image) == {1}
    assert np.isfinite(found.xy_px).all()
    assert len(read(maps[:0]).image) == 0


def test_of_many_targets_the_surest_are_read(rng):
    maps = said(4)
    maps[:, 0] = rng.random((4, 33, 33)) ** 100
    maps[:, 1:3] = rng.uniform(0.0, 10.0, (4, 2, 33, 33))
    whole, few = read(maps), read_cell_targets(cell_map(maps), 3, 0.5, SPREAD, most=3)
    assert np.bincount(whole.image).min() > 3
    for found, wanted in zip(few, strongest(whole, 3), strict=True):
        assert_array_equal(found, wanted)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_one_value_that_is_no_number_is_seen(value):
    maps = np.zeros((3, 63, 11, 11), np.float32)
    assert all_finite(maps) and all_finite(maps[:0])
    maps[2, 61, 10, 9] = value
    assert not all_finite(maps)


def test_patches_do_not_mix(rng):
    maps = said(6)
    maps[:, 0] = rng.random((6, 33, 33)) ** 200
    maps[:, 1:3] = rng.uniform(4.0, 6.0, (6, 2, 33, 33))
    whole = read(maps)
    for image in range(6):
        alone, here = read(maps[image : image + 1]), whole.image == image
        assert_allclose(whole.xy_px[here], alone.xy_px)
        assert_allclose(whole.p_exist[here], alone.p_exist)


def plainly(cells, number, reach_px):
    """Figures (…, 9) of the targets of one patch's cells (7, M), one array operation at a time."""
    left, targets = np.clip(cells[0], 0.0, 1.0), []
    for _ in range(number):
        away = np.hypot(*(cells[1:3] - cells[1:3, left.argmax(), None]))
        order = np.argsort(away, kind="stable")
        near = np.where(away <= reach_px, left, 0.0)[order]
        weight = np.zeros_like(left)
        weight[order] = np.minimum(near, np.clip(1.0 - (np.cumsum(near) - near), 0.0, None))
        left = left - weight
        if weight.sum() > 0.01:
            x, y, intensity = means = [np.average(cells[k], weights=weight) for k in (1, 2, 3)]
            dx, dy, di = (cells[k] - mean for k, mean in enumerate(means, start=1))
            squares = cells[4] ** 2 + dx**2, dx * dy, cells[5] ** 2 + dy**2, cells[6] ** 2 + di**2
            xx, xy, yy, ii = (np.average(square, weights=weight) for square in squares)
            targets.append([x, y, intensity, weight.sum(), xx, xy, yy, np.sqrt(ii)])
    return np.array(targets)


@pytest.mark.parametrize("exponent", [1, 100, 400])
def test_compiled_it_reads_what_is_read_step_by_step(rng, exponent):
    maps = said(20)
    maps[:, 0] = rng.random((20, 33, 33)) ** exponent
    maps[:, 1:3] = np.stack(np.meshgrid(*[np.arange(33) / 3 - 1 / 3] * 2))
    maps[:, 1:3] += rng.normal(0.0, 0.1, (20, 2, 33, 33))
    maps[:, 3:] = rng.uniform(0.02, 0.2, (20, 4, 33, 33))
    found = read(maps)
    for image, cells in enumerate(maps.reshape(20, 7, -1).astype(np.float64)):
        more = count_at_least(cells[None, 0], SPEAKING, SPREAD)[0]
        number = min((more >= 0.5).sum() + 1, (more >= 0.02).sum())
        loudest = np.argsort(-cells[0], kind="stable")[:SPEAKING]
        here = found.take(np.flatnonzero(found.image == image))
        columns = here.xy_px, here.intensity, here.p_exist, here.cov_px2, here.intensity_sigma
        assert_allclose(
            np.column_stack(columns),
            plainly(cells[:, loudest], number, 0.3),
            rtol=1e-5,  # maps are in single precision
            atol=1e-9,
        )


def test_expected_hits_are_those_of_gaussian_errors(rng):
    error = rng.normal(0.0, 0.1, (200_000, 2))
    distance = np.hypot(*error.T)
    share = np.mean([np.mean(distance <= t) for t in (0.05, 0.10, 0.15, 0.20, 0.25)])
    assert_allclose(expected_hits(np.array([0.01, 0.0])), [share, 1.0], atol=3e-3)
