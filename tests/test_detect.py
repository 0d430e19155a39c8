"""Detection: targets found, false alarms kept to what was asked, and what is told apart."""

import numpy as np
import pytest
from scipy.spatial.distance import cdist

from pipeline.component import Context
from pipeline.errors import PipelineError
from pipeline.messages import Flag, Frame, FrameInfo, Tiling
from pipeline.physics.arrays import NumpyRandom
from pipeline.physics.groups import PROFILES, draw_patches
from pipeline.physics.psf import pixel_response, render
from pipeline.physics.scene import Scene, SceneSettings
from pipeline.physics.sensor import Sensor
from pipeline.stages.detect import Detect

NOISE = 10.0
SENSOR = Sensor(sigma_px=0.5, full_scale=16383, read_noise=NOISE)
SILENT = Sensor(sigma_px=0.5, full_scale=255)


def detect(pixels_HW, sensor=SENSOR, bad_HW=None, tiling=None, **settings):
    stage = Detect.build(Detect.Config(**settings), Context(sensor, bad_HW))
    info = FrameInfo(0, "s", 0, "utc", pixels_HW.shape, tiling=tiling)
    return stage.process(Frame(info, pixels_HW))


def frame_with(xy_px, intensity, shape=(96, 128), seed=0, level=1000.0):
    """Point sources on white noise, 16-bit counts."""
    xy_px = np.asarray(xy_px, dtype=np.float64).reshape(-1, 2)
    intensity = np.broadcast_to(np.asarray(intensity, dtype=np.float64), len(xy_px))
    mean = level + render(xy_px, intensity, shape, SENSOR.sigma_px)
    noisy = mean + NOISE * np.random.default_rng(seed).standard_normal(shape)
    return np.clip(np.rint(noisy), 0, SENSOR.full_scale).astype(np.uint16)


def points(blobs):
    return blobs.xy_px[(blobs.flags & Flag.EXTENDED) == 0]


# --- how well ------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_map", [True, False])
def test_scene_targets_are_found_with_few_false_alarms(with_map):
    found, isolated_total, false_alarms, on_bad = 0, 0, 0, 0
    frames = 12
    for seed in (21, 22):
        scene = Scene(SceneSettings(seed=seed))
        bad_HW = scene.bad_pixels_HW
        bad_xy = np.argwhere(bad_HW)[:, ::-1]
        stage = Detect(Detect.Config(), scene.settings.sensor, bad_HW if with_map else None)
        for index in range(0, 16 * frames, 32):
            frame = scene.frame(index)
            info = FrameInfo(index, "s", 0, "utc", frame.pixels_HW.shape)
            xy_px = points(stage.process(Frame(info, frame.pixels_HW)))
            distance = cdist(frame.xy_px, xy_px)
            fellows = (cdist(frame.xy_px, frame.xy_px) < 5.0).sum(axis=1)
            found += (distance[fellows == 1].min(axis=1) <= 1.0).sum()
            isolated_total += (fellows == 1).sum()
            alarms = xy_px[distance.min(axis=0) > 2.0]
            false_alarms += len(alarms)
            on_bad += (cdist(alarms, bad_xy) <= 1.5).any(axis=1).sum()
    assert found / isolated_total >= 0.99
    assert false_alarms <= 0.5 * frames
    assert on_bad <= (0 if with_map else 3)


def test_threshold_keeps_the_asked_rate_of_false_alarms():
    pixels = [frame_with([], [], shape=(256, 256), seed=seed) for seed in range(6)]
    numbers = [
        np.mean(
            [len(detect(frame, false_alarms_per_frame=rate, min_sigmas=2).snr) for frame in pixels]
        )
        for rate in (0.1, 30.0)
    ]
    assert numbers[0] <= 0.5
    # Shape tests refuse some noise peaks, and one peak may hold two of the counted pixels.
    assert 5.0 <= numbers[1] <= 30.0


def test_snr_is_that_of_the_matched_filter():
    centred = [[32.0, 32.0], [64.0, 64.0], [96.0, 32.0]]
    snr = np.mean([detect(frame_with(centred, 1000.0, seed=k)).snr[:3] for k in range(12)])
    response = pixel_response(np.array(5.0), 11, 0.5)
    expected = 1000.0 * (response @ response) / NOISE
    assert snr == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize("place", [(0.0, 0.0), (127.0, 40.0), (50.3, 95.2), (63.5, 48.5)])
