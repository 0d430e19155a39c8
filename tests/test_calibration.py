"""Calibration: what two uniform scenes say of a sensor, and frames corrected by it."""

import math

import cv2
import numpy as np
import pytest
import yaml
from conftest import assert_one_line_error
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

from pipeline.component import Context, component
from pipeline.config import load_config
from pipeline.errors import PipelineError
from pipeline.formats.calibration import Calibration, read_calibration, write_calibration
from pipeline.formats.recording import RecordingWriter
from pipeline.imaging.calibration import MIN_FRAMES, estimate, measure, photon_transfer
from pipeline.messages import Flag, Frame, FrameInfo, Trace
from pipeline.physics.scene import Scene, SceneSettings
from pipeline.physics.sensor import Sensor
from pipeline.runtime.flow import build_flow
from pipeline.sensing import stage_context

SHAPE = (80, 96)
SENSOR = Sensor(id="west", full_scale=16383, read_noise=6.0, gain=20.0)
DEAD, HOT, NOISY, STUCK, WEAK = (10, 20), (40, 50), (70, 5), (0, 95), (33, 34)


class Raw:
    """A sensor of uneven pixels, a few of them bad: uniform scenes as it sees them."""

    def __init__(self, rng):
        self.rng = rng
        self.gain_HW = rng.normal(1.0, 0.04, SHAPE)
        self.offset_HW = rng.normal(0.0, 40.0, SHAPE)

    def frame(self, scene):
        noise = self.rng.normal(size=SHAPE) * np.sqrt(36.0 + scene / 20.0)
        raw = (scene + noise - self.offset_HW) / self.gain_HW
        raw[DEAD] = 300.0
        raw[HOT] = 17000.0
        raw[NOISY] += self.rng.normal(0.0, 120.0)
        raw[STUCK] = 0.0
        raw[WEAK] = 1000.0 + 0.5 * raw[WEAK]
        return np.clip(np.rint(raw), 0, 16383).astype(np.uint16)


@pytest.fixture(scope="module")
def raw():
    return Raw(np.random.default_rng(11))


@pytest.fixture(scope="module")
def found(raw):
    levels = [
        measure((raw.frame(scene + 3.0 * math.sin(k)) for k in range(40)), 16383)
        for scene in (2000.0, 8000.0)
    ]
    return estimate(*levels, SENSOR.full_scale)


def frame(pixels_HW):
    return Frame(FrameInfo(0, "west", 0, "utc", pixels_HW.shape), pixels_HW)


# --- two levels ----------------------------------------------------------------------------------


def test_exactly_the_bad_pixels_are_found(found):
    bad = {tuple(place) for place in np.argwhere(found.calibration.bad_HW).tolist()}
    assert bad == {DEAD, HOT, NOISY, STUCK, WEAK}


def test_between_the_levels_a_uniform_scene_is_uniform_again(found, raw):
    good = ~found.calibration.bad_HW
    frames = [raw.frame(5000.0) for _ in range(64)]
    assert np.mean(frames, axis=0)[good].std() > 200.0
    stage = component("stage", "calibrate")
    stage = stage.build(stage.Config(), Context(SENSOR, calibration=found.calibration))
    corrected = np.mean([stage.process(frame(one)).pixels_HW for one in frames], axis=0)[good]
    noise = math.sqrt(36.0 + 5000.0 / 20.0)
    own, calibrations = noise / 8.0, noise / math.sqrt(2 * 40)
    assert corrected.std() < 1.15 * math.hypot(own, calibrations)
    assert abs(corrected.mean() - 5000.0) < 15.0  # the median pixel's counts are the scale


def test_photon_transfer_gives_read_noise_and_gain_though_the_lamp_flickers(found):
    assert_allclose(found.gain, 20.0, rtol=0.04)
    assert_allclose(found.read_noise, 6.0, rtol=0.15)
    assert not found.pedestal


@given(read=st.floats(0.5, 50.0), gain=st.floats(0.5, 100.0), low=st.floats(10.0, 3000.0))
@settings(max_examples=50, deadline=None)
def test_photon_transfer_inverts_the_noise_model(read, gain, low):
    levels = [low, 3.0 * low]
    found = photon_transfer(levels, [read**2 + level / gain for level in levels])
    assert_allclose(found[:2], (read, gain), rtol=1e-5)


def test_photon_transfer_without_shot_noise_and_with_a_pedestal():
    assert photon_transfer([1000.0, 2000.0], [25.0, 25.0]) == (5.0, math.inf, False)
    read, gain, pedestal = photon_transfer([1000.0, 2000.0], [10.0, 30.0])
    assert (read, pedestal) == (0.0, True)
    assert_allclose(1500.0 / gain, 20.0)  # right in the middle


@pytest.mark.parametrize("number", [0, MIN_FRAMES - 1])
def test_too_few_frames_say_so(number):
    with pytest.raises(ValueError, match=f"holds {number} frames; record at least 16"):
        measure([np.zeros(SHAPE, np.uint16)] * number, 16383)


