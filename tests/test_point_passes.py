"""The compiled passes of the frame path against OpenCV and NumPy, which define them."""

import cv2
import numpy as np
import pytest

from pipeline.imaging.bad_pixels import Repair
from pipeline.imaging.noise_blocks import BLOCK_SAMPLES, block_samples
from pipeline.imaging.point_filter import PointFilter
from pipeline.imaging.point_passes import divide_by_noise, filter_residual
from pipeline.imaging.regions import Regions, find_regions, merge
from pipeline.physics.sensor import Sensor

SHAPES = [(11, 11), (12, 37), (64, 50), (128, 160)]


def frame(shape, dtype, seed=0):
    values = np.random.default_rng(seed).normal(120.0, 30.0, shape)
    return np.clip(values, 0, 255).astype(dtype)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
@pytest.mark.parametrize("taps", [3, 5, 7, 13])
def test_a_residual_is_filtered_as_opencv_does(shape, dtype, taps):
    image_HW = frame(shape, dtype)
    image_HW.flags.writeable = False
    coarse = frame((5, 4), np.float32, seed=1)
    half = np.random.default_rng(2).uniform(0.1, 1.0, taps // 2 + 1).astype(np.float32)
    kernel = np.concatenate([half[:0:-1], half])
    widened = cv2.resize(coarse, (shape[1], len(coarse)))
    residual_HW, filtered_HW = filter_residual(image_HW, widened, kernel)

    background_HW = cv2.resize(coarse, shape[::-1])
    wanted_HW = cv2.subtract(image_HW, background_HW, dtype=cv2.CV_32F)
    np.testing.assert_allclose(residual_HW, wanted_HW, atol=1e-4)
    wanted_HW = cv2.sepFilter2D(wanted_HW, cv2.CV_32F, kernel, kernel)
    np.testing.assert_allclose(filtered_HW, wanted_HW, atol=1e-5 * np.abs(wanted_HW).max())


@pytest.mark.parametrize("shape", SHAPES)
def test_noise_lies_over_the_frame_as_opencv_resizes_it(shape):
    image_HW = frame(shape, np.float32)
    noise = frame((3, shape[1]), np.float32, seed=3) + 10.0
    divided_HW = image_HW.copy()
    sigma_HW = divide_by_noise(divided_HW, noise)
    np.testing.assert_allclose(sigma_HW, cv2.resize(noise, shape[::-1]), rtol=1e-6)
    np.testing.assert_allclose(divided_HW, image_HW / sigma_HW, rtol=1e-6)


@pytest.mark.parametrize("sigma_px", [0.5, 1.1, 2.0])
def test_the_statistic_in_one_go_is_that_of_its_steps(sigma_px):
    point_filter = PointFilter(Sensor(sigma_px=sigma_px, full_scale=16383))
    clean_HW = frame((128, 160), np.uint16)
    background = point_filter.background(clean_HW)
    residual_HW, snr_HW = point_filter.over(background, clean_HW)
    filtered_HW = point_filter(residual_HW)
    np.testing.assert_allclose(snr_HW, filtered_HW, atol=1e-3)
    sigma_HW = point_filter.in_sigmas(snr_HW, background, 32)
    wanted_HW = point_filter.sigma(filtered_HW, background, 32)
    np.testing.assert_allclose(sigma_HW, wanted_HW, rtol=1e-5)
    np.testing.assert_allclose(snr_HW, filtered_HW / wanted_HW, atol=1e-4)


@pytest.mark.parametrize("shape", [(64, 96), (70, 101)])
def test_a_blocks_samples_are_pixels_of_it_evenly_spaced(shape):
    y, x = np.mgrid[: shape[0], : shape[1]].astype(np.float32)
    rows, columns = (block_samples(image, 32) for image in (y, x))
    assert rows.shape == (2, 3, BLOCK_SAMPLES**2)
    for block in range(2):
        low, high = block * shape[0] / 2, (block + 1) * shape[0] / 2
        assert (rows[block] >= np.floor(low)).all() and (rows[block] < high).all()
        assert len(np.unique(rows[block])) == BLOCK_SAMPLES
    for block in range(3):
        low, high = block * shape[1] / 3, (block + 1) * shape[1] / 3
        assert (columns[:, block] >= np.floor(low)).all() and (columns[:, block] < high).all()


def test_bright_pixels_are_found_wherever_they_are():
    snr_HW = np.zeros((33, 67), np.float32)
    places = [(0, 0), (66, 0), (0, 32), (66, 32), (31, 17), (64, 5), (63, 9)]
    for x, y in places:
        snr_HW[y, x] = 5.0
    found = find_regions(snr_HW, 4.5)
    assert sorted(map(tuple, found.peak_xy.tolist())) == sorted(places)
    assert len(find_regions(snr_HW, 5.0).snr) == 0


def regions(boxes, snr):
    box = np.array(boxes, np.int64)
    middle = 0.5 * (box[:, :2] + box[:, 2:] - 1)
    return Regions(middle.astype(np.int64), np.array(snr, np.float32), box, middle)


def test_regions_of_one_window_are_joined_and_its_middle_is_their_mean():
    near = regions([[10, 10, 13, 13], [14, 11, 17, 14], [40, 40, 43, 43]], [30.0, 10.0, 8.0])
    joined, members = merge(near, 0)
    assert members.tolist() == [2, 1]
    assert joined.bbox_px.tolist() == [[10, 10, 17, 14], [40, 40, 43, 43]]
    np.testing.assert_allclose(joined.xy_px[0], [(30 * 11 + 10 * 15) / 40, (30 * 11 + 120) / 40])
    assert joined.snr.tolist() == [30.0, 8.0]


def test_a_joined_window_covers_the_box_and_never_more_than_one():
    chain = regions([[x, 10, x + 3, 13] for x in (10, 17, 24)], [9.0, 8.0, 7.0])
    joined, members = merge(chain, 0)
    assert members.tolist() == [2, 1]  # the third would make it wider than a window
    low, high = joined.bbox_px[0, 0], joined.bbox_px[0, 2] - 1
    assert low >= joined.xy_px[0, 0] - 5 and high <= joined.xy_px[0, 0] + 5


def test_regions_of_different_tiles_are_not_joined():
    near = regions([[8, 2, 10, 4], [13, 2, 15, 4]], [9.0, 8.0])
    assert merge(near, 12)[1].tolist() == [1, 1]
    assert merge(near, 0)[1].tolist() == [2]


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_a_bad_pixel_takes_the_median_of_its_good_neighbours(dtype):
    pixels_HW = frame((20, 30), dtype, seed=4)
    bad_HW = np.random.default_rng(5).random((20, 30)) < 0.2
    bad_HW[3:6, 3:6] = True  # one without a good neighbour
    bad_HW[0, 0] = True
    mended_HW = Repair(bad_HW)(pixels_HW)
    np.testing.assert_array_equal(mended_HW[~bad_HW], pixels_HW[~bad_HW])
    for y, x in np.argwhere(bad_HW):
        here = (slice(max(y - 1, 0), y + 2), slice(max(x - 1, 0), x + 2))
        good = np.sort(pixels_HW[here][~bad_HW[here]])
        wanted = good[(len(good) - 1) // 2] if len(good) else pixels_HW[~bad_HW].min()
        assert mended_HW[y, x] == wanted
