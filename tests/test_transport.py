"""Real sockets: credit between nodes, publishing, and what happens when the other side is slow."""

import subprocess
import sys
import threading
import time

import msgpack
import pytest

from pipeline.errors import PipelineError, RunError
from pipeline.transport import publish, sockets
from pipeline.transport.codec import CodecError
from pipeline.transport.hub import FROM_NODE, HubSocket, NodeSocket, Word, read_word
from pipeline.transport.publish import Publisher, SubscriberSocket

DEADLINE_S = 20.0


def tick_until(deadline_s: float = DEADLINE_S):
    end = time.monotonic() + deadline_s

    def tick() -> None:
        if time.monotonic() > end:
            raise TimeoutError

    return tick


def come(publisher: Publisher, number: int = 1) -> None:
    """Return once so many have subscribed."""
    tick = tick_until()
    while publisher.subscribers != number:
        publisher.listen(50)
        tick()


@pytest.fixture
def endpoint(tmp_path):
    return f"ipc://{tmp_path}/socket"


def word(hub):
    """Who spoke, the word, the parts that came with it."""
    heard = hub.receive(round(DEADLINE_S * 1000))
    assert heard is not None
    node, parts = heard
    return node, read_word(parts[0], FROM_NODE), parts[1:]


def test_words_and_parts_arrive_whole_at_the_node_they_are_for(endpoint):
    hub = HubSocket(endpoint)
    nodes = {name: NodeSocket(endpoint, name) for name in (b"unmix.0#1", b"unmix.1#1")}
    for node in nodes.values():
        node.send(Word("ready"))
    assert {word(hub)[0] for _ in nodes} == set(nodes)
    big = b"x" * 200_000
    assert hub.send(b"unmix.1#1", Word("work", 7, t_ns=5), [big, b""])
    received, parts = nodes[b"unmix.1#1"].receive(5000)
    assert received == Word("work", 7, t_ns=5)
    assert [bytes(part) for part in parts] == [big, b""]
    assert nodes[b"unmix.0#1"].receive(100) is None
    for end in (hub, *nodes.values()):
        end.close()


def test_a_node_that_is_not_there_is_told_of_at_once(endpoint):
    hub = HubSocket(endpoint)
    assert not hub.send(b"nobody", Word("stop"))
    hub.close()


@pytest.mark.parametrize(
    "part",
    [
        b"",
        b"hello",
        b"\xc1",
        b"x" * 20_000,
        msgpack.packb(["result"]),
        msgpack.packb(["result", "7", 0, 0, "", "", 0]),
        msgpack.packb(["result", -7, 0, 0, "", "", 0]),
        msgpack.packb(["stop", 0, 0, 0, "", "", 0]),
        msgpack.packb(["lost", 0, True, 0, "", "", 0]),
    ],
)
def test_what_is_no_word_is_refused(part):
    with pytest.raises(CodecError, match="word"):
        read_word(part, FROM_NODE)


def test_a_subscriber_gets_topic_and_messagepack_map(endpoint):
    publisher = Publisher([endpoint], "roof", 100, lossless=False)
    subscriber = SubscriberSocket(endpoint)
    come(publisher)
    publisher.publish({"schema": "x", "n": [1, 2.5, None]}, tick_until())
    assert msgpack.unpackb(subscriber.receive(5.0)) == {"schema": "x", "n": [1, 2.5, None]}
    publisher.close()
    subscriber.close()


def test_subscribers_are_counted_as_they_come_and_go(endpoint):
    publisher = Publisher([endpoint], "roof", 100, lossless=True)
    first, second = SubscriberSocket(endpoint), SubscriberSocket(endpoint)
    come(publisher, 2)
    publisher.publish({"n": 1}, tick_until())
    for subscriber in (first, second):
        assert msgpack.unpackb(subscriber.receive(5.0)) == {"n": 1}
    first.close()
    come(publisher, 1)
    second.close()
    publisher.close()


def test_the_end_of_a_stream_is_acknowledged_with_a_count(endpoint):
    publisher = Publisher([endpoint], "roof", 100, lossless=True)
    whole, short, elsewhere = (SubscriberSocket(endpoint) for _ in range(3))
    come(publisher, 3)
    elsewhere.acknowledge(None)
    whole.acknowledge(12)
    with pytest.raises(RunError, match="1 subscribers did not acknowledge"):
        publisher.wait_acknowledged(12, 1.0)
    short.acknowledge(11)
    with pytest.raises(RunError, match="11 of 12"):
        publisher.wait_acknowledged(12, 5.0)
    for end in (whole, short, elsewhere, publisher):
        end.close()