def test_position_and_box_of_a_single_target(place):
    blobs = detect(frame_with([place], 1500.0))
    assert np.hypot(*(blobs.xy_px[0] - place)) < 0.6
    x0, y0, x1, y1 = blobs.bbox_px[0]
    assert x0 <= blobs.xy_px[0, 0] < x1 and y0 <= blobs.xy_px[0, 1] < y1
    assert blobs.flags.tolist() == [0]


# --- what is told apart --------------------------------------------------------------------------


def test_hot_and_dead_pixels_of_the_map_are_never_seen():
    pixels_HW = frame_with([[100.0, 20.0]], 1500.0)
    bad_HW = np.zeros(pixels_HW.shape, bool)
    bad_HW[30:33, 40:43] = True  # a cluster: its middle has no good neighbour
    bad_HW[60, 0] = bad_HW[95, 127] = bad_HW[70, 70] = True
    pixels_HW[bad_HW] = 9000
    pixels_HW[70, 70] = 0
    blobs = detect(pixels_HW, bad_HW=bad_HW)
    assert len(blobs.snr) == 1 and np.hypot(*(blobs.xy_px[0] - [100, 20])) < 0.5
    np.testing.assert_array_equal(blobs.usable_HW, ~bad_HW)


def test_unmapped_spikes_are_refused_and_point_sources_kept():
    grid = np.stack(np.meshgrid(np.arange(10, 310, 20), np.arange(10, 250, 20)), -1).reshape(-1, 2)
    rng = np.random.default_rng(3)
    peak_snr = 20.0
    spikes_HW = frame_with([], [], shape=(256, 320), seed=1)
    spikes_HW[grid[:, 1], grid[:, 0]] += np.uint16(peak_snr * NOISE)
    spikes_HW[0, 100] = spikes_HW[100, 319] = 5000  # at the border
    assert len(detect(spikes_HW).snr) <= 0.02 * len(grid)

    places = grid + rng.uniform(-0.5, 0.5, grid.shape)
    centre = pixel_response(np.array(5.0), 11, 0.5)[5] ** 2
    for sigma_px, xy_px in ((0.5, places), (0.5, grid), (0.45, places)):
        mean = 1000.0 + render(
            xy_px.astype(float), np.full(len(grid), peak_snr * NOISE / centre), (256, 320), sigma_px
        )
        pixels_HW = np.rint(mean + NOISE * rng.standard_normal(mean.shape)).astype(np.uint16)
        found = points(detect(pixels_HW))
        assert (cdist(xy_px, found).min(axis=1) < 1.0).mean() >= 0.99


@pytest.mark.parametrize("offset", [(2, 0), (3, 1), (0, 4)])
def test_a_hot_pixel_does_not_hide_the_target_beside_it(offset):
    pixels_HW = frame_with([[50.2, 40.1]], 1200.0)
    pixels_HW[40 + offset[1], 50 + offset[0]] = 9000
    pixels_HW[40, 1] = 9000  # nor does one at the border, where it cannot be mended, do harm
    blobs = detect(pixels_HW)
    np.testing.assert_allclose(blobs.xy_px, [[50.2, 40.1]], atol=0.6)
    hot_xy = [[50 + offset[0], 40 + offset[1]], [1, 40]]
    np.testing.assert_array_equal(
        np.argwhere(~blobs.usable_HW)[:, ::-1].tolist(), sorted(hot_xy, key=lambda xy: xy[::-1])
    )


@pytest.mark.parametrize("offset", [(1, 0), (1, 1), (2, 0), (3, 0)])
def test_of_two_hot_pixels_side_by_side_both_are_known(offset):
    pixels_HW = frame_with([[30.0, 70.0]], 1200.0)
    pixels_HW[40, 50] = 9000
    pixels_HW[40 + offset[1], 50 + offset[0]] = 5000
    blobs = detect(pixels_HW)
    np.testing.assert_allclose(blobs.xy_px, [[30.0, 70.0]], atol=0.6)
    hot = np.argwhere(~blobs.usable_HW)[:, ::-1].tolist()
    assert hot == [[50, 40], [50 + offset[0], 40 + offset[1]]]


