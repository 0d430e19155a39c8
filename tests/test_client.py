"""What a subscriber is told, beside the messages: what it missed, and what it cannot read."""

import re
import socket
import subprocess
import time

import pytest
from conftest import BIN

from pipeline.client import MAX_NAMED, Subscriber
from pipeline.errors import PipelineError, RunError
from pipeline.transport.publish import Publisher
from pipeline.transport.security import make_keys


@pytest.fixture
def endpoint(tmp_path):
    return f"ipc://{tmp_path}/out"


@pytest.fixture
def publisher(endpoint):
    publisher = Publisher([endpoint], "roof", 100, lossless=True)
    yield publisher
    publisher.abandon()
    publisher.close()


def send(publisher, *messages):
    until = time.monotonic() + 20
    while not publisher.subscribers:
        publisher.listen(50)
        assert time.monotonic() < until
    for message in messages:
        publisher.publish({"sensor_id": "roof", **message}, lambda: None)


def gap(seq):
    return {"schema": "irst.gap/1", "frame_seq": seq, "stage": "crop", "reason": "odd"}


START = {"schema": "irst.start/1", "config": "cafe"}


def end(frames):
    lost = [{"stage": "crop", "reason": "odd", "frames": frames}]
    return {"schema": "irst.eos/1", "frames_in": frames, "published": 0, "dropped": lost}


def received(subscriber):
    return list(iter(lambda: subscriber.receive(0.5), None))


def test_what_a_subscriber_missed_comes_as_gaps_of_its_own(publisher, endpoint):
    subscriber = Subscriber(endpoint)
    send(publisher, START, gap(0), gap(1), gap(5))
    told = [(m["frame_seq"], m["stage"]) for m in received(subscriber) if "frame_seq" in m]
    missed = [(seq, "subscriber") for seq in (2, 3, 4)]
    assert told == [(0, "crop"), (1, "crop"), *missed, (5, "crop")]
    assert subscriber.missed == 3
    subscriber.close()


def test_what_a_subscriber_missed_at_the_end_and_beyond_what_is_named(publisher, endpoint):
    subscriber = Subscriber(endpoint)
    missed = MAX_NAMED + 10
    send(publisher, START, gap(0), end(1 + missed))
    told = [m["frame_seq"] for m in received(subscriber) if "frame_seq" in m]
    assert told == [0, *range(11, 1 + missed)]
    assert subscriber.missed == missed
    subscriber.close()


def test_who_comes_late_has_missed_nothing_and_is_not_waited_for(publisher, endpoint):
    subscriber = Subscriber(endpoint)
    send(publisher, gap(7), gap(8), end(9))
    told = [m["frame_seq"] for m in received(subscriber) if "frame_seq" in m]
    assert told == [7, 8]
    publisher.listen(200)
    publisher.wait_acknowledged(9, 1.0)
    subscriber.close()


def test_the_end_is_acknowledged_with_what_was_had(publisher, endpoint):
    subscriber = Subscriber(endpoint)
    send(publisher, START, gap(0), gap(2), end(3))
    assert received(subscriber)[-1]["schema"] == "irst.eos/1"
    with pytest.raises(RunError, match="had 2 of 3"):
        publisher.wait_acknowledged(3, 5.0)
    subscriber.close()


def test_a_subscriber_is_waited_for_at_the_end_of_each_stream_it_sees_begin(publisher, endpoint):
    subscriber = Subscriber(endpoint)
    for frames in (2, 3, 3):
        heartbeat = {"schema": "irst.heartbeat/1", "published": 0, "t_monotonic_ns": 1}
        send(publisher, heartbeat)
        assert len(received(subscriber)) == 1
        publisher.listen(100)
        assert publisher._acknowledging == 1, "which does not show that the stream had begun"
        send(publisher, START, *map(gap, range(frames)))
        publisher.expect_acknowledged()
        send(publisher, end(frames))
        assert len(received(subscriber)) == frames + 2
        publisher.wait_acknowledged(frames, 5.0)
    subscriber.close()


def test_what_was_acknowledged_of_a_stream_before_is_not_of_this_one(endpoint):
    subscriber = Subscriber(endpoint)
    for frames in (3, 2, 2):  # each with a new connection, over which all is told again
        publisher = Publisher([endpoint], "roof", 100, lossless=True)
        until = time.monotonic() + 20
        while not publisher.subscribers:
            assert subscriber.receive(0.01) is None
            publisher.listen(10)
            assert time.monotonic() < until
        send(publisher, START, *map(gap, range(frames)))
        publisher.expect_acknowledged()
        with pytest.raises(RunError, match="did not acknowledge"):
            publisher.wait_acknowledged(frames, 0.2)
        send(publisher, end(frames))
        assert [m["schema"] for m in received(subscriber)][-1] == "irst.eos/1"
        publisher.wait_acknowledged(frames, 5.0)
        publisher.abandon()
        publisher.close()
    subscriber.close()


def test_a_version_that_is_not_known_is_refused_and_said_once(publisher, endpoint, caplog):
    subscriber = Subscriber(endpoint)
    newer = {"schema": "irst.targets/2", "frame_seq": 1}
    send(publisher, START, newer, newer, {"schema": "irst.gap/1"}, gap(0))
    assert [m["schema"] for m in received(subscriber)] == ["irst.start/1", "irst.gap/1"]
    assert subscriber.rejected == 3
    assert caplog.text.count("refused") == 1
    assert "irst.targets/2" in caplog.text
    subscriber.close()


@pytest.mark.parametrize("known_later", [False, True])
def test_a_host_that_nobody_knows_is_named_at_once(monkeypatch, known_later):
    def look_up(host, *_):
        assert host == "nosuchhost.invalid"
        code = socket.EAI_AGAIN if known_later else socket.EAI_NONAME
        raise socket.gaierror(code, "Name or service not known")

    monkeypatch.setattr("socket.getaddrinfo", look_up)
    if known_later:
        Subscriber("tcp://nosuchhost.invalid:5556").close()
        return
    with pytest.raises(PipelineError, match=r"no host `nosuchhost\.invalid` is known") as error:
        Subscriber("tcp://nosuchhost.invalid:5556").close()
    assert error.value.exit_code == 1, "it may be there later"


def test_silence_is_said_once_and_so_is_its_end(endpoint, tmp_path):
    make_keys(tmp_path / "keys", "tracker")
    keys = tmp_path / "keys" / "tracker"
    words = [str(BIN / "pipeline"), "subscribe", endpoint]
    plain, keyed = (
        subprocess.Popen([*words, *more], stderr=subprocess.PIPE, text=True)
        for more in ((), ("--keys", str(keys)))
    )
    for process, hint in ((plain, "does it want keys?"), (keyed, f"{keys} on its list?")):
        line = process.stderr.readline()
        said = (
            rf"nothing from {re.escape(endpoint)} for \d+ s: is the run up, .*{re.escape(hint)}\n"
        )
        assert re.fullmatch(said, line)
    publisher = Publisher([endpoint], "roof", 100, lossless=False)
    send(publisher, START, end(0))
    _, told = plain.communicate(timeout=30)
    assert plain.returncode == 0
    assert told.startswith(f"{endpoint} is back after ") and told.count("\n") == 1
    time.sleep(1.0)
    publisher.close()
    keyed.terminate()
    assert keyed.communicate(timeout=30)[1] == "", "with keys nobody talks to a plain run"
