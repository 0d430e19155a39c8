"""How a run begins and ends: signals, what a terminal or a journal sees, what a kill leaves."""

import io
import json
import os
import pty
import re
import signal
import subprocess
import tempfile

import pytest
from conftest import BIN
from rich.console import Console
from test_runtime import SCENE, first_status, spares, start, totals, wait_for
from test_runtime import run_dir as run_dir

from pipeline.runtime.run_folder import run_folder
from pipeline.runtime.task import hub_endpoint
from pipeline.summary import print_accounting
from pipeline.transport.hub import HubSocket

pytestmark = pytest.mark.patient


def test_a_reload_while_a_run_starts_does_not_end_it(run_dir):
    process = start(run_dir, SCENE.format(rate=20, folder=run_dir))
    wait_for(lambda: spares(process.pid, signal.SIGUSR1))
    assert not (run_dir / "out").exists(), "it has only begun to start"
    process.send_signal(signal.SIGUSR1)
    first_status(process)
    process.send_signal(signal.SIGTERM)
    stdout, stderr = process.communicate(timeout=30)
    assert (process.returncode, stderr) == (0, "")
    totals(stdout)


def test_a_terminal_that_goes_ends_a_run_as_sigterm_does(run_dir):
    process = start(run_dir, SCENE.format(rate=20, folder=run_dir), new_session=True)
    first_status(process)
    os.killpg(process.pid, signal.SIGHUP)  # to all, as the kernel does
    stdout, stderr = process.communicate(timeout=30)
    assert (process.returncode, stderr) == (0, "")
    assert totals(stdout)[1] > 0


def test_without_a_terminal_there_is_no_line_a_second_and_the_totals_are_logged(run_dir):
    config = SCENE.format(rate=20, folder=run_dir)
    process = start(run_dir, config + "telemetry: {log_json: true, log_level: info}\n")
    first_status(process)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(2.5)
    process.send_signal(signal.SIGTERM)
    stdout, stderr = process.communicate(timeout=30)
    first, *others = stdout.splitlines()
    assert first.startswith("publishing synthetic on ")
    assert all(re.match(r"accounting: |  dropped at ", line) for line in others), stdout
    frames_in, published, _ = totals(stdout)
    record = json.loads(stderr.splitlines()[-1])
    assert (record["frames_in"], record["published"]) == (frames_in, published)
    assert record["message"] == others[0]


def test_a_terminal_gets_a_line_a_second(run_dir):
    file = run_dir / "config.yaml"
    file.write_text(SCENE.format(rate=20, folder=run_dir))
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [str(BIN / "pipeline"), "run", "--config", str(file)],
        stdout=theirs,
        env={**os.environ, "TMPDIR": str(run_dir), "TERM": "xterm"},
    )
    os.close(theirs)
    shown = b""
    while not re.search(rb"[1-9]\d*\.\d frames/s, .* lost", re.sub(rb"\x1b\[[0-9;]*m", b"", shown)):
        shown += os.read(ours, 4096)
    process.send_signal(signal.SIGTERM)
    os.close(ours)  # it is gone when the totals are to be printed
    assert process.wait(30) == 0


def test_a_line_of_the_totals_is_one_line_however_narrow_it_is():
    lost = {"stage": "source", "reason": "overload: oldest [red] frame shed", "frames": 123456}
    end = {"frames_in": 9123456, "published": 9000000, "dropped": [lost]}
    out = io.StringIO()
    print_accounting(Console(file=out, width=40), end, balanced=True)
    assert out.getvalue().splitlines() == [
        "accounting: 9123456 in = 9000000 published + 123456 dropped (adds up)",
        "  dropped at source: 123456 × overload: oldest [red] frame shed",
    ]


def test_what_a_run_that_was_killed_as_a_whole_left_is_swept_by_the_next(run_dir):
    config = SCENE.format(rate=20, folder=run_dir)
    process = start(run_dir, config, new_session=True)
    first_status(process)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate(timeout=30)
    (left,) = run_dir.glob("irst-*")
    os.utime(left / "hub.lock", (0, 0))
    process = start(run_dir, config)
    first_status(process)
    assert not left.exists()
    assert len(list(run_dir.glob("irst-*"))) == 1
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert list(run_dir.glob("irst-*")) == []


def test_only_what_is_dead_and_ours_is_swept(run_dir, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(run_dir))
    strange = run_dir / "irst-notes"
    strange.mkdir()
    elsewhere = run_dir / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "hub.lock").touch()
    (run_dir / "irst-link").symlink_to(elsewhere)
    with run_folder() as alive:
        hub = HubSocket(hub_endpoint(alive))
        for lock in run_dir.glob("*/hub.lock"):
            os.utime(lock, (0, 0))
        with run_folder() as other:
            assert {path.name for path in run_dir.iterdir()} == {
                *(alive.name, other.name, "irst-notes", "elsewhere", "irst-link")
            }
        hub.close()
