"""Runs with a detector beside the flow: real processes, real sockets, a real (tiny) network."""

import os
import re
import signal
import socket
import time
from pathlib import Path

import faulty_nodes
import pytest
from conftest import assert_one_line_error
from test_faults import gaps, targets
from test_runtime import SCENE, first_status, run_dir, start, totals, wait_for, workers  # noqa: F401
from tiny_yolo import write_tiny_yolo

from pipeline.client import Subscriber
from pipeline.config import load_config, open_source
from pipeline.errors import PipelineError
from pipeline.runtime import replay
from pipeline.stages.recognise import Recognise
from pipeline.watch import read_figures

FUSION = (
    "topology: {{yolo: {{stages: [recognise]}}, back: {{stages: [fuse]}}}}\n"
    "recognise: {{engine: {engine}}}\n"
    "fuse: {{gate: 0.9999}}\n"
)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    return write_tiny_yolo(tmp_path_factory.mktemp("tiny"), centre_sigma_px=2.0)


@pytest.fixture
def config(scene_recording, tiny, tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text(
        f"source: {{kind: zarr_recording, path: {scene_recording}}}\n"
        "supervisor: {stall_s: 5}\n" + FUSION.format(engine=tiny)
    )
    return load_config(file)


def replayed(config, how):
    source = open_source(config)
    messages = list(how(config, source))
    source.close()
    return [message for message in messages if message["schema"] != "irst.heartbeat/1"]


def test_replay_in_one_process_and_over_zeromq_fuses_the_same(config):
    apart, together = replayed(config, replay.over_zeromq), replayed(config, replay.in_process)
    assert targets(apart) == targets(together)
    assert len(targets(apart)) == 12
    for message in targets(apart):
        assert message["fusion"]["missing"] == ""
        assert len(message["fusion"]["detector"]) == 12
    labels = [label for message in targets(apart) for label in message["targets"]["label"]]
    assert labels.count("point") > 0.5 * len(labels) > 10
    stages = [set(m["stage_ns"]) for m in apart if m["schema"] == "irst.targets/1"]
    assert all({"recognise", "front>yolo", "fuse"} <= names for names in stages)


def test_frames_are_shown_as_calibrated(config, scene_recording, tiny, tmp_path):
    """What the detector sees is what detection sees: a stage of frames comes before it."""
    file = tmp_path / "calibrated.yaml"
    file.write_text(
        f"source: {{kind: zarr_recording, path: {scene_recording}}}\n"
        + FUSION.format(engine=tiny).replace(
            "topology: {", "topology: {front: {stages: [calibrate, detect, crop]}, "
        )
        + "calibrate: {remove: columns}\n"
    )
    calibrated = load_config(file)
    apart = replayed(calibrated, replay.over_zeromq)
    assert targets(apart) == targets(replayed(calibrated, replay.in_process))
    assert targets(apart) != targets(replayed(config, replay.in_process))


def test_off_by_default_nothing_is_different(config, scene_recording):
    plain = load_config(None, source={"kind": "zarr_recording", "path": str(scene_recording)})
    assert [node.name for node in plain.topology] == ["front", "unmix"]
    assert plain.beside is None
    assert not {"recognise", "fuse"} & plain.stages.keys()
    off, on = replayed(plain, replay.in_process), replayed(config, replay.in_process)
    assert targets(off) == targets(replayed(plain, replay.over_zeromq))
    for before, after in zip(targets(off), targets(on), strict=True):
        assert "fusion" not in before
        for column in ("x_px", "y_px", "cov_px2", "intensity", "group"):
            assert before["targets"][column] == after["targets"][column]
        assert set(before["targets"]["label"]) <= {""}


def lost_answers(messages):
    """Which frames are unfused and why, all being published."""
    assert gaps(messages) == []
    found = targets(messages)
    assert [message["frame_seq"] for message in found] == list(range(12))
    return {m["frame_seq"]: m["fusion"]["missing"] for m in found if m["fusion"]["missing"]}


def test_in_replay_a_detector_that_dies_loses_its_answer_and_no_frame(config, monkeypatch):
    monkeypatch.setattr("pipeline.runtime.supervisor.run_node", faulty_nodes.dying_beside)
    missing = lost_answers(replayed(config, replay.over_zeromq))
    assert missing == {3: "its worker died 2 times"}


def test_a_detector_that_raises_loses_its_answer_and_no_frame(config, monkeypatch):
    whole = Recognise.process

    def process(self, message):
        if message.info.seq == 3:
            raise ValueError("no idea")
        return whole(self, message)

    monkeypatch.setattr(Recognise, "process", process)
    assert lost_answers(replayed(config, replay.in_process)) == {3: "no idea"}


def live(run_dir, tiny, more="", supervised="restarts: 5"):  # noqa: F811
    scene = SCENE.format(rate=20, folder=run_dir)
    times = "max_age_ms: 5000, beside_ms: 300, stall_s: 2"
    scene = scene.replace("{name", f"{{{times}, {supervised}, name")
    fusion = FUSION.format(engine=tiny).replace("topology: {", "topology: {front: {queue: 100}, ")
    return start(run_dir, scene + fusion + more)


def listen(subscriber, until, timeout_s=60.0):
    """Messages of frames until one is as wanted."""
    messages, deadline = [], time.monotonic() + timeout_s
    while not (messages and until(messages[-1])):
        assert time.monotonic() < deadline, messages[-3:]
        message = subscriber.receive(1.0)
        if message is not None and "frame_seq" in message:
            messages.append(message)
    return messages


def is_fused(message):
    return message["schema"] == "irst.targets/1" and not message["fusion"]["missing"]


def is_unfused(message):
    return message["schema"] == "irst.targets/1" and bool(message["fusion"]["missing"])


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_dead_or_stalled_detector_costs_its_answers_only(run_dir, tiny, number):  # noqa: F811
    process = live(run_dir, tiny)
    first_status(process)
    subscriber = Subscriber(f"ipc://{run_dir}/out")
    messages = listen(subscriber, is_fused)
    nodes = workers(process.pid)
    assert len(nodes) == 4
    os.kill(nodes[3], number)
    messages += listen(subscriber, is_unfused)
    messages += listen(subscriber, is_fused)
    subscriber.close()
    numbers = [message["frame_seq"] for message in messages]
    assert numbers == list(range(numbers[0], numbers[-1] + 1)), "in order, each once"
    assert {message["schema"] for message in messages} == {"irst.targets/1"}, "no frame is lost"
    assert max(message["age_ns"] for message in messages) < 5e9
    reasons = {message["fusion"]["missing"] for message in messages} - {""}
    known = "node yolo is not ready|older than 300 ms|overload: oldest frame shed"
    assert reasons and all(re.fullmatch(known, reason) for reason in reasons), reasons
    wait_for(lambda: len(workers(process.pid)) == 4)
    process.send_signal(signal.SIGTERM)
    stdout, stderr = process.communicate(timeout=30)
    assert process.returncode == 0, stderr
    frames_in, published, dropped = totals(stdout)
    assert frames_in == published + dropped
    assert "node yolo.0" in stderr


def test_a_detector_that_keeps_dying_never_ends_the_run(run_dir, tiny):  # noqa: F811
    """One restart is allowed: any other node would end the run with its second death."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    process = live(run_dir, tiny, f"telemetry: {{metrics: '{address}'}}\n", "restarts: 1")
    first_status(process)
    subscriber = Subscriber(f"ipc://{run_dir}/out")
    for _ in range(2):
        listen(subscriber, is_fused)
        os.kill(workers(process.pid)[3], signal.SIGKILL)
        listen(subscriber, is_unfused)
    for _ in range(20):
        assert is_unfused(listen(subscriber, lambda message: True)[0])
    subscriber.close()
    assert read_figures(address).get("irst_unfused_frames_total") > 20
    process.send_signal(signal.SIGTERM)
    stdout, stderr = process.communicate(timeout=30)
    assert process.returncode == 0, stderr
    assert totals(stdout)[2] == 0
    assert "restarting in 30 s" in stderr


def test_another_detector_takes_over_and_no_frame_is_lost(run_dir, tiny, tmp_path):  # noqa: F811
    other = write_tiny_yolo(tmp_path, width=320, centre_sigma_px=2.0)
    process = live(run_dir, tiny, "swap: {frames: 5, slower: 20, answered: 0.5}\n")
    first_status(process)
    subscriber = Subscriber(f"ipc://{run_dir}/out")
    messages = listen(subscriber, is_fused)
    first = messages[-1]["fusion"]["detector"]
    file = run_dir / "config.yaml"
    file.write_text(file.read_text().replace(str(tiny), str(other)))
    process.send_signal(signal.SIGUSR1)
    messages += listen(subscriber, lambda m: is_fused(m) and m["fusion"]["detector"] != first)
    subscriber.close()
    assert {message["schema"] for message in messages} == {"irst.targets/1"}, "no gap"
    numbers = [message["frame_seq"] for message in messages]
    assert numbers == list(range(numbers[0], numbers[-1] + 1)), "in order, each once"
    process.send_signal(signal.SIGTERM)
    stdout, stderr = process.communicate(timeout=30)
    assert process.returncode == 0, stderr
    assert totals(stdout)[2] == 0


def test_a_detector_that_cannot_be_had_is_said_before_the_first_frame(run_dir):  # noqa: F811
    process = live(run_dir, "nowhere.onnx")
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "nowhere.json" in stderr
    assert len(stderr.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("topology: {yolo: {stages: [recognise]}}", "nobody takes what it says"),
        ("topology: {back: {stages: [fuse]}}", "there is none"),
        ("topology: {yolo: {stages: [detect]}, back: {stages: [fuse]}}", "Objects"),
        (
            "topology: {yolo: {stages: [recognise]}, back: {stages: [fuse, report]}}",
            "`report` takes Unmixed",
        ),
        (
            "topology: {yolo: {stages: [recognise]}, back: {stages: [fuse]}}\n"
            "supervisor: {beside_ms: 2000}",
            "beside_ms must be less than max_age_ms",
        ),
        (
            "topology: {yolo: {stages: [recognise]}, back: {stages: [fuse]}}\nfuse: {gaet: 1}",
            "unknown field `gaet` at fuse",
        ),
    ],
)
def test_a_flow_that_cannot_be_is_named(tmp_path, text, said):
    file = tmp_path / "config.yaml"
    file.write_text(text)
    with pytest.raises(PipelineError, match=said):
        load_config(file)


def test_evaluate_fusion_compares_at_equal_pd(command, config, scene_recording, tmp_path):
    out = tmp_path / "figures.json"
    file = tmp_path / "config.yaml"
    result = command(
        "pipeline", "evaluate-fusion", scene_recording, "--config", file, "--json", out
    )
    assert result.returncode == 0, result.stderr
    assert "false alarms a frame" in result.stdout
    assert '"at_equal_pd"' in out.read_text()
    plain = tmp_path / "plain.yaml"
    plain.write_text("source: {kind: synthetic}\n")
    result = command("pipeline", "evaluate-fusion", scene_recording, "--config", plain)
    assert_one_line_error(result, "fuses nothing")
