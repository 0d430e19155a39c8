"""Recording a live run: nothing disturbed, nothing lost by a kill, the same targets again."""

import json
import os
import re
import signal
import subprocess
import sys

import numpy as np
import pytest
from conftest import BIN, assert_one_line_error
from test_runtime import run_dir as run_dir
from test_runtime import start, totals, wait_for

from pipeline.errors import PipelineError
from pipeline.formats.live_recording import LiveRecordingWriter
from pipeline.formats.recording import open_recording
from pipeline.messages import Frame, FrameInfo
from pipeline.physics.sensor import Sensor
from pipeline.recorder import Recorder

CONFIG = """
source: {{kind: synthetic, rate_hz: 15, width: 160, height: 128, singles: 3, groups: 2{frames}}}
publish: {{endpoint: "ipc://{folder}/out", frames: "ipc://{folder}/frames", wait_for: 1}}
topology: {{front: {{queue: 200}}}}
supervisor: {{name: {folder.name}, max_age_ms: 20000}}
"""


def recorder(run_dir, *words):
    return subprocess.Popen(
        [
            *(str(BIN / "pipeline"), "record", f"ipc://{run_dir}/out", f"ipc://{run_dir}/frames"),
            *(str(run_dir / "recordings"), *words),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def by_time(lines):
    messages = [json.loads(line) for line in lines.splitlines()]
    return {message["t_exposure_ns"]: message["targets"] for message in messages}


def test_a_recording_replays_to_the_targets_that_were_published(run_dir, command):
    process = start(run_dir, CONFIG.format(folder=run_dir, frames=", frames: 45"))
    writer = recorder(run_dir, "--max-gb", "0.001")
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 0, stderr
    said, errors = writer.communicate(timeout=30)
    assert writer.returncode == 0, errors
    assert "recorded 45 frames and 45 target messages" in said
    assert "; 0 were not seen" in said
    assert totals(stdout)[1] == 45
    recordings = sorted((run_dir / "recordings").glob("*.zarr"))
    assert len(recordings) == 2, "160 × 128 × 2 bytes, 25 frames a megabyte"
    published, again = {}, {}
    for path in recordings:
        published |= by_time(path.with_suffix(".targets.jsonl").read_text())
    for path in recordings[:1]:
        out = run_dir / "out.jsonl"
        result = command("pipeline", "replay", path, "--in-process", "--out", out)
        assert result.returncode == 0, result.stderr
        again |= by_time(out.read_text())
    assert len(published) == 45
    assert len(again) == 25
    assert again == {t_ns: published[t_ns] for t_ns in again}


def test_what_was_recorded_before_a_kill_can_be_read(run_dir):
    process = start(run_dir, CONFIG.format(folder=run_dir, frames=""))
    writer = recorder(run_dir)
    folder = run_dir / "recordings"
    wait_for(lambda: len(list(folder.glob("*.zarr/frame/c/*"))) > 20)
    writer.kill()
    writer.communicate()
    (path,) = folder.glob("*.zarr")
    recording = open_recording(path)
    assert len(recording) >= 19
    for index in range(len(recording)):
        assert recording.frame(index).any()
    process.send_signal(signal.SIGTERM)
    stdout, stderr = process.communicate(timeout=30)
    assert process.returncode == 0, stderr
    assert totals(stdout)[2] == 0, "the run does not notice"


KILLED = """
import os, signal, sys
from pathlib import Path
import numpy as np
from pipeline.formats.live_recording import LiveRecordingWriter
from pipeline.physics.sensor import Sensor
writer = LiveRecordingWriter(Path(sys.argv[1]), (16, 16), Sensor(id="roof"))
for number in range(300):
    writer.append(np.full((16, 16), number, np.uint16), number)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_each_whole_frame_before_a_kill_is_there(tmp_path):
    path = tmp_path / "cut.zarr"
    subprocess.run([sys.executable, "-c", KILLED, path], check=False)
    recording = open_recording(path)
    assert recording.timestamp_ns.tolist() == list(range(300))
    assert [int(recording.frame(index)[0, 0]) for index in range(300)] == list(range(300))


def test_a_finished_recording_is_as_any_other(tmp_path):
    writer = LiveRecordingWriter(tmp_path / "one.zarr", (16, 16), Sensor(id="roof"))
    writer.append(np.ones((16, 16), np.uint16), 5)
    with pytest.raises(ValueError, match="does not follow"):
        writer.append(np.ones((16, 16), np.uint16), 5)
    writer.close()
    recording = open_recording(tmp_path / "one.zarr")
    assert len(recording) == 1
    assert recording.stored.shape == (1, 16, 16)
    with pytest.raises(PipelineError, match="exists already"):
        LiveRecordingWriter(tmp_path / "one.zarr", (16, 16), Sensor())


def frame(seq, t_ns):
    return Frame(FrameInfo(seq, "roof", t_ns, "utc", (16, 16)), np.ones((16, 16), np.uint16))


def test_old_recordings_make_room_and_time_that_jumps_back_begins_a_new_one(tmp_path):
    recorder = Recorder(tmp_path, max_bytes=2 * 512, keep=2)
    times = [10, 20, 30, 40, 5, 6]
    for seq, t_ns in enumerate(times):
        recorder.add_frame(frame(seq + (seq > 2), t_ns), Sensor(id="roof"))
    recorder.close()
    kept = sorted(tmp_path.glob("*.zarr"))
    assert [open_recording(path).timestamp_ns.tolist() for path in kept] == [[30, 40], [5, 6]]
    assert len(list(tmp_path.glob("*.jsonl"))) == 2
    assert (recorder.frames, recorder.missed) == (6, 1)


def test_where_time_stands_still_nothing_is_rotated_or_lost(tmp_path, caplog):
    recorder = Recorder(tmp_path, max_bytes=1 << 30, keep=2, clock_s=lambda: 0.0)
    for seq, t_ns in enumerate([10, 20, 20, 20, 21, 40]):
        recorder.add_frame(frame(seq, t_ns), Sensor(id="roof"))
    recorder.close()
    (path,) = tmp_path.glob("*.zarr")
    assert open_recording(path).timestamp_ns.tolist() == [10, 20, 21, 22, 23, 40]
    assert recorder.retimed == 3
    assert len(caplog.messages) == 1 and "does not advance" in caplog.text


def test_time_that_jumps_back_again_and_again_rotates_once_a_second(tmp_path):
    clock = iter(range(1000))
    recorder = Recorder(tmp_path, 1 << 30, keep=None, clock_s=lambda: 0.3 * next(clock))
    for seq in range(20):
        recorder.add_frame(frame(seq, 1000 - seq), Sensor(id="roof"))
    recorder.close()
    lengths = [len(open_recording(path)) for path in tmp_path.glob("*.zarr")]
    assert sum(lengths) == recorder.frames == 20
    assert len(lengths) <= 8, "the clock has been asked for less than 8 s"
    assert min(lengths[:-1]) >= 2


def test_recordings_of_recorders_before_are_counted_and_make_room(tmp_path):
    others = tmp_path / "other-20200101T000000Z-0000.zarr", tmp_path / "roof-by-hand.zarr"
    for path in others:
        path.mkdir()
    for number in range(5):  # each a process of its own, in life
        recorder = Recorder(tmp_path, max_bytes=1 << 30, keep=5 if number < 4 else 2)
        recorder.add_frame(frame(0, number), Sensor(id="roof"))
        recorder.add_message({"schema": "irst.targets/1"})
        recorder.close()
        assert len(list(tmp_path.glob("roof-2*.zarr"))) == (number + 1 if number < 4 else 2)
    kept = [path for path in sorted(tmp_path.glob("*.zarr")) if path not in others]
    assert [open_recording(path).timestamp_ns.tolist() for path in kept] == [[3], [4]]
    assert len(list(tmp_path.glob("*.jsonl"))) == 2
    assert all(path.exists() for path in others)


@pytest.mark.patient
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_recording_nothing_is_no_success(run_dir, number):
    writer = recorder(run_dir)
    assert "nothing from" in writer.stderr.readline()
    os.kill(writer.pid, number)
    _, stderr = writer.communicate(timeout=20)
    assert writer.returncode == 1
    assert "publish.frames" in stderr


@pytest.mark.patient
def test_targets_that_never_come_are_said_and_a_recorder_told_to_end_ends_well(run_dir):
    process = start(run_dir, CONFIG.format(folder=run_dir, frames="").replace("wait_for: 1", ""))
    folder = run_dir / "recordings"
    words = (f"ipc://{run_dir}/nobody", f"ipc://{run_dir}/frames", str(folder))
    writer = subprocess.Popen(
        [str(BIN / "pipeline"), "record", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    warning = ""
    while f"nothing from ipc://{run_dir}/nobody for " not in warning:
        warning = writer.stderr.readline()
        assert warning, writer.communicate()
    writer.send_signal(signal.SIGTERM)
    said, errors = writer.communicate(timeout=30)
    assert (writer.returncode, errors) == (0, "")
    assert re.fullmatch(r"recorded \d+ frames and 0 target messages in .*\n", said), said
    (path,) = folder.glob("*.zarr")
    assert f"recorded {len(open_recording(path))} frames" in said
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)


def test_addresses_in_the_wrong_order_are_one_line(run_dir, command):
    process = start(run_dir, CONFIG.format(folder=run_dir, frames="").replace("wait_for: 1", ""))
    wait_for((run_dir / "frames").exists)
    swapped = f"ipc://{run_dir}/frames", f"ipc://{run_dir}/out"
    result = command("pipeline", "record", *swapped, run_dir / "recordings")
    assert_one_line_error(result, f"{run_dir}/out", "no frames", "publish.frames")
    assert not list(run_dir.glob("recordings/*"))
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)


def test_what_could_never_be_recorded_is_said_before_anything_is_waited_for(command, tmp_path):
    words = "pipeline", "record", f"ipc://{tmp_path}/out", f"ipc://{tmp_path}/frames"
    assert_one_line_error(command(*words, "/proc/self"), "/proc/self", "cannot be written")
    result = command(*words, tmp_path / "recordings", "--keys", tmp_path / "none")
    assert_one_line_error(result, f"{tmp_path}/none/client.key_secret")
    assert list(tmp_path.iterdir()) == []


def test_an_address_that_is_none_is_named(command, tmp_path):
    result = command("pipeline", "record", "tcp://127.0.0.1:1", "nowhere", tmp_path)
    assert_one_line_error(result, "nowhere", "not an endpoint")
