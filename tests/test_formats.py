"""Both zarr layouts: what is written is what is read, and nothing malformed gets through."""

import errno
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import zarr

from pipeline.errors import PipelineError
from pipeline.formats import open_any
from pipeline.formats.csist import CsistDataset, read_csist, save_csist, write_csist
from pipeline.formats.mosaic import Mosaic
from pipeline.formats.recording import Recording, RecordingWriter, open_recording
from pipeline.physics.groups import PROFILES
from pipeline.physics.psf import render
from pipeline.physics.sensor import Sensor

SENSOR = Sensor(id="lab", sigma_px=0.6, full_scale=16383, read_noise=4.0, gain=8.0, ifov_rad=1e-4)


def numbered_frame(index, shape=(13, 17)):
    return (np.arange(math.prod(shape)).reshape(shape) + 200 * index).astype(np.uint16)


def write_recording(path, frames=5, sensor=SENSOR, with_truth=True):
    with RecordingWriter(path, (13, 17), sensor) as writer:
        for index in range(frames):
            truth = {"xy_px": [[index + 0.25, 4.5]], "target_id": [7], "intensity": [500 + index]}
            writer.append(
                numbered_frame(index), 10**9 + index * 10**7, **(truth if with_truth else {})
            )
    return path


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    folder = tmp_path_factory.mktemp("originals")
    write_csist(folder / "csist.zarr", PROFILES["interior"], 20, seed=1)
    write_recording(folder / "recording.zarr")
    return folder


@pytest.fixture
def csist(originals, tmp_path):
    return Path(shutil.copytree(originals / "csist.zarr", tmp_path / "csist.zarr"))


@pytest.fixture
def recording(originals, tmp_path):
    return Path(shutil.copytree(originals / "recording.zarr", tmp_path / "recording.zarr"))


def one_line(error):
    """The message, checked to be a single line."""
    message = str(error.value)
    assert "\n" not in message
    return message


# --- CSIST ---------------------------------------------------------------------------------------


def test_csist_layout_is_the_contract(csist):
    group = zarr.open_group(str(csist), mode="r")
    layout = {name: (array.dtype.name, array.shape) for name, array in group.arrays()}
    assert layout == {
        "image": ("uint8", (20, 11, 11)),
        "target_count": ("uint8", (20,)),
        "target_xy_px": ("float32", (20, 5, 2)),
        "target_intensity": ("float32", (20, 5)),
    }
    assert group.metadata.zarr_format == 3
    assert group.attrs.asdict() == {
        "format": "csist",
        "format_version": 1,
        "profile": "interior",
        "seed": 1,
        "sigma_px": 0.5,
        "full_scale": 255,
        "read_noise": 0.0,
        "gain": None,
        "background": 0.0,
    }


def test_csist_truth_explains_the_images(csist):
    dataset = read_csist(csist)
    for image, truth in zip(dataset.image, dataset.truths(), strict=True):
        mean = render(truth[:, :2], truth[:, 2], (11, 11), dataset.sensor.sigma_px)
        # Rounding is half a count; the truth is stored in float32.
        np.testing.assert_allclose(image, np.clip(mean, 0, 255), atol=0.5 + 1e-3)


def test_csist_is_padded_with_nan(csist):
    dataset = read_csist(csist)
    present = np.arange(5) < dataset.target_count[:, None]
    assert set(dataset.target_count.tolist()) == {1, 2, 3, 4, 5}
    np.testing.assert_array_equal(np.isfinite(dataset.target_intensity), present)
    np.testing.assert_array_equal(np.isfinite(dataset.target_xy_px).all(axis=-1), present)
    np.testing.assert_array_equal(np.isnan(dataset.target_xy_px).all(axis=-1), ~present)


def test_field_profile_is_written_in_16_bits(tmp_path):
    write_csist(tmp_path / "field.zarr", PROFILES["field"], 3, seed=0)
    dataset = read_csist(tmp_path / "field.zarr")
    assert dataset.image.dtype == np.uint16
    assert dataset.background == 1000.0
    assert (dataset.sensor.gain, dataset.sensor.read_noise) == (8.0, 6.0)


