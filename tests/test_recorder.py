"""Recording a live run: nothing disturbed, nothing lost by a kill, the same targets again."""

import json
import os
import signal
import subprocess
import sys
import time

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
    assert "recorded 45 frames" in said
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


def test_recording_nothing_is_no_success(run_dir):
    writer = recorder(run_dir)
    time.sleep(4)
    os.kill(writer.pid, signal.SIGINT)
    _, stderr = writer.communicate(timeout=20)
    assert writer.returncode == 1
    assert "publish.frames" in stderr


def test_an_address_that_is_none_is_named(command, tmp_path):
    result = command("pipeline", "record", "tcp://127.0.0.1:1", "nowhere", tmp_path)
    assert_one_line_error(result, "nowhere", "not an endpoint")
