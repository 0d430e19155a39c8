"""Recordings, mosaics and videos as sources: the frames they give, how they end and fail."""

import threading
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
from pydantic import ValidationError

from pipeline.component import component
from pipeline.errors import PipelineError
from pipeline.formats.csist import read_csist, write_csist
from pipeline.formats.recording import RecordingWriter
from pipeline.messages import Tiling
from pipeline.physics.groups import PROFILES
from pipeline.physics.sensor import Sensor

CLIPS = sorted((Path(__file__).parent / "data").glob("*.mp4"))


def build(kind, sensor=None, **settings):
    source = component("source", kind)
    return source.build(source.Config(**settings), sensor or {})


def write_recording(path, frames, shape=(12, 20)):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 4096, (frames, *shape)).astype(np.uint16)
    with RecordingWriter(path, shape, Sensor(id="cam", full_scale=4095)) as writer:
        for index, frame in enumerate(pixels):
            writer.append(frame, 1000 + 7 * index)
    return pixels


def read_ahead_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("read-ahead")]


def collect(frames, given):
    """Append the frames one by one, so that those before an error are kept."""
    for frame in frames:
        given.append(frame)


# --- recording -----------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [1, 30])
def test_recording_gives_every_frame_in_order(tmp_path, number):
    pixels = write_recording(tmp_path / "r.zarr", number)
    source = build("zarr_recording", path=tmp_path / "r.zarr")
    assert (source.length, source.shape, source.truth) == (number, (12, 20), None)
    frames = list(source.frames())
    assert [frame.info.seq for frame in frames] == list(range(number))
    assert [frame.info.t_exposure_ns for frame in frames] == [1000 + 7 * k for k in range(number)]
    np.testing.assert_array_equal([frame.pixels_HW for frame in frames], pixels)
    info = frames[0].info
    assert (info.sensor_id, info.clock, info.shape) == ("cam", "recording", (12, 20))
    assert (info.flags, info.tiling) == ((), None)
    assert read_ahead_threads() == []


def test_recording_can_be_played_twice(tmp_path):
    pixels = write_recording(tmp_path / "r.zarr", 3)
    source = build("zarr_recording", path=tmp_path / "r.zarr")
    for _ in range(2):
        np.testing.assert_array_equal([f.pixels_HW for f in source.frames()], pixels)


def test_configured_sensor_overrides_the_recorded_one(tmp_path):
    write_recording(tmp_path / "r.zarr", 1)
    source = build("zarr_recording", {"sigma_px": 0.7, "id": "west"}, path=tmp_path / "r.zarr")
    assert source.sensor == Sensor(id="west", sigma_px=0.7, full_scale=4095)
    assert next(source.frames()).info.sensor_id == "west"


def test_small_frames_are_refused_at_opening(tmp_path):
    write_recording(tmp_path / "r.zarr", 1, shape=(10, 40))
    with pytest.raises(PipelineError, match=r"frames are 40×10 px, smaller than the 11×11"):
        build("zarr_recording", path=tmp_path / "r.zarr")


def test_a_damaged_frame_surfaces_after_the_good_ones(tmp_path):
    write_recording(tmp_path / "r.zarr", 12)
    (tmp_path / "r.zarr" / "frame" / "c" / "9" / "0" / "0").write_bytes(b"")
    given = []
    with pytest.raises(PipelineError, match="frame 9 cannot be read"):
        collect(build("zarr_recording", path=tmp_path / "r.zarr").frames(), given)
    assert [frame.info.seq for frame in given] == list(range(9))
    assert read_ahead_threads() == []


def test_closing_ends_the_frames_and_the_thread(tmp_path):
    write_recording(tmp_path / "r.zarr", 40)
    source = build("zarr_recording", path=tmp_path / "r.zarr")
    frames = source.frames()
    next(frames)
    source.close()
    assert list(frames) == []
    assert read_ahead_threads() == []


def test_closing_wakes_a_source_that_waits_for_its_rate(tmp_path):
    write_recording(tmp_path / "r.zarr", 3)
    source = build("zarr_recording", path=tmp_path / "r.zarr", rate_hz=0.001)
    frames = source.frames()
    next(frames)
    threading.Timer(0.05, source.close).start()
    assert list(frames) == []  # without close: in 1000 s, and the test would time out