def test_a_larger_dataset_begins_with_the_smaller(tmp_path, csist):
    counts = []
    write_csist(tmp_path / "large.zarr", PROFILES["interior"], 1030, 1, counts.append)
    large, small = read_csist(tmp_path / "large.zarr"), read_csist(csist)
    np.testing.assert_array_equal(large.image[:20], small.image)
    np.testing.assert_array_equal(large.target_xy_px[:20], small.target_xy_px)
    assert counts == [1024, 1030]
    assert (large.image[:6] != large.image[1024:]).any(axis=(1, 2)).all()  # a fresh stream


def test_seeds_differ(tmp_path, csist):
    write_csist(tmp_path / "other.zarr", PROFILES["interior"], 20, seed=2)
    assert (
        read_csist(tmp_path / "other.zarr").target_count != read_csist(csist).target_count
    ).any()


def test_imported_dataset_round_trip(tmp_path, csist):
    drawn = read_csist(csist)
    imported = CsistDataset(
        **{name: getattr(drawn, name)[:7] for name in ("image", "target_count")},
        **{name: getattr(drawn, name)[:7] for name in ("target_xy_px", "target_intensity")},
        sensor=drawn.sensor,
        profile="csist-100k",
        seed=None,
        background=0.0,
    )
    save_csist(tmp_path / "imported.zarr", imported)
    again = read_csist(tmp_path / "imported.zarr")
    assert (again.seed, again.profile, again.sensor) == (None, "csist-100k", drawn.sensor)
    for name in ("image", "target_count", "target_xy_px", "target_intensity"):
        np.testing.assert_array_equal(getattr(again, name), getattr(imported, name))


def test_an_existing_path_is_not_overwritten(csist):
    before = read_csist(csist).image
    with pytest.raises(PipelineError, match="exists already") as error:
        write_csist(csist, PROFILES["interior"], 5, seed=9)
    assert str(csist) in one_line(error)
    np.testing.assert_array_equal(read_csist(csist).image, before)


@pytest.mark.parametrize(("count", "seed", "what"), [(0, 1, "count"), (3, -1, "seed")])
def test_senseless_numbers_are_refused(tmp_path, count, seed, what):
    with pytest.raises(PipelineError, match=what):
        write_csist(tmp_path / "x.zarr", PROFILES["interior"], count, seed)
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_write_leaves_nothing(tmp_path):
    def interrupt(_done):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_csist(tmp_path / "x.zarr", PROFILES["interior"], 5, 1, interrupt)
    assert list(tmp_path.iterdir()) == []


def write_mosaic(path):
    write_csist(path, PROFILES["interior"], 5, seed=1)


@pytest.mark.parametrize("write", [write_mosaic, write_recording])
@pytest.mark.parametrize("writes", range(6))
def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch, write, writes):
    """Whichever file there is no room for, the group's own metadata first of all."""
    left = iter(range(writes))
    put = zarr.storage._local._put

    def full(*arguments, **named):
        if next(left, None) is None:
            raise OSError(errno.ENOSPC, "No space left on device")
        return put(*arguments, **named)

    monkeypatch.setattr("zarr.storage._local._put", full)
    with pytest.raises(
        PipelineError, match=r"x\.zarr: cannot be written \(No space left on"
    ) as error:
        write(tmp_path / "x.zarr")
    one_line(error)
    assert list(tmp_path.iterdir()) == []


def test_the_folder_is_made_if_need_be(tmp_path):
    write_csist(tmp_path / "new" / "x.zarr", PROFILES["interior"], 5, 1)
    assert len(read_csist(tmp_path / "new" / "x.zarr")) == 5


def test_writing_where_no_folder_can_be_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(PipelineError, match="cannot write there") as error:
        write_csist(tmp_path / "file" / "x.zarr", PROFILES["interior"], 5, 1)
    one_line(error)


# --- recordings ----------------------------------------------------------------------------------


