"""What a signal that ends a process interrupts is done whole, or is undone."""

import multiprocessing.popen_spawn_posix
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pipeline.config import load_config, open_source
from pipeline.runtime.signals import ENDS, held_signals
from pipeline.runtime.supervisor import Supervisor

SCENE = {"width": 160, "height": 128, "singles": 3, "groups": 2}


class EndError(BaseException):
    """What a handler raises."""


@pytest.fixture(params=ENDS)
def number(request):
    """A signal whose handler raises `EndError`."""

    def handler(_number, _frame):
        raise EndError

    before = signal.signal(request.param, handler)
    yield request.param
    signal.signal(request.param, before)


@pytest.fixture
def other_thread():
    """One that blocks no signal, as a library's may."""
    ended = threading.Event()
    thread = threading.Thread(target=ended.wait)
    thread.start()
    yield
    ended.set()
    thread.join()


def hold(number, done):
    """A block in which a signal comes; its steps go into `done`."""
    with held_signals():
        signal.raise_signal(number)
        done.append("inner")


def hold_twice(number, done):
    with held_signals():
        hold(number, done)
        done.append("outer")


def hold_and_fail(number):
    with held_signals():
        signal.raise_signal(number)
        raise ValueError("of the block")


def test_a_handler_runs_at_the_end_of_the_block(number):
    handler, done = signal.getsignal(number), []
    with pytest.raises(EndError):
        hold(number, done)
    assert done == ["inner"]
    assert signal.getsignal(number) is handler


def test_an_inner_block_hands_on_to_the_outer(number):
    done = []
    with pytest.raises(EndError):
        hold_twice(number, done)
    assert done == ["inner", "outer"]


def test_an_error_of_the_block_is_not_lost(number):
    with pytest.raises(EndError) as caught:
        hold_and_fail(number)
    assert isinstance(caught.value.__context__, ValueError)


def test_ignored_signals_stay_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with held_signals():
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
            signal.raise_signal(signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_nothing_is_held_beside_the_main_thread():
    def block():
        with held_signals():
            return signal.getsignal(signal.SIGINT)

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(block).result() is signal.getsignal(signal.SIGINT)


@pytest.fixture
def opened(monkeypatch, tmp_path):
    """A configuration and what a supervisor is made of; folders of runs go into `tmp_path`."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    config = load_config(None, source={"kind": "synthetic", **SCENE})
    source = open_source(config)
    return config, "replay", source.sensor, source.shape


@pytest.mark.usefixtures("other_thread")
@pytest.mark.parametrize("which", [1, 2])
def test_a_signal_in_the_middle_of_a_start_undoes_it(number, which, opened, monkeypatch, tmp_path):
    launch, started = multiprocessing.popen_spawn_posix.Popen._launch, []

    def interrupted(self, process):
        started.append(process)
        if len(started) == which:
            os.kill(os.getpid(), number)
            time.sleep(0.05)
        launch(self, process)

    monkeypatch.setattr(multiprocessing.popen_spawn_posix.Popen, "_launch", interrupted)
    with pytest.raises(EndError), Supervisor(*opened):
        pytest.fail("the start went on")
    assert len(started) == len(opened[0].topology)
    assert not any(process.is_alive() for process in started)
    assert list(tmp_path.glob("irst-*")) == []


def test_a_run_held_up_by_a_subscriber_can_be_ended(number, opened, monkeypatch):
    tries, held = iter(range(50)), []

    def held_up(*_):
        if next(tries, None) is None:
            signal.raise_signal(number)
            held.append(number)
        return bool(held)

    monkeypatch.setattr("pipeline.transport.publish.Publisher._sent", held_up)
    with pytest.raises(EndError), Supervisor(*opened) as supervisor:
        list(supervisor.messages())
    assert held == []


NEVER_LEFT = """
import sys
from pipeline.config import load_config, open_source
from pipeline.runtime.supervisor import Supervisor
config = load_config(None, source={source})
source = open_source(config)
supervisor = Supervisor(config, "replay", source.sensor, source.shape).__enter__()
for child in supervisor._children.all:
    print(child.process.pid, flush=True)
sys.exit(7)
"""


def test_a_run_whose_end_is_never_reached_leaves_nothing_behind(tmp_path):
    """As by a second signal, between the first and what it would have ended."""
    script = NEVER_LEFT.format(source={"kind": "synthetic", **SCENE})
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    words = [sys.executable, "-c", script]
    result = subprocess.run(words, capture_output=True, text=True, timeout=60, env=environment)
    assert (result.returncode, result.stderr) == (7, "")
    nodes = result.stdout.split()
    assert len(nodes) == 2
    assert not any(Path(f"/proc/{node}").exists() for node in nodes)
    assert list(tmp_path.glob("irst-*")) == []
