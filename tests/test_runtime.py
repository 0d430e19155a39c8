"""Live runs: stopping, overload, dead processes. Every process here is real."""

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
from conftest import BIN

from engines.loader import MODELS
from engines.manifest import sha256_of
from pipeline.client import Subscriber
from pipeline.component import Stage
from pipeline.config import load_config, open_source
from pipeline.messages import Dropped, Frame, FrameInfo, Trace
from pipeline.physics.sensor import Sensor
from pipeline.runtime import replay
from pipeline.runtime.flow import Flow
from pipeline.runtime.listener import Listener
from pipeline.runtime.run_folder import tend
from pipeline.runtime.topology import TOPOLOGY
from pipeline.watch import read_figures


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


def spares(pid, number):
    """True if the process ignores or handles a signal."""
    status = Path(f"/proc/{pid}/status").read_text()
    masks = re.findall(r"^Sig(?:Ign|Cgt):\t(\w+)$", status, re.MULTILINE)
    return any(int(mask, 16) >> (number - 1) & 1 for mask in masks)


def wait_for(condition, timeout_s: float = 30.0, every_s: float = 0.05) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(every_s)


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


def first_status(process: subprocess.Popen[str]) -> None:
    """Return once the run publishes targets."""
    assert isinstance(process.args, list)
    subscriber = Subscriber(load_config(Path(process.args[-1])).publish.endpoint)
    with contextlib.closing(subscriber):
        schema = ""
        while schema != "irst.targets/1":
            assert process.poll() is None, process.communicate()
            message = subscriber.receive(0.5)
            schema = message["schema"] if message else ""


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


def test_a_node_that_may_not_restart_ends_the_run_with_one_line(run_dir):
    row = 1
    config = SCENE.format(rate=20, folder=run_dir).replace("{name", "{restarts: 0, name")
    process = start(run_dir, config)
    first_status(process)
    nodes = children(process.pid)
    subscriber = Subscriber(f"ipc://{run_dir}/out")
    assert subscriber.receive(20.0) is not None
    os.kill(workers(process.pid)[row], signal.SIGKILL)
    end = None
    while end is None or end["schema"] != "irst.eos/1":
        end = subscriber.receive(20.0)
        assert end is not None
    subscriber.close()
    assert end["frames_in"] == end["published"] + sum(e["frames"] for e in end["dropped"])
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


@pytest.mark.parametrize(
    ("processes", "number"),
    [
        (1, signal.SIGTERM),
        (2, signal.SIGTERM),
        (2, signal.SIGHUP),
        (2, signal.SIGINT),
        (3, signal.SIGTERM),
    ],
)
def test_a_replay_told_to_stop_leaves_nothing_behind(run_dir, scene_recording, processes, number):
    words = ("replay", str(scene_recording), "--rate", "2")
    process = start(run_dir, "publish: {}", *words)
    wait_for(lambda: len(children(process.pid)) >= processes, every_s=0.001)
    nodes = children(process.pid)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=30)
    assert (process.returncode, stderr) == (128 + number, "")
    wait_for(lambda: not any(alive(node) for node in nodes), 5.0)
    assert list(run_dir.glob("irst-*")) == []


def test_a_replay_told_to_stop_says_how_far_it_came(run_dir, scene_recording):
    published = f"publish: {{endpoint: 'ipc://{run_dir}/out', wait_for: 1}}"
    process = start(run_dir, published, "replay", str(scene_recording), "--rate", "2")
    with contextlib.closing(Subscriber(f"ipc://{run_dir}/out")) as subscriber:
        seq = 0
        while seq < 2:  # the third frame is published, so the first is counted
            message = subscriber.receive(30.0)
            assert message is not None
            seq = message.get("frame_seq", 0)
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == 143
    waiting, last = stderr.splitlines()
    assert waiting.startswith("waiting for 1 subscriber at ipc://")
    assert re.fullmatch(r"pipeline: interrupted after \d+ frames", last)


