"""What may happen to a folder while it is recorded into: taken away, shared, the clock wrong."""

import shutil

import numpy as np
import pytest
from test_recorder import frame

from pipeline.errors import RunError
from pipeline.formats import recording_folder
from pipeline.formats.live_recording import LiveRecordingWriter
from pipeline.formats.recording import open_recording
from pipeline.physics.sensor import Sensor
from pipeline.recorder import Recorder, record


def remove(path):
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def move(path):
    path.rename(path.with_name("elsewhere"))


@pytest.mark.parametrize("act", [remove, move])
@pytest.mark.parametrize("what", [".", "*.zarr", "*.zarr/zarr.json", "*.jsonl"])
@pytest.mark.parametrize("then", ["a frame", "the end"])
def test_a_recording_that_is_taken_away_ends_and_is_no_success(tmp_path, act, what, then):
    folder = tmp_path / "recordings"
    recorder = Recorder(folder, max_bytes=1 << 30, keep=None)
    for seq in range(3):
        recorder.add_frame(frame(seq, seq), Sensor(id="roof"))
    act(next(folder.glob(what)) if what != "." else folder)
    left = sorted(tmp_path.rglob("*"))
    if then == "a frame":
        with pytest.raises(RunError, match=r"roof-.*\.zarr: moved or removed"):
            recorder.add_frame(frame(3, 3), Sensor(id="roof"))
    with pytest.raises(RunError, match=r"roof-.*\.zarr: moved or removed"):
        recorder.close()
    if what != "*.jsonl":
        assert sorted(tmp_path.rglob("*")) == left, "nothing is made again"


@pytest.mark.parametrize("what", ["frame", "frame/c/1", "timestamp_ns", "timestamp_ns/c"])
def test_a_recording_of_which_a_part_is_missing_is_no_success(tmp_path, what):
    writer = LiveRecordingWriter(tmp_path / "one.zarr", (16, 16), Sensor(id="roof"))
    for t_ns in range(3):
        writer.append(np.ones((16, 16), np.uint16), t_ns)
    shutil.rmtree(tmp_path / "one.zarr" / what)
    writer.append(np.ones((16, 16), np.uint16), 3)
    with pytest.raises(RunError, match=r"moved or removed|not readable"):
        writer.close()


def test_a_recording_without_frames_is_one_too(tmp_path):
    LiveRecordingWriter(tmp_path / "one.zarr", (16, 16), Sensor(id="roof")).close()
    assert len(open_recording(tmp_path / "one.zarr")) == 0


def test_a_folder_that_was_moved_and_is_back_is_no_matter(tmp_path):
    folder = tmp_path / "recordings"
    recorder = Recorder(folder, max_bytes=1 << 30, keep=None)
    recorder.add_frame(frame(0, 0), Sensor(id="roof"))
    folder.rename(tmp_path / "elsewhere").rename(folder)
    recorder.add_frame(frame(1, 1), Sensor(id="roof"))
    recorder.close()
    (path,) = folder.glob("*.zarr")
    assert len(open_recording(path)) == 2


def test_the_command_says_what_was_taken_away_and_how_far_it_came(tmp_path, monkeypatch):
    class Frames:
        def __init__(self, endpoint):
            self.seq = -1

        def connected(self, timeout_s):
            return True

        def receive(self, timeout_s):
            self.seq += 1
            if self.seq == 5:
                shutil.rmtree(tmp_path / "recordings")
            return frame(self.seq, self.seq), Sensor(id="roof")

        def close(self):
            pass

    class Targets:
        def __init__(self, endpoint, keys):
            pass

        def receive(self, timeout_s):
            return None

        def close(self):
            pass

    monkeypatch.setattr("pipeline.recorder.FrameSubscriber", Frames)
    monkeypatch.setattr("pipeline.recorder.Subscriber", Targets)
    monkeypatch.setattr("os.nice", lambda by: 0)
    with pytest.raises(RunError, match=r"moved or removed.*; 5 frames were written") as error:
        record("out", "frames", tmp_path / "recordings", 1 << 30, None, None, lambda: False)
    assert error.value.exit_code == 1
    assert not (tmp_path / "recordings").exists()


def test_recorders_that_share_a_folder_take_nothing_from_each_other(tmp_path, monkeypatch, caplog):
    first, second = (Recorder(tmp_path, max_bytes=1 << 30, keep=1) for _ in range(2))
    with monkeypatch.context() as patched:  # neither sees what the other has just begun
        patched.setattr("pipeline.formats.recording_folder.recordings", lambda folder, sensor: [])
        for recorder in (first, second):
            recorder.add_frame(frame(0, 0), Sensor(id="roof"))
    third = Recorder(tmp_path, max_bytes=1 << 30, keep=1)
    third.add_frame(frame(0, 0), Sensor(id="roof"))
    assert caplog.messages == []
    for recorder in (first, second, third):
        recorder.add_frame(frame(1, 1), Sensor(id="roof"))
        recorder.close()
    paths = sorted(tmp_path.glob("*.zarr"))
    assert [len(open_recording(path)) for path in paths] == [2, 2, 2]
    first.add_frame(frame(2, 2), Sensor(id="roof"))
    assert len(caplog.messages) == 3, "now each is finished, and said to be deleted"
    assert not any(path.exists() for path in paths)
    first.close()


def test_the_oldest_is_the_first_made_whatever_the_clock_said(tmp_path):
    (tmp_path / "roof-20990101T000000Z-0000.zarr").mkdir()  # the clock was wrong then
    for number in range(3):
        recorder = Recorder(tmp_path, max_bytes=1 << 30, keep=2)
        recorder.add_frame(frame(0, number), Sensor(id="roof"))
        recorder.close()
    kept = sorted(tmp_path.glob("*.zarr"))
    assert [open_recording(path).timestamp_ns.tolist() for path in kept] == [[1], [2]]


def test_of_what_another_recorder_has_just_deleted_nothing_is_left(tmp_path, monkeypatch, caplog):
    gone = tmp_path / "roof-20990101T000000Z-0000.zarr"
    monkeypatch.setattr(recording_folder, "recordings", lambda folder, sensor: [gone])
    recording_folder.make_room(tmp_path, "roof", keep=0)
    assert list(tmp_path.iterdir()) == []
    assert "cannot" not in caplog.text


@pytest.mark.parametrize(
    "times", [[2**63 - 1, 2**63 - 1, 5], [-(2**63), 10, 11], [-(2**63), -(2**63), -(2**63)]]
)
def test_frames_whose_time_is_beyond_reason_are_kept_at_another(tmp_path, times):
    recorder = Recorder(tmp_path, max_bytes=1 << 30, keep=None, clock_s=lambda: 0.0)
    for seq, t_ns in enumerate(times):
        recorder.add_frame(frame(seq, t_ns), Sensor(id="roof"))
    (path,) = tmp_path.glob("*.zarr")
    assert len(open_recording(path)) == 3, "as if killed now"
    recorder.close()
    assert len(open_recording(path)) == recorder.frames == 3
    assert recorder.retimed == sum(abs(t_ns) > 2**62 or t_ns == 5 for t_ns in times)
