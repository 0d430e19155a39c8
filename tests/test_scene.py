"""Generated scenes: reproducible, true to their truth and noise; and the source that plays them."""

from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
from scipy.spatial.distance import cdist

from pipeline.component import component
from pipeline.errors import PipelineError
from pipeline.physics import noise
from pipeline.physics.psf import render
from pipeline.physics.scene import Scene, SceneSettings
from pipeline.physics.sensor import Sensor

SMALL = SceneSettings(seed=4, width=200, height=160, singles=3, groups=3, episode_frames=60)
SILENT = Sensor(sigma_px=0.5, full_scale=16383)


def empty(**changes):
    return replace(SMALL, singles=0, groups=0, bad_share=0.0, **changes)


def test_a_frame_follows_from_seed_and_index_alone():
    scene = Scene(SMALL)
    later = scene.frame(130)
    scene.frame(2)
    again, fresh = scene.frame(130), Scene(SMALL).frame(130)
    for other in (again, fresh):
        for one, two in zip(later, other, strict=True):
            np.testing.assert_array_equal(one, two)
    assert later.pixels_HW.dtype == np.uint16 and later.pixels_HW.shape == (160, 200)
    assert (Scene(replace(SMALL, seed=5)).frame(130).pixels_HW != later.pixels_HW).mean() > 0.5


def test_tracks_keep_what_the_docstring_promises():
    settings = replace(SMALL, width=320, height=256, singles=5, groups=5)
    scene = Scene(settings)
    frames = [scene.truth(index) for index in range(settings.episode_frames)]
    xy_px = np.stack([xy for xy, _, _ in frames])  # (T, M, 2)
    assert np.abs(np.diff(xy_px, n=2, axis=0)).max() < 1e-9
    speed = np.hypot(*np.moveaxis(np.diff(xy_px, axis=0), -1, 0))
    assert speed.min() >= 0.05 - 1e-9 and speed.max() <= 0.4 + 1e-9

    velocity = xy_px[1] - xy_px[0]
    together = cdist(velocity, velocity) < 1e-12
    np.fill_diagonal(together, False)
    assert sorted(set(together.sum(axis=1)))[0] == 0 and together.any(), "singles and groups"
    for positions in xy_px:
        distance = cdist(positions, positions) + 1e9 * np.eye(len(positions))
        assert distance[together].min() >= 0.494
        assert np.abs(positions[:, None] - positions)[together].max() <= 2.0
        assert distance[~together].min() >= 16.0
    # No horizon reaches higher than its mean row by more than its waves add up to.
    assert xy_px.min() >= 12.0 and xy_px[..., 0].max() <= 320 - 13
    assert xy_px[..., 1].max() <= 0.8 * 256 + 0.008 * 800 - 12.0


def test_episodes_never_share_a_target_id():
    scene = Scene(SMALL)
    first, last, new = (set(scene.truth(index)[1].tolist()) for index in (0, 59, 60))
    assert first == last and not first & new


def test_targets_are_where_and_as_bright_as_the_truth_says():
    settings = replace(SMALL, sensor=SILENT, groups=1, bad_share=0.0, horizon=1.0, cloud_rms=0.0)
    frame = Scene(settings).frame(17)
    expected = settings.sky + render(frame.xy_px, frame.intensity.astype(float), (160, 200), 0.5)
    assert np.abs(frame.pixels_HW - expected).max() < 0.5 + 1e-2  # rounding, and float32


def test_peak_snr_is_in_range_wherever_in_the_pixel_a_target_lies():
    settings = replace(SMALL, snr=(8.0, 8.0), groups=0, cloud_rms=0.0)
    scene = Scene(settings)
    deviation = noise.variance(np.array(settings.sky), settings.sensor) ** 0.5
    peaks = []
    for index in range(0, 600, 7):
        xy_px, _, intensity = scene.truth(index)
        for place, flux in zip(xy_px, intensity, strict=True):
            local = (place % 1.0 + 5.0)[None]
            peaks.append(render(local, np.array([float(flux)]), (11, 11), 0.5).max() / deviation)
    assert 8.0 - 1e-6 <= min(peaks) < 9.0
    assert 14.0 < max(peaks) <= 8.0 * 2.05


def test_noise_is_the_sensors():
    scene = Scene(empty(cloud_drift_px=0.0, cloud_rms=0.0, horizon=1.0))
    difference = np.diff([scene.frame(k).pixels_HW.astype(float) for k in (0, 1)], axis=0)
    expected = 2.0 * noise.variance(np.array(1000.0), scene.settings.sensor)
    assert difference.var() == pytest.approx(float(expected), rel=0.03)  # 32,000 pixels: 0.8 %


