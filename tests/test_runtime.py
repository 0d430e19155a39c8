"""Live runs: stopping, overload, dead processes. Every process here is real."""

import os
import re
import signal
import subprocess
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import BIN

from pipeline.component import Stage
from pipeline.messages import Dropped, Frame, FrameInfo, Trace
from pipeline.physics.sensor import Sensor
from pipeline.runtime.flow import Flow
from pipeline.runtime.topology import TOPOLOGY


def children(pid: int) -> list[int]:
    listed = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(child) for child in listed.read_text().split()] if listed.exists() else []


def workers(pid: int) -> list[int]:
    """Processes of the nodes, in the order of the topology."""
    listed = children(pid)
    return [n for n in listed if "spawn_main" in Path(f"/proc/{n}/cmdline").read_text()]


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return False
    return state != "Z"


def wait_for(condition, timeout_s: float = 30.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


@pytest.fixture
def run_dir():
    """Short, so that socket paths fit."""
    with tempfile.TemporaryDirectory(prefix="t") as folder:
        yield Path(folder)


def start(
    run_dir: Path, config: str, command: str = "run", *words: str, new_session: bool = False
) -> subprocess.Popen[str]:
    file = run_dir / "config.yaml"
    file.write_text(config)
    return subprocess.Popen(
        [str(BIN / "pipeline"), command, *words, "--config", str(file)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=new_session,
        env={**os.environ, "TMPDIR": str(run_dir), "PYTHONUNBUFFERED": "1"},
    )


SCENE = (
    "source: {{kind: synthetic, rate_hz: {rate}, width: 160, height: 128, singles: 3, groups: 2}}\n"
    'publish: {{endpoint: "ipc://{folder}/out"}}\n'
    "supervisor: {{name: {folder.name}}}\n"
)


def totals(stdout: str) -> tuple[int, int, int]:
    match = re.search(
        r"accounting: (\d+) in = (\d+) published \+ (\d+) dropped \(adds up\)", stdout
    )
    assert match, stdout
    frames_in, published, dropped = map(int, match.groups())
    return frames_in, published, dropped


def first_status(process: subprocess.Popen[str]) -> list[str]:
    """Lines up to the first that tells of published frames."""
    lines = []
    assert process.stdout
    while not re.match(r"[1-9]\d*\.\d frames/s", lines[-1] if lines else ""):
        line = process.stdout.readline()
        assert line, process.communicate()
        lines.append(line)
    return lines


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_live_run_drains_and_leaves_nothing_behind(run_dir, number):
    process = start(run_dir, SCENE.format(rate=20, folder=run_dir))
    first_status(process)
    nodes = children(process.pid)
    asked = time.monotonic()
    process.send_signal(number)
    stdout, stderr = process.communicate(timeout=30)
    assert time.monotonic() - asked < 5.0
    assert process.returncode == 0, stderr
    frames_in, published, dropped = totals(stdout)
    assert frames_in == published + dropped
    assert published > 0
    wait_for(lambda: not any(alive(node) for node in nodes), 5.0)
    assert list(run_dir.glob("irst-*")) == []


def test_overload_sheds_the_oldest_frames_visibly(run_dir):
    process = start(run_dir, SCENE.format(rate=2000, folder=run_dir))
    first_status(process)
    time.sleep(2.0)
    process.send_signal(signal.SIGTERM)
    stdout, stderr = process.communicate(timeout=30)
    assert process.returncode == 0, stderr
    frames_in, published, dropped = totals(stdout)
    assert dropped > 0
    assert frames_in == published + dropped
    assert "dropped at source" in stdout
    assert "oldest frame shed" in stdout


@pytest.mark.parametrize("row", [0, 1, 2])
def test_a_node_that_may_not_restart_ends_the_run_with_one_line(run_dir, row):
    config = SCENE.format(rate=20, folder=run_dir).replace("{name", "{restarts: 0, name")
    process = start(run_dir, config)
    first_status(process)
    nodes = children(process.pid)
    os.kill(workers(process.pid)[row], signal.SIGKILL)
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == 1
    name = TOPOLOGY[row].name
    assert re.fullmatch(rf"pipeline: node {name}\.0 died .*\n", stderr), stderr
    wait_for(lambda: not any(alive(node) for node in nodes), 5.0)
    assert list(run_dir.glob("irst-*")) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_run_told_to_stop_while_it_starts_ends_well(run_dir, number):
    process = start(run_dir, SCENE.format(rate=20, folder=run_dir), new_session=True)
    assert process.stdout
    assert "publishing" in process.stdout.readline()
    os.killpg(process.pid, number)  # to all, as a terminal does
    stdout, stderr = process.communicate(timeout=30)
    assert (process.returncode, stderr) == (0, "")
    totals(stdout)
    assert list(run_dir.glob("irst-*")) == []


def test_a_replay_told_to_stop_leaves_nothing_behind(run_dir, scene_recording):
    words = ("replay", str(scene_recording), "--rate", "2")
    process = start(run_dir, "publish: {}", *words)
    wait_for(lambda: len(children(process.pid)) >= 3)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode == 128 + signal.SIGTERM
    assert list(run_dir.glob("irst-*")) == []


def test_nodes_end_when_their_supervisor_is_killed(run_dir):
    process = start(run_dir, SCENE.format(rate=20, folder=run_dir))
    first_status(process)
    nodes = children(process.pid)
    assert len(nodes) >= 3
    os.kill(workers(process.pid)[1], signal.SIGSTOP)  # a stopped one must not stay either
    process.kill()
    process.communicate(timeout=30)
    wait_for(lambda: not any(alive(node) for node in nodes), 10.0)
    left = {path.name for path in run_dir.iterdir()}
    assert left == {"config.yaml"}, "no socket is left behind"


def test_a_source_that_ends_ends_the_run(run_dir):
    config = SCENE.format(rate=50, folder=run_dir).replace("groups: 2", "groups: 2, frames: 10")
    process = start(run_dir, config)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 0, stderr
    assert totals(stdout)[0] == 10


def test_check_prints_the_flow_and_runs_nothing(run_dir):
    process = start(run_dir, SCENE.format(rate=50, folder=run_dir), "check")
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 0, stderr
    for word in ("front", "detect crop", "unmix", "report", "all well"):
        assert word in stdout
    assert not (run_dir / "out").exists()


class _Trips(Stage[Frame, Frame]):
    def process(self, message: Frame) -> Frame:
        if message.info.seq == 1:
            raise ValueError("this frame\n  is cursed")
        return message


def test_a_frame_a_stage_trips_over_is_dropped_by_name_and_the_next_goes_on():
    trips = _Trips(None, Sensor())
    flow = Flow([("good", trips), ("never", trips)], clock=iter(range(100)).__next__)
    results = []
    for seq in range(3):
        info = FrameInfo(seq, "s", 0, "utc", (1, 1))
        frame = Frame(info, np.zeros((1, 1), dtype=np.uint8))
        results.append(flow.process(frame, Trace(0, {}))[0])
    assert [type(result) for result in results] == [Frame, Dropped, Frame]
    assert results[1] == Dropped(1, "good", "this frame is cursed")
    assert flow.process(results[1], Trace(0, {}))[0] is results[1]
