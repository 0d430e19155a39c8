"""`pipeline replay` as a user runs it: real processes, real sockets, real files."""

import json
import shutil
import socket
import threading
from pathlib import Path

import msgpack
import numpy as np
import pytest
import zarr
import zmq
from conftest import assert_one_line_error, write_scene

from engines.loader import MODELS
from engines.manifest import read_manifest
from pipeline import cli
from pipeline.errors import PipelineError, RunError
from pipeline.formats.csist import write_csist
from pipeline.formats.recording import RecordingWriter
from pipeline.physics.groups import PROFILES
from pipeline.physics.sensor import Sensor
from pipeline.wire import TargetsMessage, check_wire

CLIPS = Path(__file__).parent / "data"


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def without_times(message):
    return {key: value for key, value in message.items() if key not in ("stage_ns", "age_ns")}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def replayed(command, scene_recording, tmp_path_factory):
    out = tmp_path_factory.mktemp("replayed") / "targets.jsonl"
    result = command("pipeline", "replay", scene_recording, "--out", out)
    assert result.returncode == 0, result.stderr
    return result.stdout, read_lines(out)


def test_replay_publishes_every_frame_in_order_and_the_totals_add_up(replayed):
    stdout, messages = replayed
    assert [message["frame_seq"] for message in messages] == list(range(12))
    assert "accounting: 12 in = 12 published + 0 dropped (adds up)" in stdout


def test_replay_scores_against_the_truth(replayed):
    stdout, _ = replayed
    score = next(line for line in stdout.splitlines() if line.startswith("score: CSO-mAP"))
    assert float(score.split()[2]) > 0.1
    found = next(line for line in stdout.splitlines() if "Pd" in line)
    assert float(found.split()[1]) > 0.5


def test_replay_shows_latency_of_each_stage_and_hop(replayed):
    stdout, _ = replayed
    for name in ("detect", "crop", "front>unmix", "unmix", "report"):
        assert name in stdout


def test_every_message_fits_the_published_schema(replayed):
    _, messages = replayed
    for message in messages:
        assert isinstance(check_wire(message), TargetsMessage)


def test_however_the_flow_is_cut_into_processes_the_targets_are_identical(
    command, scene_recording, replayed, tmp_path
):
    three, out = tmp_path / "three.yaml", tmp_path / "out.jsonl"
    three.write_text("topology: {unmix: {replicas: 3}}")
    one = Path(__file__).parents[1] / "configs" / "one_process.yaml"
    expected = [without_times(message) for message in replayed[1]]
    module = ("python", "-m", "pipeline")
    for program, words in (
        (["pipeline"], ["--in-process"]), (module, ["--config", three]), (module, ["--config", one])
    ):  # fmt: skip
        result = command(*program, "replay", scene_recording, *words, "--out", out)
        assert result.returncode == 0, result.stderr
        assert [without_times(message) for message in read_lines(out)] == expected


def test_another_program_reads_the_stream_with_msgpack_alone(command, scene_recording):
    endpoint = f"tcp://127.0.0.1:{free_port()}"
    subscriber = zmq.Context.instance().socket(zmq.SUB)
    subscriber.linger = 0
    subscriber.setsockopt(zmq.SUBSCRIBE, b"targets.field")
    subscriber.connect(endpoint)
    received = []

    def listen() -> None:
        while subscriber.poll(60_000):
            topic, body = subscriber.recv_multipart()
            received.append((topic, msgpack.unpackb(body)))
            if received[-1][1]["schema"] == "irst.eos/1":
                return

    thread = threading.Thread(target=listen)
    thread.start()
    result = command("pipeline", "replay", scene_recording, "--publish", endpoint, "--rate", "20")
    thread.join(60)
    subscriber.close()
    assert result.returncode == 0, result.stderr
    assert {topic for topic, _ in received} == {b"targets.field"}
    bodies = [body for _, body in received]
    for body in bodies:
        check_wire(body)
    targets = [body for body in bodies if body["schema"] == "irst.targets/1"]
    assert [body["frame_seq"] for body in targets] == list(range(12))
    assert bodies[-1]["frames_in"] == 12
    for body in targets:
        columns = body["targets"]
        assert {len(column) for column in columns.values()} == {len(columns["id"])}
        assert np.isfinite(columns["x_px"] + columns["y_px"] + columns["intensity"]).all()
        for xx, xy, yy in columns["cov_px2"]:
            assert xx > 0
            assert xx * yy > xy * xy


def test_subscribe_prints_tables_and_json(command, scene_recording):
    endpoint = f"tcp://127.0.0.1:{free_port()}"
    outputs = {}

    def follow(*words):
        outputs[words] = command("pipeline", "subscribe", endpoint, *words)

    threads = [threading.Thread(target=follow, args=words) for words in ((), ("--json",))]
    for thread in threads:
        thread.start()
    replay = command("pipeline", "replay", scene_recording, "--publish", endpoint, "--wait-for", 2)
    assert replay.returncode == 0, replay.stderr
    for thread in threads:
        thread.join(60)
    assert "intensity" in outputs[()].stdout
    lines = [json.loads(line) for line in outputs[("--json",)].stdout.splitlines()]
    assert lines[-1]["schema"] == "irst.eos/1"
    assert all(check_wire(line) for line in lines)