def test_ctrl_c_while_a_command_is_imported_ends_it_without_a_word(run_dir):
    (run_dir / "slow.py").write_text("import time; print('importing'); time.sleep(100)")
    begin = "from pipeline.entry import begin; begin('slow')"
    with subprocess.Popen(
        [BIN / "python", "-u", "-c", begin],
        cwd=run_dir,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout
        assert process.stdout.readline() == "importing\n"
        process.send_signal(signal.SIGUSR1)
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=30) == ("", "")
    assert process.returncode == 130


def test_nodes_end_when_their_supervisor_is_killed(run_dir):
    config = SCENE.format(rate=20, folder=run_dir)
    process = start(run_dir, config.replace('/out"', f'/out", frames: "ipc://{run_dir}/frames"'))
    first_status(process)
    nodes = children(process.pid)
    assert len(nodes) >= 3
    os.kill(workers(process.pid)[1], signal.SIGSTOP)  # a stopped one must not stay either
    process.kill()
    process.communicate(timeout=30)
    wait_for(lambda: not any(alive(node) for node in nodes), 10.0)
    left = {path.name for path in run_dir.iterdir()}
    assert left == {"config.yaml"}, "no socket is left behind"


def test_a_turn_that_hears_only_so_much_loses_nothing(run_dir, scene_recording, monkeypatch):
    monkeypatch.setattr("pipeline.runtime.supervisor.MAX_HEARD", 2)
    hear = Listener.hear

    def slowly(*words):
        time.sleep(0.02)  # meanwhile more comes
        hear(*words)

    monkeypatch.setattr(Listener, "hear", slowly)
    config = load_config(None, source={"kind": "zarr_recording", "path": scene_recording})
    source = open_source(config)
    messages = list(replay.over_zeromq(config, source))
    source.close()
    assert (messages[-1]["frames_in"], messages[-1]["published"]) == (12, 12)
    assert not [message for message in messages if message["schema"] == "irst.gap/1"]


def test_a_run_whose_folder_is_removed_says_so_and_ends(run_dir):
    process = start(run_dir, SCENE.format(rate=20, folder=run_dir))
    first_status(process)
    (folder,) = run_dir.glob("irst-*")
    shutil.rmtree(folder)
    _, stderr = process.communicate(timeout=30)
    assert (process.returncode, len(stderr.splitlines())) == (1, 1), stderr
    assert "the run's own folder was removed" in stderr


def test_what_a_run_keeps_for_months_never_looks_old(run_dir):
    copy = run_dir / "engines.0" / "engine.onnx"
    copy.parent.mkdir()
    copy.write_bytes(b"an engine")
    for path in (copy, copy.parent, run_dir):
        os.utime(path, (0.0, 0.0))
    tend(run_dir)
    for path in (copy, copy.parent, run_dir):
        assert time.time() - path.stat().st_mtime < 1000.0
        assert time.time() - path.stat().st_atime < 1000.0


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


def heard(process: subprocess.Popen[str]) -> dict[str, int]:
    """The `dropped at` lines of a run that was told to end, by stage and reason."""
    stdout, stderr = process.communicate(timeout=30)
    assert process.returncode == 0, stderr
    frames_in, published, dropped = totals(stdout)
    assert frames_in == published + dropped
    found = re.findall(r"dropped at (\w+): (\d+) × (.*)", stdout)
    return {f"{stage}: {reason}": int(number) for stage, number, reason in found}


def follow(run_dir: Path, seconds: float) -> list[dict]:
    """Messages a subscriber gets in that time."""
    subscriber = Subscriber(f"ipc://{run_dir}/out")
    until = time.monotonic() + seconds
    messages = []
    while time.monotonic() < until:
        if (message := subscriber.receive(0.1)) is not None:
            messages.append(message)
    subscriber.close()
    return messages