@pytest.mark.parametrize(("first", "second"), [(2000.0, 2000.0), (8000.0, 2000.0)])
def test_levels_that_do_not_rise_are_refused(raw, first, second):
    levels = [measure((raw.frame(level) for _ in range(16)), 16383) for level in (first, second)]
    with pytest.raises(PipelineError, match="counts only; give the darker scene first"):
        estimate(*levels, SENSOR.full_scale)


def test_a_saturated_scene_is_refused(raw):
    levels = [measure((raw.frame(level) for _ in range(16)), 16383) for level in (8000.0, 16300.0)]
    with pytest.raises(PipelineError, match=r"% of the pixels are bad .* saturated or zero"):
        estimate(*levels, SENSOR.full_scale)


# --- file and command ----------------------------------------------------------------------------


def test_a_calibration_is_read_as_it_was_written(found, tmp_path):
    write_calibration(tmp_path / "c.zarr", found.calibration)
    again = read_calibration(tmp_path / "c.zarr")
    for name in ("gain_HW", "offset_HW", "bad_HW"):
        assert_array_equal(getattr(again, name), getattr(found.calibration, name))
    assert again.full_scale == 16383


def test_a_malformed_calibration_is_named(found, tmp_path):
    gain_HW = found.calibration.gain_HW.copy()
    gain_HW[3, 4] = np.nan
    broken = Calibration(gain_HW, found.calibration.offset_HW, found.calibration.bad_HW, 16383)
    write_calibration(tmp_path / "c.zarr", broken)
    with pytest.raises(PipelineError, match=r"c.zarr: array `gain` must be finite .*; row 3"):
        read_calibration(tmp_path / "c.zarr")
    with pytest.raises(PipelineError, match="no such file"):
        read_calibration(tmp_path / "none.zarr")


def record(path, frames):
    with RecordingWriter(path, frames[0].shape, SENSOR) as writer:
        for index, pixels_HW in enumerate(frames):
            writer.append(pixels_HW, index)
    return path


def test_the_command_writes_a_calibration_and_a_working_configuration(raw, tmp_path, command):
    low = record(tmp_path / "low.zarr", [raw.frame(2000.0) for _ in range(20)])
    high = record(tmp_path / "high.zarr", [raw.frame(8000.0) for _ in range(20)])
    out = tmp_path / "west.zarr"
    result = command("pipeline", "calibrate", low, high, out)
    assert result.returncode == 0, result.stderr
    assert "5 of 7680 pixels are bad" in result.stdout
    (tmp_path / "west.yaml").write_text(result.stdout)
    assert_allclose(yaml.safe_load(result.stdout)["sensor"]["gain"], 20.0, rtol=0.1)
    config = load_config(tmp_path / "west.yaml")
    assert config.stage_names[:2] == ["calibrate", "detect"]
    flow = build_flow(config, config.stage_names[:2], SENSOR, SHAPE)
    flow.close()
    assert_one_line_error(command("pipeline", "calibrate", low, high, out), "exists already")
    failed = command("pipeline", "calibrate", high, low, tmp_path / "no.zarr")
    assert_one_line_error(failed, "high.zarr and", "give the darker scene first")
    short = record(tmp_path / "short.zarr", [raw.frame(2000.0) for _ in range(3)])
    failed = command("pipeline", "calibrate", short, high, tmp_path / "no.zarr")
    assert_one_line_error(failed, "short.zarr: holds 3 frames")
    narrow = record(tmp_path / "narrow.zarr", [np.ones((20, 30), np.uint16)] * 16)
    failed = command("pipeline", "calibrate", low, narrow, tmp_path / "no.zarr")
    assert_one_line_error(failed, "narrow.zarr: frames are 30×20 up to 16383, those of")
    assert not (tmp_path / "no.zarr").exists()


def test_a_calibration_that_no_stage_uses_or_of_another_size_is_refused(found, tmp_path):
    write_calibration(tmp_path / "c.zarr", found.calibration)
    config = tmp_path / "config.yaml"
    config.write_text(f"sensor: {{calibration: {tmp_path / 'c.zarr'}}}\n")
    with pytest.raises(PipelineError, match="for the stage `calibrate`, which no node runs"):
        load_config(config)
    config.write_text(
        f"sensor: {{calibration: {tmp_path / 'c.zarr'}}}\n"
        "topology: {front: {stages: [calibrate, detect, crop]}}\n"
    )
    with pytest.raises(PipelineError, match=r"c.zarr: calibration is 96×80, frames are 64×64"):
        stage_context(load_config(config).sensor, SENSOR, (64, 64), "default")
    other = Sensor(full_scale=4095)
    with pytest.raises(
        PipelineError, match="was made at full scale 16383, but the sensor has 4095"
    ):
        stage_context(load_config(config).sensor, other, SHAPE, "default")


# --- stage ---------------------------------------------------------------------------------------


def calibrating(calibration=None, **config):
    stage = component("stage", "calibrate")
    return stage.build(stage.Config(**config), Context(SENSOR, calibration=calibration))