def test_constant_and_black_frames_give_no_target_and_no_crash(command, tmp_path):
    path = tmp_path / "flat.zarr"
    with RecordingWriter(path, (64, 64), Sensor(id="flat", full_scale=16383)) as writer:
        for index, level in enumerate((0, 1000, 16383)):
            writer.append(np.full((64, 64), level, dtype=np.uint16), index)
    out = tmp_path / "out.jsonl"
    result = command("pipeline", "replay", path, "--out", out)
    assert result.returncode == 0, result.stderr
    assert [message["targets"]["id"] for message in read_lines(out)] == [[], [], []]


@pytest.mark.parametrize("clip", sorted(CLIPS.glob("*.mp4")), ids=lambda path: path.stem)
def test_real_thermal_video_replays_and_adds_up(command, clip, tmp_path):
    out = tmp_path / "out.jsonl"
    result = command("pipeline", "replay", clip, "--out", out)
    assert result.returncode == 0, result.stderr
    messages = read_lines(out)
    assert len(messages) >= 300
    assert (
        f"accounting: {len(messages)} in = {len(messages)} published + 0 dropped" in result.stdout
    )
    for message in messages:
        check_wire(message)
        assert message["frame_flags"] == ["compressed"]
    found = [bool(message["targets"]["id"]) for message in messages]
    assert np.mean(found) > 0.9, "there is an aircraft in every frame"


def test_a_csist_dataset_replays_as_a_mosaic_and_is_scored(command, tmp_path):
    path = tmp_path / "csist.zarr"
    write_csist(path, PROFILES["csist-100k"], 300, 7_000_002)
    outputs = []
    for name, words in (("zmq", ()), ("plain", ("--in-process",))):
        out = tmp_path / f"{name}.jsonl"
        result = command("pipeline", "replay", path, "--out", out, *words)
        assert result.returncode == 0, result.stderr
        assert "accounting: 2 in = 2 published + 0 dropped (adds up)" in result.stdout
        outputs.append([without_times(message) for message in read_lines(out)])
    assert outputs[0] == outputs[1]
    score = next(line for line in result.stdout.splitlines() if line.startswith("score: CSO-mAP"))
    assert float(score.split()[2]) > 0.7
    assert {message["engine"] for message in outputs[0]} <= {
        shipped_hash("off_grid"),
        shipped_hash("off_grid.openvino"),
    }


def shipped_hash(name):
    return read_manifest(MODELS / f"{name}.json").engine_id


def test_replay_fails_when_a_message_is_missing(monkeypatch, scene_recording, capsys):
    """A stream that loses a message on the way to the supervisor must not end well."""
    from pipeline.runtime import replay

    whole = replay.in_process

    def lossy(config, source):
        for message in whole(config, source):
            if message.get("frame_seq") != 3:
                yield message

    monkeypatch.setattr(replay, "in_process", lossy)
    with pytest.raises(RunError, match="totals do not add up") as error:
        cli.replay(scene_recording, in_process=True, rate="max")
    assert error.value.exit_code == 1
    assert "does NOT add up" in capsys.readouterr().out


def test_who_is_waited_for_is_said_and_must_be_able_to_come(monkeypatch, scene_recording, capsys):
    from pipeline.runtime import replay

    monkeypatch.setattr(replay, "over_zeromq", lambda *_: (message for message in ()))
    with pytest.raises(PipelineError, match=r"--wait-for: nobody .*give --publish"):
        cli.replay(scene_recording, rate="max", wait_for=1)
    with pytest.raises(RunError, match="do not add up"):  # nothing was replayed
        cli.replay(scene_recording, rate="max", wait_for=2, publish="ipc:///tmp/out")
    assert capsys.readouterr().err == "waiting for 2 subscribers at ipc:///tmp/out\n"


def test_picture_is_a_png_of_the_frame_and_its_largest_group(
    command, scene_recording, replayed, tmp_path
):
    import cv2

    targets = tmp_path / "targets.jsonl"
    targets.write_text("".join(json.dumps(message) + "\n" for message in replayed[1]))
    out = tmp_path / "picture.png"
    result = command("pipeline", "picture", scene_recording, targets, out)
    assert result.returncode == 0, result.stderr
    image = cv2.imread(str(out))
    assert image.shape[1] > 2 * 160
    green = (image == (80, 220, 80)).all(axis=2)
    assert green.any(), "boxes and found positions are green"


# --- bad input: one line, exit code 2 -------------------------------------------------------


def test_no_such_file(command, tmp_path):
    result = command("pipeline", "replay", tmp_path / "none.zarr")
    assert_one_line_error(result, "none.zarr", "no such file")


def test_a_folder_that_is_no_zarr(command, tmp_path):
    assert_one_line_error(command("pipeline", "replay", tmp_path), str(tmp_path))