ONE_PROCESS = (Path(__file__).parents[1] / "configs" / "one_process.yaml").read_text()


@pytest.mark.parametrize("topology", ["", ONE_PROCESS], ids=["as shipped", "one process"])
def test_killed_nodes_are_started_again_and_every_frame_accounted_for(run_dir, topology):
    """As they were, whatever has become of the files they were begun with."""
    for suffix in (".json", ".onnx"):
        shutil.copy(MODELS / f"off_grid_any{suffix}", run_dir / f"own{suffix}")
    cv2.imwrite(str(run_dir / "bad.png"), np.zeros((128, 160), np.uint8))
    files = f"engine: {run_dir}/own.json\nsensor: {{bad_pixels: {run_dir}/bad.png}}\n"
    process = start(run_dir, SCENE.format(rate=15, folder=run_dir) + files + topology)
    first_status(process)
    assert len(workers(process.pid)) == (1 if topology else 2)
    for name in ("own.onnx", "bad.png"):
        os.truncate(run_dir / name, 30)
    messages = []
    subscriber = Subscriber(f"ipc://{run_dir}/out")
    for node in workers(process.pid):
        os.kill(node, signal.SIGKILL)
        published, deadline = 0, time.monotonic() + 60
        while published < 30:
            assert time.monotonic() < deadline
            message = subscriber.receive(1.0)
            if message is not None and "frame_seq" in message:
                messages.append(message)
                published += message["schema"] == "irst.targets/1"
    subscriber.close()
    numbers = [message["frame_seq"] for message in messages]
    assert numbers == list(range(numbers[0], numbers[-1] + 1)), "in order, each once"
    assert len({message["engine"] for message in messages if "engine" in message}) == 1
    process.send_signal(signal.SIGTERM)
    heard(process)


def test_what_waits_too_long_is_dropped_by_name_and_nothing_older_is_published(run_dir):
    config = SCENE.format(rate=40, folder=run_dir).replace("{name", "{max_age_ms: 300, name")
    process = start(run_dir, config)
    first_status(process)
    unmix = workers(process.pid)[1]
    os.kill(unmix, signal.SIGSTOP)
    time.sleep(1.5)
    os.kill(unmix, signal.SIGCONT)
    messages = follow(run_dir, 1.5)
    assert max(m["age_ns"] for m in messages if m["schema"] == "irst.targets/1") < 400e6
    process.send_signal(signal.SIGTERM)
    assert heard(process).get("unmix: older than 300 ms", 0) > 0


def test_a_second_pipeline_of_the_same_name_is_refused_and_another_is_not(run_dir):
    first = start(run_dir, SCENE.format(rate=20, folder=run_dir))
    assert first.stdout
    assert "publishing" in first.stdout.readline()
    same = start(run_dir, SCENE.format(rate=20, folder=run_dir))
    _, stderr = same.communicate(timeout=60)
    assert same.returncode == 2
    assert re.fullmatch(r"pipeline: a pipeline named .* runs .*\n", stderr), stderr
    other = run_dir / "other"
    other.mkdir()
    second = start(other, SCENE.format(rate=20, folder=other))
    for process in (first, second):
        first_status(process)
        process.send_signal(signal.SIGTERM)
    for process in (first, second):
        heard(process)


@pytest.mark.patient
def test_a_terminal_that_takes_nothing_holds_up_no_frame(run_dir):
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(writer, bytes(4096))
    os.set_blocking(writer, True)
    (run_dir / "config.yaml").write_text(SCENE.format(rate=40, folder=run_dir))
    words = [str(BIN / "pipeline"), "run", "--config", str(run_dir / "config.yaml")]
    process = subprocess.Popen(words, stdout=writer, env={**os.environ, "TMPDIR": str(run_dir)})
    os.close(writer)
    subscriber = Subscriber(f"ipc://{run_dir}/out")
    published = []
    while len(published) < 100:
        message = subscriber.receive(60.0)
        assert message is not None
        if message["schema"] == "irst.targets/1":
            published.append(message)
    subscriber.close()
    process.send_signal(signal.SIGTERM)
    with os.fdopen(reader, "rb") as pipe:
        assert b"adds up" in pipe.read()
    assert process.wait(10) == 0


