"""Every file of pipeline/detectors keeps the contract; and what each is good at."""

import cv2
import numpy as np
import pytest
from scipy.special import ndtri

from pipeline.component import Context, available, component
from pipeline.config import load_config
from pipeline.errors import PipelineError
from pipeline.evaluation.run import UNKNOWN_CAMERA
from pipeline.imaging.regions import find_regions
from pipeline.messages import Flag, Frame, FrameInfo
from pipeline.physics.psf import render
from pipeline.physics.sensor import Sensor
from pipeline.stages.detect import Detect
from trainer.clutter import draw_picture, draw_pictures

NAMES = available("detector")
NOISE = 10.0
SENSOR = Sensor(sigma_px=0.5, full_scale=16383, read_noise=NOISE)
WARM_UP = 12


def build(name, **settings):
    kind = component("detector", name)
    return kind.build(kind.Config(**settings), SENSOR)


def noise_frame(seed, shape=(128, 160), level=1000.0):
    rng = np.random.default_rng(seed)
    return np.rint(level + NOISE * rng.standard_normal(shape)).astype(np.uint16)


def with_targets(frame_HW, xy_px, intensity, sigma_px=0.5):
    xy_px = np.asarray(xy_px, np.float64).reshape(-1, 2)
    mean = render(xy_px, np.full(len(xy_px), intensity), frame_HW.shape, sigma_px)
    return np.rint(frame_HW + mean).astype(np.uint16)


def warmed(name, shape=(128, 160), **settings):
    """A detector that has seen noise, for those that learn from it."""
    detector = build(name, **settings)
    for seed in range(WARM_UP):
        detector.signal(noise_frame(100 + seed, shape))
    return detector


def stage(name, **settings):
    return Detect.build(Detect.Config(detector={"kind": name}, **settings), Context(SENSOR))


# --- the contract, for every file ----------------------------------------------------------------


def test_there_are_several_detectors_and_the_matched_filter_is_the_default():
    assert {"matched_filter", "top_hat", "local_contrast", "temporal"} <= set(NAMES)
    assert Detect.Config().detector == {"kind": "matched_filter"}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_a_statistic_is_finite_of_the_frames_shape_and_leaves_the_frame_alone(name, dtype):
    detector = build(name)
    for seed in range(3):
        frame_HW = (noise_frame(seed, (48, 70)) // 8).astype(dtype)
        before = frame_HW.copy()
        signal = detector.signal(frame_HW)
        np.testing.assert_array_equal(frame_HW, before)
        for image_HW in signal:
            assert image_HW.shape == (48, 70) and image_HW.dtype == np.float32
            assert np.isfinite(image_HW).all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_nothing_stands_out_of_constant_frames(name, dtype):
    detector = build(name)
    for _ in range(WARM_UP):
        assert (detector.signal(np.full((40, 56), 200, dtype)).snr_HW <= 0.0).all()


@pytest.mark.parametrize("name", NAMES)
def test_targets_over_noise_are_found_where_they_are(name):
    grid = np.stack(np.meshgrid(np.arange(14, 150, 26), np.arange(14, 120, 24)), -1).reshape(-1, 2)
    places = grid + np.random.default_rng(5).uniform(-0.5, 0.5, grid.shape)
    detector = warmed(name)
    signal = detector.signal(with_targets(noise_frame(1), places, 1500.0))
    found = find_regions(signal.snr_HW, 4.5).xy_px
    distance = np.hypot(*np.moveaxis(places[:, None] - found[None], -1, 0))
    assert (distance.min(axis=1) < 1.0).mean() >= 0.95
    assert (distance.min(axis=0) > 3.0).sum() <= 1


@pytest.mark.parametrize("name", NAMES)
def test_frames_of_another_shape_are_taken_as_they_come(name):
    detector = warmed(name)
    frame_HW = with_targets(noise_frame(2, (70, 90)), [[40.0, 30.0]], 2500.0)
    y, x = np.unravel_index(detector.signal(frame_HW).snr_HW.argmax(), frame_HW.shape)
    assert abs(x - 40) <= 1 and abs(y - 30) <= 1
    assert detector.signal(noise_frame(3, (11, 11))).snr_HW.shape == (11, 11)


@pytest.mark.parametrize("name", NAMES)
def test_the_same_frames_give_the_same_statistics(name):
    first, second = build(name), build(name)
    for seed in range(WARM_UP):
        frame_HW = noise_frame(seed)
        np.testing.assert_array_equal(first.signal(frame_HW).snr_HW, second.signal(frame_HW).snr_HW)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "local_contrast"])
