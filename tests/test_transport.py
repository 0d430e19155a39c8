"""Real sockets: credit between nodes, publishing, and what happens when the other side is slow."""

import contextlib
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import msgpack
import pytest

from pipeline.errors import PipelineError, RunError
from pipeline.transport import publish, sockets
from pipeline.transport.codec import CodecError
from pipeline.transport.hub import FROM_NODE, HubSocket, NodeSocket, Word, read_word
from pipeline.transport.publish import Publisher, SubscriberSocket
from pipeline.transport.security import ClientKeys, ServerKeys, make_keys

DEADLINE_S = 20.0


def tick_until(deadline_s: float = DEADLINE_S):
    end = time.monotonic() + deadline_s

    def tick() -> None:
        if time.monotonic() > end:
            raise TimeoutError

    return tick


@pytest.fixture
def keep():
    """Gives back what it is given, and closes it whatever comes: an open socket hangs the exit."""
    with contextlib.ExitStack() as stack:
        yield lambda end: stack.enter_context(contextlib.closing(end))


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
        msgpack.packb(["result", 7, 0, 0, "", "", 0, 0]),
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
    elsewhere.decline()
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


def test_live_publishing_is_never_held_back_by_a_subscriber(endpoint, keep):
    publisher = keep(Publisher([endpoint], "roof", 2, lossless=False))
    stuck = keep(SubscriberSocket(endpoint, queue=2))
    come(publisher)
    for number in range(500):
        publisher.publish({"n": number, "load": "y" * 100_000}, tick_until())
    seen = numbers(stuck)
    assert seen[0] == 0
    assert 0 < len(seen) < 500, "what it could not take it has lost"
    assert publisher.held_back >= 500 - len(seen), "and the publisher knows at most how much"


def numbers(subscriber, until=None):
    """Numbers of the messages that come, to one number or to the end of what waits."""
    found = []
    while (until is None or until not in found[-1:]) and (part := subscriber.receive(1.0)):
        found.append(msgpack.unpackb(part)["n"])
    return found


def test_a_burst_longer_than_the_queue_costs_one_that_keeps_up_nothing(endpoint, keep):
    publisher = keep(Publisher([endpoint], "roof", 200, lossless=False))
    good = keep(SubscriberSocket(endpoint))
    come(publisher)
    with ThreadPoolExecutor(1) as pool:
        had = pool.submit(numbers, good, 2999)
        for number in range(3000):
            publisher.publish({"n": number}, tick_until())
        assert had.result(DEADLINE_S) == list(range(3000))
    assert publisher.held_back == 0


def flood(publisher, load="y" * 10_000):
    """Publish until somebody is behind."""
    tick = tick_until()
    while not publisher.behind:
        publisher.publish({"load": load}, tick)
        tick()


def wait_caught_up(publisher):
    tick = tick_until()
    while publisher.behind:
        publisher.listen(20)
        tick()


@pytest.mark.parametrize("where", ["ipc", "tcp"])
def test_what_a_subscriber_that_stopped_reading_goes_without_is_counted(where, endpoint, keep):
    endpoint = endpoint if where == "ipc" else "tcp://127.0.0.1:*"
    publisher = keep(Publisher([endpoint], "roof", 5, lossless=False))
    endpoint = publisher._socket.last_endpoint.decode()
    stopped = keep(SubscriberSocket(endpoint, queue=1))
    good = keep(SubscriberSocket(endpoint))
    come(publisher, 2)
    load, sent, taken = "y" * 10_000, 0, []

    def send() -> None:
        nonlocal sent
        publisher.publish({"n": sent, "load": load}, tick_until())
        taken.extend(numbers(good, until=sent))
        sent += 1

    while not publisher.behind:  # kernel and queues are filled
        send()
    for _ in range(50):  # what can still move into them has moved, and who is behind is known
        time.sleep(0.01)
        send()
    before, first = publisher.held_back, sent
    for _ in range(3000):
        send()
        assert publisher.behind == 1, "also where libzmq says nothing any more"
    assert publisher.held_back - before == 3000
    assert taken == list(range(sent)), "the other had every message, before the next was sent"

    had = numbers(stopped)
    assert had == sorted(set(had))
    assert max(had) < first, "of the 3000 it had none"
    assert sent - len(had) <= publisher.held_back
    wait_caught_up(publisher)  # it has read all now
    counted = publisher.held_back
    for _ in range(200):
        send()
        assert numbers(stopped, until=sent - 1) == [sent - 1]
    assert publisher.held_back == counted, "who has caught up is not behind"


def test_a_subscriber_with_a_key_that_falls_behind_is_seen_too(tmp_path, keep):
    make_keys(tmp_path / "keys", "tracker")
    keys = ServerKeys.load(tmp_path / "keys/server")
    publisher = keep(Publisher(["tcp://127.0.0.2:*"], "roof", 5, lossless=False, keys=keys))
    endpoint = publisher._socket.last_endpoint.decode()
    own = ClientKeys.load(tmp_path / "keys/tracker")
    stopped = keep(SubscriberSocket(endpoint, queue=1, keys=own))
    come(publisher)
    flood(publisher, "y" * 100_000)
    while stopped.receive(1.0):
        pass
    wait_caught_up(publisher)


def test_a_slow_subscriber_is_behind_all_the_time_and_loses_no_more_than_is_counted(endpoint, keep):
    publisher = keep(Publisher([endpoint], "roof", 5, lossless=False))
    slow = keep(SubscriberSocket(endpoint, queue=1))
    come(publisher)
    had, behind = [], []
    for number in range(3000):
        publisher.publish({"n": number, "load": "y" * 10_000}, tick_until())
        if number % 10 == 0 and (part := slow.receive(0.0)) is not None:
            had.append(msgpack.unpackb(part)["n"])
        behind.append(publisher.behind)
        time.sleep(0.0003)
    assert behind == sorted(behind), "once behind it stays so"
    assert sum(behind) > 1000
    had += numbers(slow)
    assert had == sorted(set(had))
    assert len(had) < 1500
    assert 3000 - len(had) <= publisher.held_back <= 3000


def test_who_leaves_while_behind_is_behind_no_more_and_who_comes_next_is_not(
    endpoint, keep, caplog
):
    publisher = keep(Publisher([endpoint], "roof", 5, lossless=False))
    stopped = keep(SubscriberSocket(endpoint, queue=1))
    come(publisher)
    flood(publisher)
    stopped.close()
    wait_caught_up(publisher)
    assert f"subscriber of process {os.getpid()} is behind" in caplog.messages[0]
    assert "is gone after" in caplog.messages[1]
    after = keep(SubscriberSocket(endpoint))  # it may have the file descriptor of who has left
    come(publisher)
    publisher.publish({"n": 1}, tick_until())
    assert numbers(after, until=1) == [1]
    assert publisher.behind == 0


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