def test_a_live_run_tells_its_figures(run_dir, command):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    config = SCENE.format(rate=20, folder=run_dir) + f"telemetry: {{metrics: '{address}'}}\n"
    process = start(run_dir, config)
    first_status(process)
    result = command("pipeline", "watch", address, "--count", "2")
    assert result.returncode == 0, result.stderr
    for word in ("published", "unmix.0", "supervisor", "detect", "0 restarts"):
        assert word in result.stdout
    look = read_figures(address)
    assert look.get("irst_frames_total", "published", "") > 20
    assert look.get("irst_node_ready", "front.0") == 1
    assert look.get("irst_node_memory_bytes", "unmix.0") > 1e7
    process.send_signal(signal.SIGTERM)
    heard(process)


def engines_of(subscriber: Subscriber, until: Callable[[set[str]], bool]) -> list[dict]:
    """Messages until the set of engines and configurations seen is as wanted."""
    seen: set[str] = set()
    messages = []
    deadline = time.monotonic() + 60
    while not until(seen):
        assert time.monotonic() < deadline
        message = subscriber.receive(1.0)
        if message is not None and "frame_seq" in message:
            messages.append(message)
            seen |= {message.get("engine", ""), message.get("config", "")} - {""}
    return messages


def test_another_engine_takes_over_without_losing_a_frame(run_dir):
    scene = SCENE.format(rate=10, folder=run_dir).replace("{name", "{max_age_ms: 20000, name")
    scene += "topology: {front: {queue: 100}}\nswap: {frames: 0}\n"
    process = start(run_dir, scene + "engine: off_grid_any\n")
    first_status(process)
    subscriber = Subscriber(f"ipc://{run_dir}/out")
    engines_of(subscriber, lambda seen: len(seen) == 2)
    (run_dir / "config.yaml").write_text(scene + "engine: dista_net_field\n")
    process.send_signal(signal.SIGUSR1)
    messages = engines_of(subscriber, lambda seen: len(seen) == 4)
    assert {message["schema"] for message in messages} == {"irst.targets/1"}, "no gap"
    engines = [message["engine"] for message in messages]
    assert engines == sorted(engines, key=engines.index), "one after the other"
    assert process.stderr
    assert "has taken over" in process.stderr.readline()
    shutil.copy(MODELS / "dista_net_field.onnx", run_dir / "other.onnx")
    manifest = json.loads((MODELS / "off_grid_any.json").read_text())
    manifest["onnx_sha256"] = sha256_of(run_dir / "other.onnx")
    (run_dir / "other.json").write_text(json.dumps(manifest))
    for wrong, fragment in (
        ("engine: none_such\n", "none_such"),
        ("engine: off_grid\n", "the sensor has"),
        ("report: {min_snr: x}\n", "min_snr"),
        (f"engine: {run_dir}/other.json\n", f"{run_dir}/other.onnx: "),
    ):
        (run_dir / "config.yaml").write_text(scene + wrong)
        process.send_signal(signal.SIGUSR1)
        line = process.stderr.readline()
        assert "the run goes on as it was" in line and fragment in line, line
    wait_for(lambda: len(workers(process.pid)) == 2)
    (copies,) = run_dir.glob("irst-*/engines.*")
    assert copies.name == "engines.1", "of those that were refused or are over, none is left"
    before = subscriber.receive(5.0)
    assert before is not None
    subscriber.close()
    process.send_signal(signal.SIGTERM)
    stdout, stderr = process.communicate(timeout=30)
    assert process.returncode == 0, stderr
    assert totals(stdout)[2] == 0
