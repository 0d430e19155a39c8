"""What a run tells of itself: figures, logs, and the view of both in a terminal."""

import json
import logging
import socket
import subprocess
import sys

import pytest
from conftest import assert_one_line_error

from pipeline.runtime.children import BackOff
from pipeline.runtime.logs import BURST, JsonLine, OneLine, RateLimit
from pipeline.runtime.telemetry import Telemetry
from pipeline.transport.sockets import AddressInUse
from pipeline.watch import quantile_s, read_figures


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


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


def record(text, line=1):
    return logging.LogRecord("pipeline.x", logging.WARNING, "x.py", line, text, None, None)


def test_a_flood_of_records_is_cut_and_counted(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("pipeline.runtime.logs.time.monotonic", lambda: clock[0])
    limit = RateLimit()
    assert sum(limit.filter(record("again")) for _ in range(1000)) == BURST
    assert limit.filter(record("another", line=2)), "each kind has its own limit"
    clock[0] = 11.0
    late = record("again")
    assert limit.filter(late)
    assert late.getMessage() == f"again ({1000 - BURST} more like this in 11 s)"


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