def test_clouds_are_correlated_and_drift():
    scene = Scene(empty(sensor=SILENT, horizon=1.0))
    start, halfway, ten_later = (scene.frame(k).pixels_HW.astype(float) for k in (0, 5, 10))
    np.testing.assert_allclose(ten_later[:, :-1], start[:, 1:], atol=1.0)
    np.testing.assert_allclose(halfway, 0.5 * (start + ten_later), atol=1.5)
    assert start.std() == pytest.approx(60.0, rel=0.01)
    assert np.corrcoef(start[:, 1:].ravel(), start[:, :-1].ravel())[0, 1] > 0.95
    power = (np.abs(np.fft.rfft(start - start.mean(), axis=1)) ** 2).mean(axis=0)
    slope = np.polyfit(np.log(np.arange(2, 30)), np.log(power[2:30]), 1)[0]
    assert slope == pytest.approx(-2.2, abs=0.5)  # a cut through |f|^-3.2


def test_ground_is_warmer_than_sky():
    pixels_HW = Scene(empty()).frame(0).pixels_HW
    assert np.median(pixels_HW[140:]) - np.median(pixels_HW[:100]) == pytest.approx(400.0, abs=60.0)


def test_bad_pixels_stay_bad():
    scene = Scene(replace(SMALL, bad_share=0.01))
    bad = np.stack([scene.frame(k).pixels_HW[scene.bad_pixels_HW] for k in range(3)]).astype(int)
    dead = bad[0] < 20
    assert 0.3 < dead.mean() < 0.7 and scene.bad_pixels_HW.mean() == pytest.approx(0.01, rel=0.3)
    assert (bad[:, dead] == bad[0, dead]).all()
    assert (bad[:, ~dead] > 1000).all()


def test_a_scene_that_cannot_be_says_why():
    with pytest.raises(ValueError, match=r"no room for target \d+ of 403"):
        Scene(replace(SMALL, singles=400))
    with pytest.raises(ValueError, match="full_scale"):
        Scene(replace(SMALL, sensor=replace(SILENT, full_scale=255)))


# --- the source ----------------------------------------------------------------------------------


def synthetic(sensor=None, utc_ns=lambda: 1000, **settings):
    source = component("source", "synthetic")
    small = {"width": 100, "height": 120, "singles": 2, "groups": 1, "seed": 4}
    return source(source.Config(**{**small, **settings}), sensor or {}, utc_ns=utc_ns)


def test_synthetic_plays_the_scene_and_knows_its_truth():
    source = synthetic(frames=3, sensor={"id": "mast"})
    frames = list(source.frames())
    assert [frame.info.seq for frame in frames] == [0, 1, 2] and source.length == 3
    info = frames[0].info
    assert (info.sensor_id, info.clock, info.shape) == ("mast", "utc", (120, 100))
    scene = Scene(SceneSettings(seed=4, width=100, height=120, singles=2, groups=1))
    for index, frame in enumerate(frames):
        expected = scene.frame(index)
        np.testing.assert_array_equal(frame.pixels_HW, expected.pixels_HW)
        np.testing.assert_array_equal(source.truth.of_frame(index), expected.xy_px)
        here = source.truth.frame_index == index
        np.testing.assert_array_equal(source.truth.target_id[here], expected.target_id)
        np.testing.assert_array_equal(source.truth.intensity[here], expected.intensity)


def test_synthetic_stamps_frames_with_the_clock_it_is_given():
    frames = synthetic(frames=3, utc_ns=iter([70, 80, 95]).__next__).frames()
    assert [frame.info.t_exposure_ns for frame in frames] == [70, 80, 95]


def test_synthetic_without_a_limit_is_endless_until_closed():
    source = synthetic(rate_hz=0)
    assert source.length is None and source.truth is None
    frames = source.frames()
    assert len(list(islice(frames, 5))) == 5
    source.close()
    assert list(frames) == []


def test_synthetic_closed_while_it_waits_ends():
    source = synthetic(rate_hz=1e-3)  # the second frame is due in a quarter of an hour
    frames = source.frames()
    next(frames)
    source.close()
    assert list(frames) == []


@pytest.mark.parametrize(
    ("settings", "sensor", "message"),
    [
        ({"singles": 900}, {}, "no room for target"),
        ({"snr": (9.0, 8.0)}, {}, "source.snr must be lowest, highest"),
        ({}, {"sigma_px": 9.0}, "sigma_px must be from 0.1 to 5 px"),
    ],
)
def test_synthetic_refuses_what_cannot_be(settings, sensor, message):
    with pytest.raises(PipelineError, match=message):
        synthetic(sensor=sensor, **settings)
