"""Who watches the run: the source's silence is said, and systemd is told how the service is."""

import logging
import socket

import pytest

from pipeline.pacing import Allowance, rarer
from pipeline.runtime.vigil import QUIET_S, Service, SourceVigil


@pytest.fixture
def said(caplog):
    caplog.set_level(logging.WARNING, "pipeline")
    logging.getLogger("pipeline").propagate = True
    return lambda: [record.getMessage() for record in caplog.records]


def test_silence_is_said_ever_more_rarely_and_its_end_once(said):
    vigil = SourceVigil(None)
    for now_s in range(5):
        assert not vigil.look(now_s, now_s, front_is_there=True)
    assert said() == []
    for now_s in range(5, 100):
        assert not vigil.look(4, now_s, front_is_there=True)
    assert said() == [f"no frame from the source for {n} s" for n in (10, 30, 70)]
    vigil.look(5, 104, front_is_there=True)
    vigil.look(6, 105, front_is_there=True)
    assert said()[3:] == ["frames come from the source again, after 100 s"]


def test_another_front_is_wanted_after_each_silence_that_a_front_was_there_for():
    vigil = SourceVigil(3.0)
    wanted = [
        now_s
        for now_s in range(20)
        if vigil.look(0, now_s, front_is_there=not 4 <= now_s <= 8)  # it takes as long to start
    ]
    assert wanted == [3, 11, 14, 17]


def test_a_run_without_frames_from_its_beginning_is_said_too(said):
    vigil = SourceVigil(None)
    for now_s in (0.0, QUIET_S + 0.1):
        vigil.look(0, now_s, front_is_there=True)
    assert said() == ["no frame from the source for 10 s"]


@pytest.mark.parametrize("abstract", [False, True])
def test_systemd_is_told_at_a_socket_of_either_kind(tmp_path, abstract):
    address = f"\0{tmp_path}/notify" if abstract else f"{tmp_path}/notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(address)
        systemd.settimeout(5)
        service = Service({"NOTIFY_SOCKET": address.replace("\0", "@")})
        for now_s in (0.0, 0.5, 0.9, 1.0):
            service.beat(now_s)
            service.say_once("READY=1")
        heard = [systemd.recv(100) for _ in range(3)]
        assert heard == [b"WATCHDOG=1", b"READY=1", b"WATCHDOG=1"]
    service.say_once("STOPPING=1")  # to nobody, which harms nobody
    Service({}).say_once("READY=1")


def test_so_many_a_second():
    clock = [0.0]
    allowance = Allowance(3, lambda: clock[0])
    taken = []
    for clock[0] in (0.0, 0.2, 0.4, 0.6, 0.8, 1.1, 1.2, 1.3, 1.4, 9.0):
        taken.append(allowance.take())
    assert taken == [True, True, True, False, False, True, True, True, False, True]


def test_attempts_become_rarer_to_a_limit():
    waits = rarer(0.25, 3.0)
    assert [next(waits) for _ in range(6)] == [0.25, 0.5, 1.0, 2.0, 3.0, 3.0]
