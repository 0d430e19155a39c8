"""What a run tells of itself: figures, logs, and the view of both in a terminal."""

import contextlib
import json
import logging
import socket
import struct
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

import pytest
from conftest import assert_one_line_error
from rich.console import Console

from pipeline.errors import RunError
from pipeline.runtime.children import BackOff, Children
from pipeline.runtime.logs import BURST, JsonLine, OneLine
from pipeline.runtime.metrics_page import MAX_OPEN
from pipeline.runtime.settings import SupervisorSettings
from pipeline.runtime.telemetry import Telemetry
from pipeline.runtime.topology import TOPOLOGY, running
from pipeline.transport.sockets import AddressInUse
from pipeline.watch import Look, look_at, quantile_s, read_figures, render


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def targets(seq, age_ms, number=2):
    return {
        "schema": "irst.targets/1",
        "frame_seq": seq,
        "targets": {"id": list(range(number))},
        "age_ns": age_ms * 1_000_000,
        "stage_ns": {"detect": 3_000_000},
        "engine": "cafe",
        "config": "beef",
    }


def test_figures_are_served_read_and_named_as_prometheus_wants_them():
    telemetry = Telemetry()
    address = f"127.0.0.1:{free_port()}"
    with telemetry.served(address):
        for seq in range(99):
            telemetry.count(targets(seq, age_ms=3))
        telemetry.count(targets(99, age_ms=900))
        telemetry.count({"schema": "irst.gap/1", "frame_seq": 100, "stage": "source"})
        telemetry.count_swap(None)
        telemetry.count_swap("matched")
        look = read_figures(address)
    assert look.get("irst_frames_total", "published", "") == 100
    assert look.get("irst_frames_total", "dropped", "source") == 1
    assert look.get("irst_targets_total") == 200
    assert look.values["irst_swaps_total"] == {("", "taken"): 1.0, ("matched", "refused"): 1.0}
    assert look.values["irst_run_info"] == {("beef", "cafe"): 1.0}
    assert quantile_s(look, None, "irst_publish_age_seconds", 0.5) == 0.004
    assert quantile_s(look, None, "irst_publish_age_seconds", 1.0) == 1.0
    assert quantile_s(look, None, "irst_stage_seconds", 0.5, "detect") == 0.004
    for name in look.values:
        assert name.startswith("irst_")
        assert not name.endswith(("_ms", "_ns"))


def first_line(now, before):
    console = Console(width=200)
    with console.capture() as shown:
        console.print(render(now, before))
    return shown.get().splitlines()[0]


def frames(t_s, published, age_s):
    """A look at a run of frames of one age."""
    buckets = {(edge,): published * (float(edge) >= age_s) for edge in ("0.1", "1.0", "+Inf")}
    outcomes = {("published", ""): published, ("dropped", "unmix"): 0.0}
    return Look(t_s, {"irst_frames_total": outcomes, "irst_publish_age_seconds_bucket": buckets})


def test_a_first_look_has_no_rate_and_one_after_a_restart_counts_from_nothing():
    first = frames(0.0, 500.0, age_s=0.5)
    assert first_line(first, None).startswith("– frames/s published, – lost/s (0 in all)")
    assert first_line(frames(2.0, 600.0, 0.5), first).startswith("50.0 frames/s published, 0.0")
    again = first_line(frames(2.0, 60.0, age_s=0.05), first)
    assert again.startswith("30.0 frames/s published")
    assert "age ≤ 100 ms p50, ≤ 100 ms p99" in again


def test_every_series_is_there_before_the_first_loss():
    telemetry = Telemetry()
    telemetry.expect(running(TOPOLOGY))
    look = look_at(telemetry.registry)
    stages = {stage for outcome, stage in look.values["irst_frames_total"] if outcome == "dropped"}
    assert stages >= {
        "source",
        "front",
        "detect",
        "crop",
        "unmix",
        "report",
        "transport",
        "publish",
    }
    assert ("published", "") in look.values["irst_frames_total"]
    assert set(look.values["irst_restarts_total"]) == {("front.0",), ("unmix.0",)}
    assert {("", "taken"), ("latency", "refused")} <= set(look.values["irst_swaps_total"])
    for name in ("frames", "restarts", "swaps", "malformed_messages"):
        assert not any(look.values[f"irst_{name}_total"].values())


def test_a_page_that_is_badly_read_is_there_for_others(capfd):
    port = free_port()
    address = f"127.0.0.1:{port}"
    with Telemetry().served(address), contextlib.ExitStack() as held:
        files = open_files()
        for number in range(3 * MAX_OPEN):
            client = held.enter_context(socket.create_connection(("127.0.0.1", port), timeout=5.0))
            client.sendall(b"GET /metrics HT")  # and no more
            if number % 3 == 0:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                client.close()
        for accept in ("text/plain", "application/openmetrics-text;version=abc"):
            asked = urllib.request.Request(f"http://{address}/metrics", headers={"Accept": accept})
            with urllib.request.urlopen(asked, timeout=5.0) as page:
                assert b"irst_frames_total" in page.read()
        clients = 2 * MAX_OPEN  # that are open in this very process
        deadline = time.monotonic() + 30.0
        while open_files() > files + clients + MAX_OPEN:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    assert capfd.readouterr().err == ""