def test_equivalent_sigmas_keep_a_set_rate_over_noise(name):
    """Within a factor of 1.6: at 30 a frame 15 frames have 450 ± 21."""
    shape, frames = (256, 320), 15
    detector = warmed(name, shape)
    for rate in (30.0, 3.0):
        threshold = -float(ndtri(rate / (shape[0] * shape[1])))
        number = sum(
            int((detector.signal(noise_frame(seed, shape)).snr_HW > threshold).sum())
            for seed in range(frames)
        )
        spread = 3.0 * np.sqrt(rate * frames)
        assert rate * frames / 1.6 - spread <= number <= rate * frames * 1.6 + spread


def test_local_contrast_keeps_a_set_rate_over_clutter_it_was_not_fitted_to():
    """Within a factor of 2.5, on pictures of other seeds than those of fit and calibration."""
    detector, rate, number = build("local_contrast"), 0.5, 0
    pictures = list(draw_pictures(70, seed=77))
    for pixels_HW, mask_HW in pictures:
        threshold = -float(ndtri(rate / pixels_HW.size))
        found = find_regions(detector.signal(pixels_HW).snr_HW, threshold).peak_xy
        near_HW = cv2.dilate(mask_HW.astype(np.uint8), np.ones((7, 7), np.uint8))
        number += int((near_HW[found[:, 1], found[:, 0]] == 0).sum())
    assert rate / 2.5 <= number / len(pictures) <= rate * 2.5


# --- what each is good at ------------------------------------------------------------------------


def edges_frame(rng):
    """A horizon, a mast and a roof, over noise; 8 bits."""
    grey = np.full((160, 200), 60.0)
    grey[110:] = 150.0
    grey[40:130, 50:53] = 220.0
    grey[90:120, 120:170] = 190.0
    grey = cv2.GaussianBlur(grey, (0, 0), 0.8) + 1.5 * rng.standard_normal(grey.shape)
    return np.clip(np.rint(grey), 0, 255).astype(np.uint8)


def test_local_contrast_takes_no_edge_corner_or_mast_for_a_target():
    number = 0
    for seed in range(8):
        detect = Detect.build(UNKNOWN_CAMERA, Context(SENSOR))
        number += len(detect.search(edges_frame(np.random.default_rng(seed))).points.snr)
    assert number <= 1


@pytest.mark.parametrize("sigma_px", [0.7, 1.5, 2.5, 4.0])
def test_local_contrast_finds_targets_of_any_size_among_edges(sigma_px):
    y, x = np.mgrid[:160, :200]
    bump = 60.0 * np.exp(-0.5 * ((x - 150) ** 2 + (y - 45) ** 2) / sigma_px**2)
    frame_HW = edges_frame(np.random.default_rng(1)) + np.rint(bump).astype(np.uint8)
    found = Detect.build(UNKNOWN_CAMERA, Context(SENSOR)).search(frame_HW)
    np.testing.assert_allclose(found.points.xy_px, [[150, 45]], atol=1.0)


def test_local_contrast_finds_as_well_in_more_bits():
    rng = np.random.default_rng(3)
    for kind in ("clouds", "sea", "treeline"):
        pixels_HW, mask_HW = draw_picture(kind, rng)
        wide_HW = pixels_HW.astype(np.uint16) * 40 + 3000
        signals = [build("local_contrast").signal(image) for image in (pixels_HW, wide_HW)]
        peaks = [np.unravel_index(s.snr_HW.argmax(), mask_HW.shape) for s in signals]
        assert peaks[0] == peaks[1]


def shaken(scene_HW, rng, number):
    """A static scene seen by a camera that shakes by up to a pixel, and noise."""
    dx, dy = rng.uniform(-1.0, 1.0, 2)
    move = np.array([[1.0, 0.0, dx], [0.0, 1.0, dy]])
    moved = cv2.warpAffine(
        scene_HW, move, scene_HW.shape[::-1], flags=cv2.INTER_CUBIC, borderMode=cv2.BORDER_REFLECT
    )
    return moved + NOISE * np.random.default_rng(number).standard_normal(moved.shape), (dx, dy)