def test_a_file_that_is_no_video(command, tmp_path):
    file = tmp_path / "notes.mp4"
    file.write_text("no video")
    assert_one_line_error(command("pipeline", "replay", file), "notes.mp4")


@pytest.mark.parametrize("name", ["frame", "timestamp_ns", "truth/xy_px"])
def test_a_recording_without_an_array_names_it(command, scene_recording, tmp_path, name):
    path = tmp_path / "broken.zarr"
    shutil.copytree(scene_recording, path)
    shutil.rmtree(path / name)
    assert_one_line_error(command("pipeline", "replay", path), "broken.zarr", name)


@pytest.mark.parametrize(
    ("array", "fragment"),
    [(np.zeros((3, 64, 64), np.float32), "float32"), (np.zeros((3, 64), np.uint16), "frame")],
)
def test_frames_of_another_type_or_shape_are_named(command, tmp_path, array, fragment):
    path = tmp_path / "wrong.zarr"
    with RecordingWriter(path, (64, 64), Sensor(full_scale=16383)) as writer:
        for index in range(3):
            writer.append(np.zeros((64, 64), dtype=np.uint16), index)
    zarr.open_group(str(path), mode="a").create_array("frame", data=array, overwrite=True)
    assert_one_line_error(command("pipeline", "replay", path), "wrong.zarr", "frame", fragment)


def test_frames_smaller_than_a_patch(command, tmp_path):
    path = tmp_path / "small.zarr"
    with RecordingWriter(path, (8, 64), Sensor(full_scale=16383)) as writer:
        writer.append(np.zeros((8, 64), dtype=np.uint16), 0)
    assert_one_line_error(command("pipeline", "replay", path), "small.zarr", "11")


@pytest.mark.parametrize(
    ("text", "fragment"),
    [
        ("detect: {gird: 1}", "unknown field `gird` at detect"),
        ("report: {min_snr: x}", "report.min_snr"),
        ("sensor: {sigma_px: 9.0}", "sigma_px"),
        ("engine: off_grid", "made for full_scale 255"),
    ],
)
def test_a_config_that_does_not_fit(command, scene_recording, tmp_path, text, fragment):
    config = tmp_path / "config.yaml"
    config.write_text(text)
    result = command("pipeline", "replay", scene_recording, "--config", config)
    assert_one_line_error(result, fragment)


def test_an_engine_that_does_not_exist(command, scene_recording):
    result = command("pipeline", "replay", scene_recording, "--engine", "warp")
    assert_one_line_error(result, "warp", "dista_net")


@pytest.mark.parametrize(
    ("damage", "fragment"),
    [
        (lambda folder: (folder / "e.onnx").unlink(), "missing"),
        (lambda folder: (folder / "e.onnx").write_bytes(b"half"), "truncated"),
        (lambda folder: change(folder, c=4), "c must be odd"),
        (lambda folder: change(folder, c=5), "gives maps"),
        (lambda folder: change(folder, sensor={"sigma_px": 1.5}), "sigma_px"),
        (lambda folder: (folder / "e.json").write_text("{"), "e.json"),
    ],
    ids=["missing", "truncated", "even c", "other c", "other sigma", "no manifest"],
)
def test_an_engine_that_cannot_be_used(command, scene_recording, tmp_path, damage, fragment):
    for suffix in (".json", ".onnx"):
        shutil.copy(MODELS / f"dista_net_field{suffix}", tmp_path / f"e{suffix}")
    damage(tmp_path)
    engine = tmp_path / "e.json"
    result = command("pipeline", "replay", scene_recording, "--engine", engine)
    assert_one_line_error(result, fragment)


def change(folder, **fields):
    manifest = json.loads((folder / "e.json").read_text())
    (folder / "e.json").write_text(json.dumps(manifest | fields))


def test_a_port_in_use(command, scene_recording):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        endpoint = f"tcp://127.0.0.1:{taken.getsockname()[1]}"
        result = command("pipeline", "replay", scene_recording, "--publish", endpoint)
    assert_one_line_error(result, endpoint, "already in use", exit_code=1)


def test_a_rate_that_is_no_number(command, scene_recording):
    result = command("pipeline", "replay", scene_recording, "--rate", "fast")
    assert_one_line_error(result, "--rate")


def test_an_output_that_cannot_be_written(command, scene_recording):
    result = command("pipeline", "replay", scene_recording, "--out", "/proc/none/out.jsonl")
    assert_one_line_error(result, "/proc/none", "cannot write")


def test_a_damaged_frame_ends_the_run_and_what_came_before_is_published(command, tmp_path):
    path = tmp_path / "damaged.zarr"
    write_scene(path, 4, width=96, height=96, singles=2, groups=0, horizon=1.0)
    chunk = sorted(path.glob("frame/c/2/**/*"))[-1]
    chunk.write_bytes(chunk.read_bytes()[:-20])
    out = tmp_path / "out.jsonl"
    result = command("pipeline", "replay", path, "--out", out)
    assert_one_line_error(result, "damaged.zarr", "frame 2")
    assert [message["frame_seq"] for message in read_lines(out)] == [0, 1]