def test_groups_are_not_extended_and_larger_objects_are():
    corners = np.array([[30.0, 30.0], [32.0, 30.0], [30.0, 32.0], [32.0, 32.0], [31.0, 31.0]])
    pixels_HW = frame_with(corners, 2000.0)
    y, x = np.mgrid[:96, :128]
    pixels_HW[np.hypot(x - 90, y - 50) < 7.0] += 600
    blobs = detect(pixels_HW)
    extended = (blobs.flags & Flag.EXTENDED) > 0
    assert np.hypot(*(blobs.xy_px[~extended] - [31, 31]).T).max() < 0.5
    x0, y0 = blobs.bbox_px[extended, :2].min(axis=0)
    x1, y1 = blobs.bbox_px[extended, 2:].max(axis=0)
    assert abs(x0 - 84) <= 2 and abs(y0 - 44) <= 2 and abs(x1 - 97) <= 2 and abs(y1 - 57) <= 2


@pytest.mark.parametrize("slope", [0.0, 0.03, 0.3, 1.0])
def test_an_edge_gives_no_points(slope):
    y, x = np.mgrid[:200, :240]
    step = 400.0 * np.clip(y - 60.3 - slope * x - 3.0 * np.sin(x / 15.0) + 0.5, 0.0, 1.0)
    number = 0
    for seed in range(4):
        noisy = 1000.0 + step + NOISE * np.random.default_rng(seed).standard_normal(step.shape)
        number += len(points(detect(np.rint(noisy).astype(np.uint16))))
    assert number <= 2


def test_a_target_over_an_edges_sky_is_found():
    pixels_HW = frame_with([[60.0, 40.0]], 1500.0)
    pixels_HW[50:] += 500
    found = points(detect(pixels_HW))
    assert np.hypot(*(found - [60, 40]).T).min() < 0.5


# --- merging and ranking -------------------------------------------------------------------------


def test_blobs_of_one_window_merge_and_the_window_covers_both():
    blobs = detect(
        frame_with(
            [[40.0, 40.0], [47.0, 44.0], [90.0, 40.0], [104.0, 40.0]], [4000, 1500, 1500, 1400]
        )
    )
    assert [Flag(flags) for flags in blobs.flags.tolist()] == [Flag.MERGED, Flag(0), Flag(0)]
    x0, y0, x1, y1 = blobs.bbox_px[0]
    assert x0 <= 39 and y0 <= 39 and x1 >= 49 and y1 >= 46
    window = np.rint(blobs.xy_px[0]) - 5
    assert (window <= [x0, y0]).all() and (window + 11 >= [x1, y1]).all()
    assert blobs.xy_px[0, 0] < 43.5, "the brighter one weighs more"


def test_the_strongest_come_first_and_the_rest_is_flagged():
    x = np.arange(10, 120, 22.0)
    xy_px = np.stack([x, np.full(len(x), 50.0)], axis=1)
    intensity = np.array([900.0, 2000.0, 1200.0, 3000.0, 1600.0])
    blobs = detect(frame_with(xy_px, intensity), max_blobs=3)
    np.testing.assert_allclose(blobs.xy_px[:, 0], x[[3, 1, 4, 2, 0]], atol=0.5)
    assert (np.diff(blobs.snr) < 0).all()
    assert blobs.flags.tolist() == [0, 0, 0, Flag.OVERFLOW, Flag.OVERFLOW]


# --- mosaics -------------------------------------------------------------------------------------


def mosaic(images, pitch_px, level):
    side = round(len(images) ** 0.5)
    tiles = np.full((side, pitch_px, side, pitch_px), level, images.dtype)
    tiles[:, :11, :, :11] = images.reshape(side, side, 11, 11).swapaxes(1, 2)
    return tiles.reshape(side * pitch_px, side * pitch_px)