def test_leaving_early_stops_the_thread(tmp_path):
    write_recording(tmp_path / "r.zarr", 40)
    frames = build("zarr_recording", path=tmp_path / "r.zarr").frames()
    next(frames)
    frames.close()
    assert read_ahead_threads() == []


def test_no_frame_comes_before_it_is_due(tmp_path):
    write_recording(tmp_path / "r.zarr", 4)
    source = build("zarr_recording", path=tmp_path / "r.zarr", rate_hz=50.0)
    frames = source.frames()
    next(frames)
    first_s = time.monotonic()
    after_s = [time.monotonic() - first_s for _ in frames]
    # The schedule began a moment before `first_s`; a loaded machine can only be later.
    assert len(after_s) == 3
    assert after_s[2] > 0.04


@pytest.mark.parametrize("rate_hz", [0.0, -1.0])
def test_rates_are_positive(rate_hz):
    with pytest.raises(ValidationError):
        component("source", "zarr_recording").Config(path="x", rate_hz=rate_hz)


# --- mosaic --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mosaic(tmp_path_factory):
    path = tmp_path_factory.mktemp("mosaic") / "field.zarr"
    write_csist(path, PROFILES["field"], 300, seed=5)
    return read_csist(path), build("zarr_recording", path=path)


def test_mosaic_holds_every_image_in_its_tile(mosaic):
    dataset, source = mosaic
    assert (source.length, source.shape) == (2, (256, 256))
    frames = list(source.frames())
    assert frames[0].info.tiling == Tiling(size_px=11, pitch_px=16)
    assert frames[0].info.clock == "recording"
    for image in (0, 1, 16, 255, 256, 299):
        row, column = divmod(image % 256, 16)
        y, x = 16 * row, 16 * column
        tile = frames[image // 256].pixels_HW[y : y + 11, x : x + 11]
        np.testing.assert_array_equal(tile, dataset.image[image])


def test_mosaic_is_background_elsewhere(mosaic):
    first, last = (frame.pixels_HW for frame in mosaic[1].frames())
    gutter = np.arange(256) % 16 >= 11
    assert set(first[gutter].ravel()) == set(first[:, gutter].ravel()) == {1000}
    assert set(last[48:].ravel()) == {1000}  # 44 images: rows 0–1 of tiles and 12 of row 2
    assert set(last[32:48, 12 * 16 :].ravel()) == {1000}
    assert last.dtype == np.uint16


def test_mosaic_truth_lies_on_its_images(mosaic):
    dataset, source = mosaic
    truth = source.truth
    assert len(truth.xy_px) == dataset.target_count.sum()
    assert len(set(truth.target_id.tolist())) == len(truth.target_id)
    tile = np.floor((truth.xy_px + 0.5) / 16).astype(int)
    image = 256 * truth.frame_index + 16 * tile[:, 1] + tile[:, 0]
    np.testing.assert_array_equal(np.bincount(image), dataset.target_count)
    for chosen in (0, 17, 299):
        rows, wanted = image == chosen, dataset.truths()[chosen]
        np.testing.assert_allclose(truth.xy_px[rows] - 16 * tile[rows], wanted[:, :2])
        np.testing.assert_array_equal(truth.intensity[rows], wanted[:, 2])


# --- video ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("clip", CLIPS, ids=lambda path: path.stem)
def test_real_clips_decode_to_their_last_frame(clip):
    source = build("video", path=clip)
    assert source.shape == (256, 320)
    assert (source.sensor.id, source.sensor.full_scale) == ("video", 255)
    frames = list(source.frames())
    assert len(frames) == source.length == {"IR_AIRPLANE_006": 301, "IR_DRONE_040": 305}[clip.stem]
    assert [frame.info.seq for frame in frames] == list(range(len(frames)))
    assert all(frame.pixels_HW.dtype == np.uint8 for frame in frames)
    assert all(frame.pixels_HW.shape == (256, 320) for frame in frames)
    assert np.mean([frame.pixels_HW.std() for frame in frames]) > 20  # pictures, not grey
    info = frames[30].info
    assert (info.t_exposure_ns, info.clock, info.flags) == (10**9, "video", ("compressed",))


def test_clips_are_there():
    assert [clip.stem for clip in CLIPS] == ["IR_AIRPLANE_006", "IR_DRONE_040"]


def test_looping_video_goes_on_in_time():
    source = build("video", path=CLIPS[0], loop=True)
    assert source.length is None
    frames = source.frames()
    played = [next(frames) for _ in range(303)]
    np.testing.assert_array_equal(played[0].pixels_HW, played[301].pixels_HW)
    assert [frame.info.seq for frame in played] == list(range(303))
    assert (np.diff([frame.info.t_exposure_ns for frame in played]) > 0).all()
    source.close()
    assert list(frames) == []


def write_video(path, fourcc, frames, rate_hz=20.0, depth=cv2.CV_8U):
    height, width = frames[0].shape[:2]
    options = [cv2.VIDEOWRITER_PROP_DEPTH, depth, cv2.VIDEOWRITER_PROP_IS_COLOR, 0]
    code = cv2.VideoWriter_fourcc(*fourcc)
    writer = cv2.VideoWriter(str(path), cv2.CAP_FFMPEG, code, rate_hz, (width, height), options)
    for frame in frames:
        writer.write(frame)
    writer.release()
    return path


def test_16_bit_grey_is_kept(tmp_path):
    rng = np.random.default_rng(1)
    pictures = rng.integers(0, 65536, (7, 48, 64)).astype(np.uint16)
    write_video(tmp_path / "grey16.mkv", "FFV1", pictures, depth=cv2.CV_16U)
    source = build("video", path=tmp_path / "grey16.mkv")
    assert source.sensor.full_scale == 65535
    np.testing.assert_array_equal([f.pixels_HW for f in source.frames()], pictures)


def test_video_too_small_is_refused(tmp_path):
    write_video(tmp_path / "small.avi", "FFV1", [np.zeros((8, 32), np.uint8)] * 3)
    with pytest.raises(PipelineError, match=r"frames are 32×8 px, smaller than the 11×11"):
        build("video", path=tmp_path / "small.avi")


def test_a_video_cut_short_says_so(tmp_path):
    rng = np.random.default_rng(1)
    pictures = rng.integers(0, 256, (40, 48, 64)).astype(np.uint8)
    whole = write_video(tmp_path / "whole.avi", "FFV1", pictures).read_bytes()
    cut = tmp_path / "cut.avi"
    cut.write_bytes(whole[: len(whole) // 2])
    frames = build("video", path=cut).frames()
    given = []
    with pytest.raises(PipelineError, match=r"decoding ended after \d+ of 40 frames") as error:
        collect(frames, given)
    assert error.value.exit_code == 2, "to try again is of no use"
    assert 10 < len(given) < 30


@pytest.mark.parametrize("suffix", ["png", "tiff", "jpg", "bmp"])
def test_a_picture_is_no_video(tmp_path, suffix):
    path = tmp_path / f"frame.{suffix}"
    cv2.imwrite(str(path), np.zeros((48, 64), np.uint8))
    with pytest.raises(PipelineError, match="a picture; `pipeline convert` makes a recording"):
        build("video", path=path)


@pytest.mark.parametrize("content", [b"", b"this is no video" * 50])
def test_what_is_no_video_is_one_line(tmp_path, capfd, content):
    path = tmp_path / "clip.mp4"
    path.write_bytes(content)
    with pytest.raises(PipelineError, match=r"not a video .*; copy it again if") as error:
        build("video", path=path)
    assert "\n" not in str(error.value)
    assert capfd.readouterr().err == ""


def test_a_missing_video_is_one_line(tmp_path):
    for path in (tmp_path / "none.mp4", tmp_path):
        with pytest.raises(PipelineError, match="no such file"):
            build("video", path=path)


def test_video_sensor_can_be_configured():
    source = build("video", {"sigma_px": 1.2, "id": "roof"}, path=CLIPS[0])
    assert (source.sensor.sigma_px, source.sensor.id) == (1.2, "roof")
    with pytest.raises(PipelineError, match="sigma_px must be"):
        build("video", {"sigma_px": 50.0}, path=CLIPS[0])
