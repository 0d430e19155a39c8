"""Live runs whose source is away, says nothing, or says what is no frame. Every process is real."""

# ruff: noqa: F811, as fixtures are taken from another file

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import cv2
import msgpack
import numpy as np
import pytest
import zmq
from conftest import BIN
from test_runtime import children, run_dir, start, totals, wait_for, workers  # noqa: F401

from pipeline.errors import PipelineError
from pipeline.runtime.dead_letters import DeadLetters
from pipeline.watch import read_figures

pytestmark = pytest.mark.patient

WIDTH, HEIGHT = 160, 128


class Camera(BaseHTTPRequestHandler):
    """A network camera: JPEGs one after another, 20 a second, until its server is closed."""

    def log_message(self, *_):
        """Nothing."""

    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Type", "multipart/x-mixed-replace; boundary=frame")
        self.end_headers()
        jpeg = cv2.imencode(".jpg", np.full((HEIGHT, WIDTH), 90, np.uint8))[1].tobytes()
        head = f"--frame\r\nContent-Type: image/jpeg\r\nContent-Length: {len(jpeg)}\r\n\r\n"
        while not self.server.gone.wait(0.05):
            try:
                self.wfile.write(head.encode() + jpeg + b"\r\n")
            except OSError:
                return


@contextmanager
def camera(port=0):
    """A camera that answers at a port of this machine for as long as the block lasts."""
    ThreadingHTTPServer.allow_reuse_address = True
    with ThreadingHTTPServer(("127.0.0.1", port), Camera) as http:
        http.daemon_threads, http.gone = True, threading.Event()
        thread = threading.Thread(target=http.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield http.server_address[1]
        finally:
            http.gone.set()
            http.shutdown()
            thread.join()


def free_address():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


def published(address):
    return read_figures(address).get("irst_frames_total", "published", "")


def is_up(process, address):
    """True once a run has published a frame; fails if it has ended."""
    assert process.poll() is None, process.communicate()
    try:
        return published(address) > 0
    except PipelineError:
        return False


RUN = (
    "source: {{{source}}}\n"
    'publish: {{endpoint: "ipc://{folder}/out", frames: "ipc://{folder}/frames"}}\n'
    "supervisor: {{name: {folder.name}, {supervised}}}\n"
    "telemetry: {{metrics: '{address}'}}\n"
    "dead_letters: {{folder: {folder}/letters}}\n"
)


@pytest.fixture
def run(run_dir):
    """Starts a run; whatever becomes of the test, it is over with it."""
    processes = []

    def begin(source, address, supervised="stall_s: 5"):
        text = RUN.format(folder=run_dir, source=source, address=address, supervised=supervised)
        processes.append(start(run_dir, text))
        return processes[-1]

    yield begin
    for process in processes:
        process.kill()
        process.communicate()


def ended(process):
    """Standard output and error of a run that is told to end, and ends well."""
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    stdout, stderr = process.communicate(timeout=30)
    assert process.returncode == 0, stderr
    assert time.monotonic() - began < 5.0
    frames_in, out, dropped = totals(stdout)
    assert frames_in == out + dropped
    return stdout, stderr


# --- away ----------------------------------------------------------------------------------------


def test_a_front_that_is_restarted_while_the_camera_is_away_waits_for_it(run, run_dir, monkeypatch):
    address = free_address()
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(f"{run_dir}/notify")
        systemd.settimeout(60)
        monkeypatch.setenv("NOTIFY_SOCKET", f"{run_dir}/notify")
        with camera() as port:
            source = f"kind: video_stream, timeout_s: 2, address: 'http://127.0.0.1:{port}/live'"
            process = run(source, address, "restarts: 1")
            heard = {systemd.recv(100)}
            while b"READY=1" not in heard:
                heard.add(systemd.recv(100))
            wait_for(lambda: is_up(process, address), 60)
        front = workers(process.pid)[0]
        os.kill(front, signal.SIGKILL)
        assert process.stderr
        told = [process.stderr.readline() for _ in range(5)]
        assert sum("no video comes from there" in line for line in told) >= 3, told
        assert process.poll() is None
        with camera(port):
            before = published(address)
            wait_for(lambda: published(address) > before + 20, 90)
        look = read_figures(address)
        assert look.get("irst_restarts_total", "front.0") == 1
        assert look.get("irst_frames_total", "dropped", "unmix") == 0, "there from the start"
        ended(process)
        systemd.settimeout(0.1)
        while b"STOPPING=1" not in heard:
            heard.add(systemd.recv(100))
        assert heard == {b"READY=1", b"WATCHDOG=1", b"STOPPING=1"}


@pytest.mark.parametrize(
    ("more", "code", "said"),
    [
        ("address: /dev/video-none", 1, "no video comes from there"),
        ("address: 'http://127.0.0.1:9/x', timeout_s: 1", 1, "no video comes from there"),
        ("address: /dev/video-none, colour: red", 2, "unknown field `colour`"),
    ],
)
def test_what_is_not_there_now_and_what_is_wrong_end_differently(run, run_dir, more, code, said):
    process = run(f"kind: video_stream, {more}", free_address())
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == code, stderr
    assert re.fullmatch(f"pipeline: .*{said}.*\n", stderr)


def test_an_address_that_is_not_there_yet_may_be_tried_again(run_dir):
    subprocess.run([BIN / "pipeline", "keys", run_dir / "keys"], check=True, capture_output=True)
    config = (
        "source: {kind: synthetic, rate_hz: 10}\n"
        f"publish: {{keys: {run_dir}/keys/server, endpoint: 'tcp://192.0.2.1:5599'}}\n"
        f"supervisor: {{name: {run_dir.name}}}\n"
    )
    process = start(run_dir, config)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 1, stderr
    assert "192.0.2.1:5599: this machine has no such address now" in stderr


# --- a feed --------------------------------------------------------------------------------------


@contextmanager
def sender(folder):
    """A socket that frames are pushed with."""
    with zmq.Context() as context, context.socket(zmq.PUSH) as push:
        push.linger = 0
        push.connect(f"ipc://{folder}/in")
        yield push


def frame(seq):
    header = {
        "schema": "irst.frame/1", "seq": seq, "t_exposure_ns": seq, "clock": "utc",
        "dtype": "uint16", "shape": [HEIGHT, WIDTH],
    }  # fmt: skip
    return [msgpack.packb(header), np.full((HEIGHT, WIDTH), 900, "<u2").tobytes()]


def feed(folder):
    return f"kind: zmq_feed, endpoint: 'ipc://{folder}/in', width: {WIDTH}, height: {HEIGHT}"


def push_until(push, done, seqs):
    """Frames until it is done, 50 a second."""
    deadline = time.monotonic() + 90
    while not done():
        assert time.monotonic() < deadline
        if push.poll(0, zmq.POLLOUT):
            push.send_multipart(frame(next(seqs)))
        time.sleep(0.02)


def counter():
    return iter(range(10**6))


def test_garbage_is_counted_kept_and_readable_and_a_flood_of_it_starves_nobody(
    run, run_dir, command
):
    address, seqs = free_address(), counter()
    process = run(feed(run_dir), address)
    with sender(run_dir) as push, sender(run_dir) as bully:
        push_until(push, lambda: is_up(process, address), seqs)
        assert read_figures(address).get("irst_malformed_messages_total") == 0
        assert read_figures(address).get("irst_queue_frames", "front") >= 0
        push.send_multipart([b"rubbish"])
        push.send_multipart([*frame(0)[:1], b"short"])
        with zmq.Context() as context, context.socket(zmq.DEALER) as stranger:
            stranger.connect(f"ipc://{next(run_dir.glob('irst-*/hub'))}")
            stranger.send_multipart([b"who", b"am I"])
            wait_for(lambda: read_figures(address).get("irst_malformed_messages_total") == 3, 20)
        letters = DeadLetters.letters(run_dir / "letters")
        result = command("pipeline", "replay-dead-letter", *letters)
        assert result.returncode == 0, result.stderr
        said = sorted(line.split(": ", 1)[1] for line in result.stdout.splitlines())
        assert len(said) == 3
        assert "1 parts; send two, header and pixels: still malformed: 1 parts" in said[0]
        assert "needs 40960 bytes, not 5: still malformed: 160×128" in said[1]
        assert said[2].startswith("from a stranger") and "still malformed: word" in said[2]

        flooding = threading.Event()

        def flood():
            while not flooding.is_set():
                if bully.poll(10, zmq.POLLOUT):
                    bully.send_multipart([os.urandom(200_000)] * 3)

        thread = threading.Thread(target=flood)
        thread.start()
        before = published(address)
        push_until(push, lambda: published(address) >= before + 100, seqs)
        flooding.set()
        thread.join()
    look = read_figures(address)
    malformed = look.get("irst_malformed_messages_total")
    assert 100 < malformed < 1000 * 90, "slowed at the socket, and counted"
    kept = list((run_dir / "letters").iterdir())
    assert len(kept) <= 100
    assert sum(path.stat().st_size for path in kept) <= 64e6
    ended(process)
    left = {path.name for path in run_dir.iterdir()}
    assert left == {"config.yaml", "letters"}, "no socket of the feed is left"


def test_a_front_whose_source_says_nothing_is_started_again(run, run_dir):
    address, seqs = free_address(), counter()
    process = run(feed(run_dir), address, "silent_s: 2, restarts: 0")
    with sender(run_dir) as push:
        push_until(push, lambda: is_up(process, address), seqs)
        assert process.stderr
        line = process.stderr.readline()
        assert "node front.0 gave no frame for supervisor.silent_s; restarting" in line
        push_until(push, lambda: read_figures(address).get("irst_node_ready", "front.0"), seqs)
        before = published(address)
        push_until(push, lambda: published(address) > before + 20, seqs)
    ended(process)


def test_a_supervisor_that_is_killed_leaves_no_socket_of_a_feed(run, run_dir):
    address, seqs = free_address(), counter()
    process = run(feed(run_dir), address)
    with sender(run_dir) as push:
        push_until(push, lambda: is_up(process, address), seqs)
    nodes = children(process.pid)
    process.kill()
    process.communicate(timeout=30)
    wait_for(lambda: not any(Path(f"/proc/{node}").exists() for node in nodes), 20.0)
    left = {path.name for path in run_dir.iterdir()}
    assert left == {"config.yaml", "letters"}


# --- the end -------------------------------------------------------------------------------------

DEAF = """
import sys, time, zmq
socket = zmq.Context().socket(zmq.SUB)
socket.setsockopt(zmq.RCVHWM, 1)
socket.setsockopt(zmq.SUBSCRIBE, b"targets.")
socket.connect(sys.argv[1])
print("here", flush=True)
time.sleep(1000)
"""


def test_a_run_ends_in_time_with_a_stalled_front_and_a_subscriber_that_reads_nothing(run, run_dir):
    address = free_address()
    source = f"kind: synthetic, rate_hz: 100, width: {WIDTH}, height: {HEIGHT}, groups: 4"
    process = run(source, address)
    words = [sys.executable, "-c", DEAF, f"ipc://{run_dir}/out"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as deaf:
        try:
            deaf.stdout.readline()
            wait_for(lambda: is_up(process, address), 60)
            deaf.send_signal(signal.SIGSTOP)
            wait_for(lambda: published(address) > 300, 60)
            os.kill(workers(process.pid)[0], signal.SIGSTOP)
            began = time.monotonic()
            ended(process)
            took_s = time.monotonic() - began
        finally:
            deaf.kill()
    assert took_s < 4.5, "with margin"
