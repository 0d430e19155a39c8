"""The sub-pixel grid: cells, the sampling matrix Φ, maps and the peaks read off them."""

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose

from pipeline.physics.grid import (
    cell_centres_px,
    cell_index,
    grid_detections,
    local_maxima,
    sampling_matrix,
    target_map,
)
from pipeline.physics.psf import render

DIVISIONS = (3, 5, 7)


@pytest.mark.parametrize("c", DIVISIONS)
def test_cell_centres(c):
    centres = cell_centres_px(11, c)
    assert centres.shape == (11 * c,)
    assert_allclose(centres, [(i - (c - 1) / 2) / c for i in range(11 * c)])
    assert_allclose(centres[(c - 1) // 2 :: c], np.arange(11), atol=1e-15)  # pixels' own centres
    assert_allclose([centres[0], centres[-1]], [-0.5 + 0.5 / c, 10.5 - 0.5 / c])


@pytest.mark.parametrize("c", DIVISIONS)
def test_positions_find_their_cell(c):
    centres = cell_centres_px(11, c)
    for offset in (-0.499, 0.0, 0.499):
        assert_allclose(cell_index(centres + offset / c, c), np.arange(11 * c), atol=0)


@pytest.mark.parametrize("c", DIVISIONS)
def test_sampling_matrix_is_the_renderer(c):
    phi = sampling_matrix(11, c, 0.5)
    assert phi.shape == (121, (11 * c) ** 2)
    rng = np.random.default_rng(c)
    row, column = rng.integers(0, 11 * c, (2, 4))
    intensity = rng.uniform(100.0, 300.0, 4)
    cells = np.zeros((11 * c, 11 * c))
    np.add.at(cells, (row, column), intensity)
    centres = cell_centres_px(11, c)
    xy_px = np.stack([centres[column], centres[row]], axis=1)
    wanted = render(xy_px, intensity, (11, 11), 0.5)
    assert_allclose((phi @ cells.ravel()).reshape(11, 11), wanted, atol=1e-10)


@pytest.mark.parametrize("c", DIVISIONS)
def test_target_map_puts_intensity_where_the_truth_is(c):
    rng = np.random.default_rng(c)
    xy_px = rng.uniform(-0.5, 10.5, (8, 5, 2))
    intensity = rng.uniform(200.0, 250.0, (8, 5))
    intensity[:, 3:] = 0.0  # padding
    maps = target_map(xy_px, intensity, 11, c)
    wanted = np.zeros_like(maps)
    for image in range(8):
        for (x, y), g in zip(xy_px[image], intensity[image], strict=True):
            column = np.abs(cell_centres_px(11, c) - x).argmin()
            row = np.abs(cell_centres_px(11, c) - y).argmin()
            wanted[image, row, column] += g
    assert_allclose(maps, wanted)
    found = target_map(torch.tensor(xy_px), torch.tensor(intensity), 11, c)
    assert_allclose(found.numpy(), maps)


def test_targets_outside_go_to_the_nearest_cell():
    maps = target_map(np.array([[[-3.0, 4.0], [12.0, 20.0]]]), np.array([[5.0, 7.0]]), 11, 3)
    assert maps[0, 13, 0] == 5.0
    assert maps[0, 32, 32] == 7.0
    assert maps.sum() == 12.0


def test_grid_detections_are_all_cells_at_the_threshold():
    maps = np.zeros((2, 33, 33))
    maps[0, 4, 10] = 50.0
    maps[1, 13, 13] = 49.9
    maps[1, 32, 0] = 80.0
    found = grid_detections(maps, 3, 50.0)
    assert found.image.tolist() == [0, 1]
    assert_allclose(found.xy_px, [[3.0, 1.0], [-1 / 3, 10 + 1 / 3]], atol=1e-12)
    assert found.value.tolist() == found.intensity.tolist() == [50.0, 80.0]


# --- local maxima --------------------------------------------------------------------------------


def peaks_of(cells, threshold=30.0, separate=0.7, c=3):
    maps = np.zeros((1, 33, 33))
    for (row, column), value in cells.items():
        maps[0, row, column] = value
    return local_maxima(maps, c, threshold, separate=separate)


def test_one_target_over_two_cells_is_one_peak_between_them():
    found = peaks_of({(13, 13): 150.0, (13, 14): 90.0})
    assert_allclose(found.intensity, [240.0])
    assert found.value.tolist() == [150.0]
    centres = cell_centres_px(11, 3)
    assert_allclose(found.xy_px, [[(150 * centres[13] + 90 * centres[14]) / 240, centres[13]]])
    assert centres[13] < found.xy_px[0, 0] < centres[14]


def test_two_equal_neighbours_are_two_peaks():
    found = peaks_of({(13, 13): 120.0, (13, 14): 120.0})
    assert_allclose(found.intensity, [120.0, 120.0])
    assert_allclose(found.xy_px, cell_centres_px(11, 3)[[[13, 13], [14, 13]]])


def test_separate_decides_when_a_neighbour_is_its_own_target():
    cells = {(13, 13): 120.0, (14, 14): 90.0}
    assert len(peaks_of(cells, separate=0.74).value) == 2
    assert len(peaks_of(cells, separate=0.76).value) == 1


def test_what_lies_between_two_peaks_is_shared_in_proportion():
    found = peaks_of({(13, 13): 200.0, (13, 14): 60.0, (13, 15): 100.0})
    assert_allclose(found.intensity, [240.0, 120.0])
    centres = cell_centres_px(11, 3)
    assert_allclose(found.xy_px[0, 0], (200 * centres[13] + 40 * centres[14]) / 240)
    assert_allclose(found.xy_px[1, 0], (100 * centres[15] + 20 * centres[14]) / 120)


def test_threshold_applies_to_the_cell_and_negative_cells_count_as_zero():
    found = peaks_of({(5, 5): 29.9, (20, 20): 30.0, (20, 21): -12.0})
    assert_allclose(found.xy_px, cell_centres_px(11, 3)[[[20, 20]]])
    assert_allclose(found.intensity, [30.0])
    assert len(local_maxima(np.zeros((3, 33, 33)), 3, 0.0, separate=0.7).value) == 0


@pytest.mark.parametrize("c", DIVISIONS)
def test_intensity_is_conserved_where_every_cell_touches_a_peak(c):
    rng = np.random.default_rng(c)
    maps = rng.uniform(0.0, 60.0, (20, 11 * c, 11 * c))
    maps[:, 1::3, 1::3] += 140.0  # each block of 3 × 3 cells has its peak in the middle
    whole = 3 * (11 * c // 3)
    maps[:, whole:] = maps[:, :, whole:] = 0.0
    found = local_maxima(maps, c, 50.0, separate=0.7)
    gathered = np.bincount(found.image, weights=found.intensity, minlength=20)
    assert_allclose(gathered, maps.sum(axis=(1, 2)), rtol=1e-12)


def test_a_peak_never_leaves_the_cells_around_it():
    rng = np.random.default_rng(0)
    maps = rng.exponential(40.0, (40, 33, 33))
    found = local_maxima(maps, 3, 50.0, separate=0.7)
    assert len(found.value) > 1000
    nearest = np.rint(found.xy_px * 3 + 1).astype(int)
    for image, (column, row), value in zip(found.image, nearest, found.value, strict=True):
        around = maps[
            image,
            max(row - 1, 0) : row + 2,
            max(column - 1, 0) : column + 2,
        ]
        assert value in around
