"""What cannot run is refused before it starts, by `check` and `run` alike, and nothing is left."""

import os
import socket
import subprocess
import sys

import pytest
from conftest import assert_one_line_error
from test_runtime import SCENE, start, wait_for
from test_runtime import run_dir as run_dir

from pipeline.config import load_config
from pipeline.runtime.surroundings import check_surroundings, is_running, the_only_one
from pipeline.transport.probe import listening
from pipeline.transport.security import ServerKeys, make_keys
from pipeline.transport.sockets import AddressInUse

FEED = (
    'source: {{kind: zmq_feed, endpoint: "ipc://{folder}/feed", width: 64, height: 48}}\n'
    'publish: {{endpoint: "ipc://{folder}/out"}}\n'
    "supervisor: {{name: {folder.name}}}\n"
)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def refused(run_dir, config, name):
    process = start(run_dir, config, name)
    stdout, stderr = process.communicate(timeout=100)
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


def same_port(run_dir):
    port = free_port()
    return (
        f'publish: {{endpoint: "tcp://localhost:{port}"}}\ntelemetry: {{metrics: 127.0.0.1:{port}}}'
    )


CANNOT_RUN = {
    "no such core": (
        lambda _: "topology: {unmix: {cores: [4000]}}",
        ("topology.unmix.cores", "no core 4000"),
    ),
    "a folder that cannot be written": (
        lambda _: "dead_letters: {folder: /proc/self}",
        ("dead_letters.folder", "/proc/self", "cannot be written"),
    ),
    "a file in place of a folder": (
        lambda folder: f"dead_letters: {{folder: {folder}/config.yaml/x}}",
        ("dead_letters.folder", "cannot be written"),
    ),
    "a file in place of a socket": (
        lambda folder: f'publish: {{endpoint: "ipc://{folder}/config.yaml"}}',
        ("publish.endpoint", "config.yaml is there already and not ours"),
    ),
    "nobody to wait for": (
        lambda _: "publish: {endpoint: null, wait_for: 1}",
        ("publish.wait_for", "nobody can subscribe"),
    ),
    "one path for two": (
        lambda folder: (
            f'publish: {{endpoint: "ipc://{folder}/out", frames: "ipc://{folder}/./out"}}'
        ),
        ("publish.frames", "publish.endpoint", "of its own"),
    ),
    "one port for two": (same_port, ("telemetry.metrics", "publish.endpoint", "of its own")),
    "what the source listens at": (
        lambda folder: (
            f'source: {{kind: zmq_feed, endpoint: "ipc://{folder}/out", width: 64, height: 48}}\n'
            f'publish: {{endpoint: "ipc://{folder}/out"}}'
        ),
        ("source.endpoint", "publish.endpoint", "of its own"),
    ),
}


@pytest.mark.parametrize("command", ["check", "run"])
@pytest.mark.parametrize("case", CANNOT_RUN)
def test_what_can_never_run_is_one_line(run_dir, command, case):
    config, fragments = CANNOT_RUN[case]
    assert_one_line_error(refused(run_dir, config(run_dir), command), *fragments)
    assert [path.name for path in run_dir.iterdir()] == ["config.yaml"], "nothing is left behind"


@pytest.mark.parametrize("command", ["check", "run"])
def test_an_address_of_another_process_is_named_with_its_setting(run_dir, command):
    config = FEED.format(folder=run_dir)
    with listening(f"ipc://{run_dir}/feed"):
        result = refused(run_dir, config, command)
    assert_one_line_error(
        result, "source.endpoint: ", f"ipc://{run_dir}/feed", "in use", exit_code=1
    )
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        result = refused(run_dir, f"{config}telemetry: {{metrics: '{address}'}}\n", command)
    assert_one_line_error(result, "telemetry.metrics", address, "in use", exit_code=1)


def test_check_beside_the_run_that_is_to_be_replaced_says_so_and_is_content(run_dir):
    config = SCENE.format(rate=5, folder=run_dir)
    process = start(run_dir, config)
    wait_for((run_dir / "out").exists)
    result = refused(run_dir, config, "check")
    assert result.returncode == 0, result.stderr
    assert f"note: a pipeline named `{run_dir.name}` runs" in result.stdout
    assert f"note: publish.endpoint: ipc://{run_dir}/out: address already in use" in result.stdout
    assert "all well" in result.stdout
    process.terminate()
    process.communicate(timeout=30)
    assert process.returncode == 0


def test_a_check_makes_no_folder(run_dir):
    file = run_dir / "config.yaml"
    file.write_text(
        SCENE.format(rate=5, folder=run_dir) + f"dead_letters: {{folder: {run_dir}/a/letters}}\n"
    )
    assert check_surroundings(load_config(file)) == []
    assert [path.name for path in run_dir.iterdir()] == ["config.yaml"]


def test_an_address_that_is_tried_asks_strangers_for_a_key(tmp_path):
    make_keys(tmp_path, "tracker")
    endpoint = f"tcp://127.0.0.2:{free_port()}"
    with listening(endpoint, ServerKeys.load(tmp_path / "server")):
        with pytest.raises(AddressInUse), listening(endpoint):
            pass
        host, port = endpoint.removeprefix("tcp://").split(":")
        with socket.create_connection((host, int(port)), timeout=5) as stranger:
            stranger.sendall(b"\xff" + bytes(8) + b"\x7f\x03\x00" + b"NULL".ljust(20, b"\0"))
            greeting = b""
            while len(greeting) < 32:
                greeting += stranger.recv(64)
    assert greeting[12:32].rstrip(b"\0") == b"CURVE"
    with listening(endpoint):
        pass  # free again at once


def test_the_name_is_claimed_before_the_source_is_opened(run_dir):
    config = (
        f"source: {{kind: video, path: {run_dir}/none.mp4}}\nsupervisor: {{name: {run_dir.name}}}"
    )
    assert not is_running(run_dir.name)
    with the_only_one(run_dir.name):
        assert is_running(run_dir.name)
        result = refused(run_dir, config, "run")
        assert_one_line_error(result, f"a pipeline named `{run_dir.name}` runs")
    assert not is_running(run_dir.name)
    assert_one_line_error(refused(run_dir, config, "run"), "none.mp4")


HOLD = """
import os, socket, sys
os.setuid(65534)
with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as lock:
    lock.bind(f"\\0irst-{sys.argv[1]}")
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be another user")
def test_a_name_is_taken_whoever_runs_it(run_dir):
    words = [sys.executable, "-S", "-c", HOLD, run_dir.name]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(words, text=True, **pipes) as other:
        assert other.stdout and other.stdout.readline() == "held\n"
        result = refused(run_dir, SCENE.format(rate=5, folder=run_dir), "run")
        other.communicate("", timeout=10)
    assert_one_line_error(result, f"a pipeline named `{run_dir.name}` runs")