def test_recording_layout_is_the_contract(recording):
    group = zarr.open_group(str(recording), mode="r")
    layout = {name: (array.dtype.name, array.shape) for name, array in group.arrays()}
    layout |= {f"truth/{name}": (a.dtype.name, a.shape) for name, a in group["truth"].arrays()}
    assert layout == {
        "frame": ("uint16", (5, 13, 17)),
        "timestamp_ns": ("int64", (5,)),
        "truth/frame_index": ("int32", (5,)),
        "truth/target_id": ("int32", (5,)),
        "truth/xy_px": ("float64", (5, 2)),
        "truth/intensity": ("float32", (5,)),
    }
    assert group["frame"].chunks == (1, 13, 17)
    assert group.attrs.asdict() == {
        "format": "irst-recording",
        "format_version": 1,
        "sensor": {
            "id": "lab",
            "sigma_px": 0.6,
            "full_scale": 16383,
            "read_noise": 4.0,
            "gain": 8.0,
            "ifov_rad": 1e-4,
        },
    }


def test_recording_round_trip(tmp_path):
    found = open_recording(write_recording(tmp_path / "r.zarr", frames=70))  # grows on the way
    assert (len(found), found.shape, found.sensor) == (70, (13, 17), SENSOR)
    for index in (0, 63, 64, 69):
        np.testing.assert_array_equal(found.frame(index), numbered_frame(index))
        np.testing.assert_array_equal(found.truth.of_frame(index), [[index + 0.25, 4.5]])
    np.testing.assert_array_equal(np.diff(found.timestamp_ns), 10**7)
    np.testing.assert_array_equal(found.truth.intensity, 500 + np.arange(70))


def test_recording_without_truth_or_shot_noise(tmp_path):
    sensor = Sensor(full_scale=255)
    with RecordingWriter(tmp_path / "r.zarr", (11, 11), sensor) as writer:
        writer.append(np.full((11, 11), 255, dtype=np.uint16), 1)
    found = open_recording(tmp_path / "r.zarr")
    assert found.truth is None
    assert found.sensor == sensor
    assert found.frame(0).dtype == np.uint8


def test_empty_truth_is_truth(tmp_path):
    with RecordingWriter(tmp_path / "r.zarr", (11, 11), SENSOR) as writer:
        empty = {"xy_px": np.empty((0, 2)), "target_id": [], "intensity": []}
        writer.append(np.zeros((11, 11), dtype=np.uint16), 1, **empty)
    assert open_recording(tmp_path / "r.zarr").truth.xy_px.shape == (0, 2)


def test_big_endian_version_2_groups_are_read(tmp_path):
    group = zarr.open_group(str(tmp_path / "r.zarr"), mode="w", zarr_format=2)
    group.attrs.update(
        {
            "format": "irst-recording",
            "format_version": 1,
            "sensor": {"sigma_px": 0.5, "full_scale": 4095, "read_noise": 0, "gain": None},
        }
    )
    stored = group.create_array("frame", shape=(1, 13, 17), chunks=(1, 13, 17), dtype=">u2")
    stored[0] = numbered_frame(3)
    group.create_array("timestamp_ns", data=np.zeros(1, dtype=np.int64))
    pixels = open_recording(tmp_path / "r.zarr").frame(0)
    assert pixels.dtype == np.uint16
    np.testing.assert_array_equal(pixels, numbered_frame(3))


@pytest.mark.parametrize(
    ("frame", "time_ns", "truth", "what"),
    [
        (np.zeros((12, 17), np.uint16), 9, {}, "shape"),
        (np.zeros((13, 17), np.float32), 9, {}, "uint8 or uint16"),
        (np.full((13, 17), 16384, np.uint16), 9, {}, "full scale"),
        (np.zeros((13, 17), np.uint16), 5, {}, "does not follow"),
        (np.zeros((13, 17), np.uint16), 9, {"xy_px": [[1, 2]]}, "needs target_id"),
        (
            np.zeros((13, 17), np.uint16),
            9,
            {"xy_px": [[1, 2]], "target_id": [1, 2], "intensity": [1]},
            "1 positions, 2 ids",
        ),
    ],
)
def test_writer_refuses_what_the_reader_would(tmp_path, frame, time_ns, truth, what):
    writer = RecordingWriter(tmp_path / "r.zarr", (13, 17), SENSOR)
    writer.append(numbered_frame(0), 5)
    with pytest.raises(ValueError, match=what):
        writer.append(frame, time_ns, **truth)
    writer.append(numbered_frame(1), 6)  # a refused frame spoils nothing
    writer.close()
    found = open_recording(tmp_path / "r.zarr")
    assert found.timestamp_ns.tolist() == [5, 6]
    np.testing.assert_array_equal(found.frame(1), numbered_frame(1))