@pytest.mark.parametrize("name", ["csist-100k", "interior", "field"])
def test_every_tile_of_a_mosaic_gives_its_group(name):
    profile = PROFILES[name]
    images, _ = draw_patches(profile, 144, NumpyRandom(8))
    dtype = np.uint8 if profile.sensor.full_scale == 255 else np.uint16
    frame_HW = mosaic(images.astype(dtype), 16, int(profile.background))
    blobs = detect(frame_HW, profile.sensor, tiling=Tiling(11, 16))
    tiles = set(map(tuple, (blobs.xy_px // 16).astype(int).tolist()))
    assert len(blobs.snr) == len(tiles) == 144
    assert (blobs.xy_px % 16 <= 10.0).all() and not (blobs.flags & ~np.uint16(Flag.MERGED)).any()


def test_blobs_of_different_tiles_never_merge():
    images = np.zeros((4, 11, 11))
    images[0] = render(np.array([[10.0, 5.0]]), np.array([240.0]), (11, 11), 0.5)
    images[1] = render(np.array([[0.0, 5.0]]), np.array([240.0]), (11, 11), 0.5)
    images[2] = render(np.array([[1.0, 5.0], [9.0, 5.0]]), np.full(2, 240.0), (11, 11), 0.5)
    frame_HW = mosaic(np.rint(images).astype(np.uint8), 12, 0)
    blobs = detect(frame_HW, SILENT, tiling=Tiling(11, 12))
    order = np.lexsort(blobs.xy_px.T)
    np.testing.assert_allclose(blobs.xy_px[order], [[10, 5], [12, 5], [5, 17]], atol=0.3)
    assert blobs.flags[order].tolist() == [0, 0, Flag.MERGED]


# --- odd frames ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32, np.float64])
@pytest.mark.parametrize("tiling", [None, Tiling(11, 16)])
@pytest.mark.parametrize("sensor", [SENSOR, SILENT])
def test_a_constant_frame_has_no_blobs(dtype, tiling, sensor):
    blobs = detect(np.full((48, 70), 200, dtype), sensor, tiling=tiling)
    assert len(blobs.snr) == 0 and blobs.xy_px.shape == (0, 2) and blobs.bbox_px.shape == (0, 4)


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e300])
def test_a_frame_without_a_finite_pixel_has_no_blobs(value):
    blobs = detect(np.full((48, 70), value))
    assert len(blobs.snr) == 0 and not blobs.usable_HW.any()


def test_pixels_that_are_not_finite_count_as_bad():
    pixels_HW = frame_with([[40.0, 40.0]], 1500.0).astype(np.float64)
    pixels_HW[10:30, 80:100] = np.nan
    pixels_HW[60, 60], pixels_HW[70, 20] = np.inf, -np.inf
    blobs = detect(pixels_HW)
    assert len(blobs.snr) == 1 and np.hypot(*(blobs.xy_px[0] - [40, 40])) < 0.5
    assert (~blobs.usable_HW).sum() == 402


def test_8_bit_16_bit_and_floating_point_counts_give_the_same_blobs():
    pixels_HW = (frame_with([[40.3, 40.1]], 400.0, level=100.0) // 2).astype(np.uint8)
    reference = detect(pixels_HW)
    for dtype in (np.uint16, np.float64):
        blobs = detect(pixels_HW.astype(dtype))
        np.testing.assert_allclose(blobs.xy_px, reference.xy_px, atol=0.05)
        np.testing.assert_allclose(blobs.snr, reference.snr, rtol=0.1)


def test_saturated_pixels_are_a_blob_like_any_other():
    blobs = detect(frame_with([[40.0, 40.0], [41.2, 40.6]], 60000.0))
    assert len(blobs.snr) == 1 and blobs.flags.tolist() == [0]
    assert np.hypot(*(blobs.xy_px[0] - [40.6, 40.3])) < 0.5


def test_a_frame_of_one_window_is_searched():
    blobs = detect(frame_with([[5.2, 5.4]], 1500.0, shape=(11, 11)))
    assert np.hypot(*(blobs.xy_px[0] - [5.2, 5.4])) < 0.6


def test_frames_that_do_not_fit_are_refused():
    with pytest.raises(PipelineError, match="frame of 40×10 px is smaller than the 11×11 window"):
        detect(np.zeros((10, 40), np.uint16))
    with pytest.raises(PipelineError, match="bad-pixel map is 30×20, the frame 40×20"):
        detect(np.zeros((20, 40), np.uint16), bad_HW=np.zeros((20, 30), bool))