def test_temporal_sees_what_moves_over_still_clutter_while_the_camera_shakes():
    """Point-like clutter, which no single frame tells from targets, is learnt as background."""
    rng = np.random.default_rng(8)
    still = rng.uniform(10, 118, (12, 2))
    scene_HW = 1000.0 + 40.0 * cv2.GaussianBlur(rng.standard_normal((128, 128)), (0, 0), 6.0) * 10
    scene_HW += render(still, np.full(12, 2500.0), scene_HW.shape, 0.6)
    detectors = {name: build(name) for name in ("temporal", "matched_filter")}
    false, found = dict.fromkeys(detectors, 0), dict.fromkeys(detectors, 0)
    for number in range(40):
        seen, shift = shaken(scene_HW, rng, number)
        target = np.array([[8.0 + 1.5 * number, 64.0]]) + shift
        seen += render(target, np.array([1500.0]), seen.shape, 0.5)
        frame_HW = np.rint(seen).astype(np.uint16)
        for name, detector in detectors.items():
            xy_px = find_regions(detector.signal(frame_HW).snr_HW, 4.5).xy_px
            if number >= 20:
                distance = np.hypot(*(xy_px - target).T)
                found[name] += int((distance < 2.0).any())
                false[name] += int((distance >= 2.0).sum())
    assert found["temporal"] >= 18
    assert false["temporal"] <= 0.05 * false["matched_filter"]


def test_temporal_starts_as_the_matched_filter_and_again_after_a_jump():
    temporal, single = build("temporal", max_shift_px=4.0), build("matched_filter")
    scene_HW = 1000.0 + 3000.0 * cv2.GaussianBlur(
        np.random.default_rng(2).standard_normal((128, 160)), (0, 0), 3.0
    )
    frames = [np.rint(shaken(scene_HW, np.random.default_rng(n), n)[0]) for n in range(30)]
    for number, frame_HW in enumerate(np.float32(frames)):
        same = np.array_equal(temporal.signal(frame_HW).snr_HW, single.signal(frame_HW).snr_HW)
        assert same == (number < temporal._config.warm_up_frames)
    jumped = np.roll(np.float32(frames[0]), 30, axis=1)
    np.testing.assert_array_equal(temporal.signal(jumped).snr_HW, single.signal(jumped).snr_HW)


LEAVE_SHAPES = [name for name in NAMES if not component("detector", name).judges_shape]


@pytest.mark.parametrize("name", LEAVE_SHAPES)
def test_a_mapless_hot_pixel_beside_a_target_is_mended(name):
    """Detectors that leave shapes to the stage are asked for the mended frame's statistic."""
    detect = stage(name)
    for number in range(WARM_UP):
        info = FrameInfo(number, "s", 0, "utc", (96, 128))
        detect.process(Frame(info, noise_frame(number, (96, 128))))
    frame_HW = with_targets(noise_frame(50, (96, 128)), [[50.2, 40.1]], 1500.0)
    frame_HW[41, 53] = 9000
    blobs = detect.process(Frame(FrameInfo(50, "s", 0, "utc", (96, 128)), frame_HW))
    near = np.hypot(*(blobs.xy_px - [50.2, 40.1]).T) < 0.8
    assert near.sum() == 1 and not (blobs.flags[near] & Flag.EXTENDED).any()


# --- chosen by name ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_a_configuration_names_the_detector(name, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(f"detect: {{detector: {{kind: {name}}}}}\n")
    settings = load_config(path)
    assert settings.stages["detect"].detector == {"kind": name}
    assert (settings.digest != load_config(None).digest) == (name != "matched_filter")


@pytest.mark.parametrize(
    ("detector", "message"),
    [
        ("{kind: tophat}", r"detect.detector: .*unknown detector `tophat`; use one of"),
        ("{kind: top_hat, size: 3}", r"detect.detector: .*top_hat: size: .*known there: size_px"),
        ("{kind: top_hat, size_px: 1}", r"top_hat: size_px: .*greater than or equal to 3"),
        ("top_hat", r"detect.detector: .*dict"),
    ],
)
def test_a_wrong_detector_is_named(detector, message, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(f"detect: {{detector: {detector}}}\n")
    with pytest.raises(PipelineError, match=message):
        load_config(path)