def test_a_failed_recording_leaves_nothing(tmp_path):
    def record():
        with RecordingWriter(tmp_path / "r.zarr", (13, 17), SENSOR) as writer:
            writer.append(numbered_frame(0), 5)
            assert not (tmp_path / "r.zarr").exists()
            raise RuntimeError("camera gone")

    with pytest.raises(RuntimeError, match="camera gone"):
        record()
    assert list(tmp_path.iterdir()) == []


def test_a_path_taken_meanwhile_is_left_alone(tmp_path):
    writer = RecordingWriter(tmp_path / "r.zarr", (13, 17), SENSOR)
    writer.append(numbered_frame(0), 5)
    (tmp_path / "r.zarr").write_text("mine")
    with pytest.raises(PipelineError, match="exists already"):
        writer.close()
    assert [path.name for path in tmp_path.iterdir()] == ["r.zarr"]
    assert (tmp_path / "r.zarr").read_text() == "mine"


def test_frames_are_read_only_when_asked_for(recording):
    (recording / "frame" / "c" / "2" / "0" / "0").write_bytes(b"not a chunk")
    found = open_recording(recording)
    np.testing.assert_array_equal(found.frame(1), numbered_frame(1))
    with pytest.raises(PipelineError, match="frame 2 cannot be read") as error:
        found.frame(2)
    assert str(recording) in one_line(error)


def test_a_truncated_chunk_is_named(recording):
    chunk = recording / "frame" / "c" / "4" / "0" / "0"
    chunk.write_bytes(chunk.read_bytes()[:20])
    with pytest.raises(PipelineError, match="frame 4 cannot be read") as error:
        open_recording(recording).frame(4)
    one_line(error)


def test_a_lost_chunk_is_not_a_black_frame(recording):
    (recording / "frame" / "c" / "3" / "0" / "0").unlink()
    with pytest.raises(PipelineError, match="`frame` lacks 1 of its 5 chunks"):
        open_recording(recording)


def test_black_frames_of_other_writers_are_black(recording):
    group = zarr.open_group(str(recording), mode="r+")
    replace_array(group, "frame", np.zeros((5, 13, 17), np.uint16))
    assert open_recording(recording).frame(2).max() == 0


# --- which of the two ----------------------------------------------------------------------------


def test_open_any_tells_them_apart(csist, recording):
    assert isinstance(open_any(csist), Mosaic)
    assert isinstance(open_any(recording), Recording)


@pytest.mark.parametrize("opener", [open_any, open_recording, read_csist])
def test_what_is_no_such_file_is_one_line(tmp_path, recording, opener):
    with pytest.raises(PipelineError, match="no such file") as error:
        opener(tmp_path / "nothing.zarr")
    one_line(error)
    text = tmp_path / "notes.txt"
    text.write_text("not zarr")
    (tmp_path / "empty").mkdir()
    broken = []
    for number, metadata in enumerate(["{no json", "0", "null", "[]", '"zarr"']):
        broken.append(tmp_path / f"broken{number}")
        broken[-1].mkdir()
        (broken[-1] / "zarr.json").write_text(metadata)
    for path in (text, tmp_path / "empty", *broken, recording / "frame"):
        with pytest.raises(PipelineError, match="not a zarr group") as error:
            opener(path)
        assert str(path) in one_line(error)


def test_another_format_is_named(csist, recording):
    with pytest.raises(PipelineError, match='`format` must be "irst-recording", got "csist"'):
        open_recording(csist)
    with pytest.raises(PipelineError, match='`format` must be "csist", got "irst-recording"'):
        read_csist(recording)
    zarr.open_group(str(csist), mode="r+").attrs["format"] = "something"
    with pytest.raises(PipelineError, match='got "something"') as error:
        open_any(csist)
    one_line(error)


# --- malformed, by name --------------------------------------------------------------------------


def replace_array(group, name, data):
    del group[name]
    group.create_array(name, data=data)