def test_an_address_in_use_is_named():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(AddressInUse, match=address), Telemetry().served(address):
            pass


def test_watching_nobody_is_one_line(command):
    address = f"127.0.0.1:{free_port()}"
    assert_one_line_error(command("pipeline", "watch", address), address, "telemetry.metrics")


@pytest.mark.parametrize("address", ["127.0.0.1:abc", "a b", "host", "127.0.0.1:9464/x", ""])
def test_an_address_that_is_none_is_one_line(command, address):
    assert_one_line_error(command("pipeline", "watch", address), f"{address}: not an address")


def answering(answer):
    """The address of a server that gives every client these bytes, and ends."""
    server = socket.create_server(("127.0.0.1", 0))

    def serve():
        with server, contextlib.suppress(OSError):
            client, _ = server.accept()
            with client:
                client.recv(4096)
                client.sendall(answer)

    threading.Thread(target=serve, daemon=True).start()
    return f"127.0.0.1:{server.getsockname()[1]}"


@pytest.mark.parametrize(
    "answer",
    [
        b"\xff\x00\x00\x00\x1b[31m\x01\x7f\x03",
        b"HTTP/1.1 404 Not \x1b[31mFound\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n\r\n{nonsense",
        b"HTTP/1.1 200 OK\r\n\r\nup 1.0\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n\xff",
    ],
)
def test_watching_what_is_no_run_is_one_line_without_a_byte_of_its_answer(command, answer):
    address = answering(answer)
    result = command("pipeline", "watch", address)
    assert_one_line_error(result, address, "telemetry.metrics")
    assert "\x1b" not in result.stderr and result.stderr.strip().isprintable()


@pytest.mark.parametrize("words", [("watch", "--every-s"), ("record", "a", "b", "c", "--max-gb")])
@pytest.mark.parametrize("number", ["inf", "nan"])
def test_options_are_numbers_one_can_count_with(command, words, number):
    assert_one_line_error(command("pipeline", *words, number), words[-1])


def record(text, line=1):
    return logging.LogRecord("pipeline.x", logging.WARNING, "x.py", line, text, None, None)


FLOOD = """
import logging, sys, time
from pipeline.runtime import logs
from pipeline.runtime.settings import TelemetrySettings
logs.EVERY_S = float(sys.argv[1])
logs.configure_logs(TelemetrySettings())
log = logging.getLogger("pipeline.x")
for number in range(1000):
    log.warning("number %d", number)
log.warning("another")
time.sleep(1.5 * min(logs.EVERY_S, 2.0))
log.warning("later")
"""


@pytest.mark.parametrize(("every_s", "order"), [(2.0, "held later"), (60.0, "later held")])
def test_a_flood_of_records_is_cut_and_counted_in_time_or_at_the_end(every_s, order):
    words = [sys.executable, "-c", FLOOD, str(every_s)]
    result = subprocess.run(words, capture_output=True, text=True, check=True)
    told = [line.split(" ", 3)[3] for line in result.stderr.splitlines()]
    assert told[:BURST] == [f"number {number}" for number in range(BURST)]
    assert told[BURST] == "another", "each kind has its own limit"
    held, later = sorted(told[BURST + 1 :], key=lambda line: line == "later")
    assert held.startswith(f"number 999 ({1000 - BURST} more like this in ")
    assert told[-1] == (later if order == "held later" else held)


def test_a_record_is_one_line_whatever_is_in_it():
    text = "first\nsecond\r\nthird"
    assert OneLine("%(message)s").format(record(text)) == "first second third"
    fields = json.loads(JsonLine().format(record(text)))
    assert fields["message"] == text
    assert fields["level"] == "warning"


LOGS = """
import logging
from pipeline.runtime.logs import configure_logs
from pipeline.runtime.settings import TelemetrySettings
configure_logs(TelemetrySettings(log_json=True, log_level="info"))
logging.getLogger("pipeline.runtime").info("hello %s", "there")
logging.getLogger("pipeline.runtime").debug("not this")
"""


def test_logs_are_json_lines_on_request():
    result = subprocess.run(
        [sys.executable, "-c", LOGS], capture_output=True, text=True, check=True
    )
    (line,) = result.stderr.splitlines()
    assert json.loads(line)["message"] == "hello there"


def test_restarts_back_off_and_have_a_limit():
    back_off = BackOff(limit=5, within_s=60.0)
    assert [back_off.delay_s(0.1 * n) for n in range(6)] == [0.0, 0.25, 0.5, 1.0, 2.0, None]
    assert back_off.delay_s(1000.0) == 0.0, "what is long ago is forgotten"


def test_starts_in_vain_have_a_limit_however_long_each_takes():
    settings = SupervisorSettings(restarts=2, within_s=10.0)
    children = Children(print, settings, lambda _: None)
    children.add("unmix.0", 1, None)
    (child,) = children.all
    for now_s in (0.0, 100.0):
        children._bury(child, now_s, "died")
    child.ready = True  # one that was of use, between
    children._bury(child, 200.0, "died")
    child.ready, child.last_words = False, "no such device"
    for now_s in (300.0, 400.0):
        children._bury(child, now_s, "died")
    with pytest.raises(RunError, match="no such device; 3 starts were in vain"):
        children._bury(child, 500.0, "died")