def test_lossless_publishing_waits_and_loses_nothing(endpoint):
    publisher = Publisher([endpoint], "roof", 10, lossless=True)
    subscriber = SubscriberSocket(endpoint, queue=10)
    come(publisher)
    load = "y" * 100_000  # large enough that kernel buffers do not hide the queue
    received = []

    def receive() -> None:
        time.sleep(0.5)
        while (part := subscriber.receive(5.0)) is not None:
            received.append(msgpack.unpackb(part)["n"])
            if received[-1] == 99:
                return

    thread = threading.Thread(target=receive)
    thread.start()
    for number in range(100):
        publisher.publish({"n": number, "load": load}, tick_until())
    thread.join(DEADLINE_S)
    assert received == list(range(100))
    publisher.close()
    subscriber.close()


def test_lossless_publishing_gives_up_on_a_subscriber_that_takes_nothing(endpoint, monkeypatch):
    monkeypatch.setattr(publish, "STALL_S", 0.3)
    publisher = Publisher([endpoint], "roof", 2, lossless=True)
    subscriber = SubscriberSocket(endpoint, queue=2)
    come(publisher)

    def flood() -> None:
        for _ in range(1000):
            publisher.publish({"load": "y" * 100_000}, tick_until())

    with pytest.raises(RunError, match="taken nothing"):
        flood()
    subscriber.close()
    publisher.close()


def test_live_publishing_is_never_held_back_by_a_subscriber(endpoint):
    publisher = Publisher([endpoint], "roof", 2, lossless=False)
    stuck = SubscriberSocket(endpoint, queue=2)
    come(publisher)
    for number in range(500):
        publisher.publish({"n": number, "load": "y" * 100_000}, tick_until())
    seen = []
    while (part := stuck.receive(0.5)) is not None:
        seen.append(msgpack.unpackb(part)["n"])
    assert seen[0] == 0
    assert 0 < len(seen) < 500, "what it could not take it has lost"
    assert publisher.held_back > 0, "and the publisher has noticed"
    publisher.close()
    stuck.close()


def test_an_address_in_use_is_named():
    first = Publisher(["tcp://127.0.0.1:*"], "roof", 10, lossless=False)
    taken = first._socket.last_endpoint.decode()
    with pytest.raises(PipelineError, match=rf"{taken}: address already in use"):
        Publisher([taken], "roof", 10, lossless=False)
    first.close()


def test_an_ipc_path_too_long_for_the_system_is_named(tmp_path):
    with pytest.raises(PipelineError, match="longer than 107 bytes"):
        HubSocket(f"ipc://{tmp_path}/{'x' * 120}")


def test_a_second_listener_cannot_steal_an_ipc_path(endpoint, tmp_path):
    first = Publisher([endpoint], "roof", 10, lossless=False)
    with pytest.raises(PipelineError, match="address already in use"):
        Publisher([endpoint], "roof", 10, lossless=False)
    subscriber = SubscriberSocket(endpoint)
    come(first)
    first.publish({"n": 1}, tick_until())
    assert subscriber.receive(5.0) is not None, "the first still has its subscribers"
    subscriber.close()
    first.close()
    second = Publisher([endpoint], "roof", 10, lossless=False)
    second.close()
    assert not list(tmp_path.glob("*.lock"))


LEAVES_A_SOCKET = """
import os, signal, sys
from pipeline.transport.publish import Publisher
publisher = Publisher([sys.argv[1]], "roof", 10, lossless=False)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_process_leaves_of_an_ipc_endpoint_is_removed(endpoint, tmp_path):
    subprocess.run([sys.executable, "-c", LEAVES_A_SOCKET, endpoint], check=False)
    assert (tmp_path / "socket").exists()
    sockets.remove_stale(endpoint)
    assert not list(tmp_path.iterdir())
    owner = Publisher([endpoint], "roof", 10, lossless=False)
    sockets.remove_stale(endpoint)
    assert (tmp_path / "socket").exists(), "its owner lives"
    owner.close()


SENDS_AND_ENDS = """
import sys
from pipeline.transport import sockets
from pipeline.transport.publish import Publisher
publisher = Publisher([sys.argv[1]], "roof", 1000, lossless=True)
while not publisher.subscribers:
    publisher.listen(50)
for number in range(100):
    publisher.publish({"n": number, "load": "y" * 200_000}, lambda: None)
publisher.close()
sockets.end()
"""


def test_a_process_that_ends_loses_nothing_a_slow_subscriber_has_not_taken_yet(endpoint):
    process = subprocess.Popen([sys.executable, "-c", SENDS_AND_ENDS, endpoint])
    subscriber = SubscriberSocket(endpoint, queue=1)
    received = []
    while len(received) < 100:
        part = subscriber.receive(20.0)
        assert part is not None, f"only {len(received)} of 100 came"
        received.append(msgpack.unpackb(part)["n"])
        time.sleep(0.005)
    assert received == list(range(100))
    assert process.wait(20.0) == 0
    subscriber.close()


@pytest.mark.parametrize("endpoint", ["inproc://x", "nonsense", "tcp://nowhere", ""])
def test_what_is_no_endpoint_is_named(endpoint):
    with pytest.raises(PipelineError, match="not an endpoint"):
        SubscriberSocket(endpoint)