def test_saturated_pixels_stay_at_full_scale_and_none_goes_beyond(found):
    pixels = np.full(SHAPE, 16383, np.uint16)
    pixels[:40] = 16000
    corrected = calibrating(found.calibration).process(frame(pixels)).pixels_HW
    assert (corrected[40:] == 16383).all()
    assert corrected.max() == 16383
    assert corrected.dtype == np.uint16
    assert calibrating(found.calibration).process(frame(np.zeros(SHAPE, np.uint16))) is not None


def test_a_stage_without_anything_to_do_says_so():
    with pytest.raises(PipelineError, match=r"nothing to do; give sensor.calibration"):
        calibrating()


def test_frames_it_is_not_for_are_refused(found):
    with pytest.raises(PipelineError, match="the frame is 20×30, the calibration 96×80"):
        calibrating(found.calibration).process(frame(np.zeros((30, 20), np.uint16)))
    with pytest.raises(PipelineError, match="must be uint8 or uint16, got float32"):
        calibrating(found.calibration).process(frame(np.zeros(SHAPE, np.float32)))


def scene():
    sensor = Sensor(id="s", sigma_px=0.5, full_scale=16383, read_noise=5.0)
    settings = SceneSettings(
        seed=4, width=320, height=256, singles=12, groups=8, sensor=sensor, horizon=1.0
    )
    found = Scene(settings).frame(0)
    brightest = found.xy_px[np.argmax(found.intensity)]
    return found.pixels_HW, np.rint(brightest).astype(int)


def scene_frame():
    return scene()[0]


@pytest.mark.parametrize("axis", ["columns", "rows"])
def test_a_pattern_goes_and_targets_stay(axis, rng):
    clean, (x, y) = scene()
    pattern = rng.normal(0.0, 25.0, clean.shape[axis == "columns"])
    pattern = pattern if axis == "columns" else pattern[:, None]
    striped = np.clip(np.rint(clean + pattern), 0, 16383).astype(np.uint16)
    corrected = calibrating(remove=axis).process(frame(striped)).pixels_HW.astype(float)

    def stripes(image):
        rest = image - cv2.blur(image.astype(np.float32), (5, 1) if axis == "columns" else (1, 5))
        return np.median(rest, axis=0 if axis == "columns" else 1).std()

    assert stripes(striped) > 20.0
    assert stripes(corrected) < 0.1 * stripes(striped)

    def contrast(image):
        window = image[y - 5 : y + 6, x - 5 : x + 6].astype(float)
        return window[3:8, 3:8].sum() - 25 * np.median(window)

    assert contrast(clean) > 500.0
    assert_allclose(contrast(corrected), contrast(clean), atol=100.0)


def test_both_patterns_go(rng):
    clean = scene_frame()
    striped = clean + rng.normal(0, 25, clean.shape[1]) + rng.normal(0, 25, clean.shape[0])[:, None]
    corrected = calibrating(remove="both").process(frame(striped.clip(0).astype(np.uint16)))
    change = corrected.pixels_HW - clean.astype(float)
    fine = change - cv2.blur(change, (31, 31))
    assert fine.std() < 6.0  # was 35; what is left is from the clouds


def test_a_frame_without_pattern_hardly_changes():
    clean = scene_frame()
    for remove in ("columns", "rows"):
        after = calibrating(remove=remove).process(frame(clean)).pixels_HW
        assert (
            np.abs(after.astype(float) - clean).std() < 3.0
        )  # noise is 5 counts, and there are clouds


# --- into detection and refinement ---------------------------------------------------------------


def test_bad_pixels_of_a_calibration_reach_detection_and_the_patches(tmp_path):
    clean, (x, y) = scene()
    shape = clean.shape
    bad_HW = np.zeros(shape, np.bool_)
    bad_HW[y + 2, x] = True
    bad_HW[100, 100] = True
    pixels = clean.copy()
    pixels[bad_HW] = 16383
    unit = np.ones(shape, np.float32)
    write_calibration(tmp_path / "c.zarr", Calibration(unit, 0 * unit, bad_HW, 16383))
    config = tmp_path / "config.yaml"
    config.write_text(
        f"sensor: {{calibration: {tmp_path / 'c.zarr'}}}\n"
        "topology: {front: {stages: [calibrate, detect, crop]}}\n"
    )
    loaded = load_config(config)
    sensor = Sensor(id="s", sigma_px=0.5, full_scale=16383, read_noise=5.0)
    flow = build_flow(loaded, loaded.stage_names[:3], sensor, shape)
    patches, _ = flow.process(frame(pixels), Trace(0, {}))
    covers = [
        row
        for row, (x0, y0) in enumerate(patches.origin_px.tolist())
        if x0 <= x < x0 + 11 and y0 <= y + 2 < y0 + 11
    ]
    assert covers
    for row in covers:
        assert patches.flags[patches.group[row]] & Flag.BAD_PIXEL
        x0, y0 = patches.origin_px[row]
        assert not patches.usable_BHW[row, y + 2 - y0, x - x0]
        assert patches.counts_BHW[row, y + 2 - y0, x - x0] < 16000
    near = np.abs(patches.origin_px + 5 - [100, 100]).max(axis=1)
    assert (near > 4).all()  # nothing was seen at the other bad pixel