def edit(name, change):
    """A fault: the array `name` becomes change(array)."""
    return lambda group: replace_array(group, name, change(group[name][...]))


def put(name, where, value):
    """A fault: one element of an array is another value."""

    def fault(group):
        group[name][where] = value

    return fault


def remove(name):
    return lambda group: group.__delitem__(name)


def attribute(name, value):
    return lambda group: group.attrs.__setitem__(name, value)


def no_attribute(name):
    return lambda group: group.attrs.__delitem__(name)


def sensor_attribute(name, value):
    def fault(group):
        sensor = dict(group.attrs["sensor"])
        if value is None:
            del sensor[name]
        else:
            sensor[name] = value
        group.attrs["sensor"] = sensor

    return fault


def truth_is_an_array(group):
    del group["truth"]
    group.create_array("truth", data=np.zeros(3))


def array_is_a_group(group):
    del group["timestamp_ns"]
    group.create_group("timestamp_ns")


RECORDING_FAULTS = {
    "no frame": (remove("frame"), "array `frame` is missing"),
    "no time": (remove("timestamp_ns"), "array `timestamp_ns` is missing"),
    "no truth column": (remove("truth/xy_px"), "array `truth/xy_px` is missing"),
    "float frames": (edit("frame", lambda a: a.astype("f4")), "`frame` must be uint8 or uint16"),
    "signed frames": (edit("frame", lambda a: a.astype("i2")), "`frame` must be uint8 or uint16"),
    "one flat frame": (edit("frame", lambda a: a[0]), "`frame` must have shape"),
    "float time": (edit("timestamp_ns", lambda a: a * 1.0), "`timestamp_ns` must be int64"),
    "short time": (edit("timestamp_ns", lambda a: a[:3]), r"`timestamp_ns` must have shape \(5\)"),
    "time stands": (put("timestamp_ns", 3, 0), "`timestamp_ns` must increase .*row 3"),
    "time is a group": (array_is_a_group, "`timestamp_ns` must be an array"),
    "truth is an array": (truth_is_an_array, "`truth` must be a group"),
    "truth dtype": (edit("truth/xy_px", lambda a: a.astype("f4")), "`truth/xy_px` must be float64"),
    "index wide": (
        edit("truth/frame_index", lambda a: a.astype("i8")),
        "`truth/frame_index` must be int32",
    ),
    "truth ragged": (edit("truth/intensity", lambda a: a[:2]), "`truth/intensity` must have shape"),
    "truth flat": (edit("truth/xy_px", lambda a: a[:, 0]), "`truth/xy_px` must have shape"),
    "index high": (put("truth/frame_index", 2, 5), r"`truth/frame_index` must lie in 0…4"),
    "index low": (put("truth/frame_index", 2, -1), r"`truth/frame_index` must lie in 0…4"),
    "truth nan": (put("truth/xy_px", (1, 0), np.nan), "`truth/xy_px` must be finite; row 1"),
    "bright inf": (put("truth/intensity", 4, np.inf), "`truth/intensity` must be finite; row 4"),
    "no format": (no_attribute("format"), "attribute `format` is missing"),
    "no version": (no_attribute("format_version"), "attribute `format_version` is missing"),
    "future": (attribute("format_version", 2), "attribute `format_version` is 2"),
    "no sensor": (no_attribute("sensor"), "attribute `sensor` is missing"),
    "sensor text": (attribute("sensor", "lab"), "attribute `sensor` must be a map"),
    "no sigma": (sensor_attribute("sigma_px", None), "attribute `sensor.sigma_px` is missing"),
    "no gain": (sensor_attribute("gain", None), "attribute `sensor.gain` is missing"),
    "sigma text": (sensor_attribute("sigma_px", "0.5"), "`sensor.sigma_px` must be a finite"),
    "sigma 0": (sensor_attribute("sigma_px", 0.0), "`sensor.sigma_px must be from 0.1"),
    "scale broken": (sensor_attribute("full_scale", 255.5), "`sensor.full_scale` must be a whole"),
    "gain negative": (sensor_attribute("gain", -1.0), "`sensor.gain must be positive"),
    "noise true": (sensor_attribute("read_noise", True), "`sensor.read_noise` must be a finite"),
    "id empty": (sensor_attribute("id", ""), "`sensor.id` must be a name"),
    "ifov text": (sensor_attribute("ifov_rad", "small"), "`sensor.ifov_rad` must be a finite"),
}

CSIST_FAULTS = {
    "no image": (remove("image"), "array `image` is missing"),
    "no count": (remove("target_count"), "array `target_count` is missing"),
    "no truth": (remove("target_xy_px"), "array `target_xy_px` is missing"),
    "image dtype": (edit("image", lambda a: a.astype("i4")), "`image` must be uint8 or uint16"),
    "image size": (edit("image", lambda a: a[:, :9]), r"`image` must have shape \(any, 11, 11\)"),
    "count dtype": (edit("target_count", lambda a: a.astype("i8")), "`target_count` must be uint8"),
    "count short": (
        edit("target_count", lambda a: a[:4]),
        r"`target_count` must have shape \(20\)",
    ),
    "xy dtype": (edit("target_xy_px", lambda a: a.astype("f8")), "`target_xy_px` must be float32"),
    "xy four": (edit("target_xy_px", lambda a: a[:, :4]), "`target_xy_px` must have shape"),
    "bright short": (edit("target_intensity", lambda a: a[1:]), "`target_intensity` must have"),
    "count six": (put("target_count", 3, 6), "`target_count` must not exceed 5; row 3"),
    "count wrong": (edit("target_count", lambda a: a % 5 + 1), "`target_xy_px` must be finite"),
    "bright nan": (
        put("target_intensity", (2, 0), np.nan),
        "`target_intensity` must .* row 2",
    ),
    "image bright": (attribute("full_scale", 200), "`image` must not exceed full_scale 200"),
    "no profile": (no_attribute("profile"), "attribute `profile` is missing"),
    "profile number": (attribute("profile", 3), "attribute `profile` must be a name"),
    "no seed": (no_attribute("seed"), "attribute `seed` is missing"),
    "seed text": (attribute("seed", "one"), "attribute `seed` must be a whole number"),
    "no background": (no_attribute("background"), "attribute `background` is missing"),
    "background nan": (attribute("background", math.nan), "`background` must be a finite number"),
    "no sigma": (no_attribute("sigma_px"), "attribute `sigma_px` is missing"),
    "scale huge": (attribute("full_scale", 10**6), "attribute `full_scale must be from 1"),
    "future": (attribute("format_version", "2"), "attribute `format_version` is '2'"),
}


def check_fault(path, fault, message, opener):
    fault(zarr.open_group(str(path), mode="r+"))
    with pytest.raises(PipelineError) as error:
        opener(path)
    text = one_line(error)
    assert text.startswith(f"{path}: ")
    assert re.search(message, text), text


def test_editing_by_itself_breaks_nothing(recording, csist):
    for path, name in ((recording, "truth/xy_px"), (csist, "target_count")):
        edit(name, lambda a: a)(zarr.open_group(str(path), mode="r+"))
        open_any(path)


@pytest.mark.parametrize("fault", RECORDING_FAULTS)
def test_malformed_recordings_are_refused_by_name(recording, fault):
    check_fault(recording, *RECORDING_FAULTS[fault], open_recording)


@pytest.mark.parametrize("fault", CSIST_FAULTS)
def test_malformed_datasets_are_refused_by_name(csist, fault):
    check_fault(csist, *CSIST_FAULTS[fault], read_csist)


@pytest.mark.parametrize("name", ["image", "target_count", "target_xy_px", "target_intensity"])
def test_damaged_chunks_of_a_dataset_are_named(csist, name):
    chunk = next(path for path in (csist / name / "c").rglob("*") if path.is_file())
    chunk.write_bytes(chunk.read_bytes()[:12])
    with pytest.raises(PipelineError, match=f"array `{name}` cannot be read") as error:
        read_csist(csist)
    one_line(error)


def test_damaged_metadata_is_named(recording):
    (recording / "frame" / "zarr.json").write_text("{}")
    with pytest.raises(PipelineError, match="array `frame` cannot be read") as error:
        open_recording(recording)
    one_line(error)
