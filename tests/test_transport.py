"""Real sockets: credit between nodes, publishing, and what happens when the other side is slow."""

import subprocess
import sys
import threading
import time

import msgpack
import pytest

from pipeline.errors import PipelineError, RunError
from pipeline.transport import sockets
from pipeline.transport.sockets import CreditReceiver, CreditSender, Publisher, SubscriberSocket

DEADLINE_S = 20.0


def tick_until(deadline_s: float = DEADLINE_S):
    end = time.monotonic() + deadline_s

    def tick() -> None:
        if time.monotonic() > end:
            raise TimeoutError

    return tick


@pytest.fixture
def endpoint(tmp_path):
    return f"ipc://{tmp_path}/socket"


def test_messages_arrive_whole_in_order_and_the_end_carries_the_total(endpoint):
    sender = CreditSender(endpoint, receivers=1, queue=3)
    receiver = CreditReceiver([endpoint], queue=3)
    receiver.open()
    sender.wait_ready(tick_until())
    big = b"x" * 200_000
    received = []

    def receive() -> None:
        while (parts := receiver.receive(tick_until())) is not None:
            received.append([bytes(part) for part in parts])

    thread = threading.Thread(target=receive)
    thread.start()
    for number in range(50):
        sender.send([str(number).encode(), big, b""], tick_until())
    sender.end(50)
    thread.join(DEADLINE_S)
    assert received == [[str(number).encode(), big, b""] for number in range(50)]
    assert receiver.frames_in == 50
    sender.close()
    receiver.close()


def test_sender_waits_for_the_first_credit_of_every_receiver(endpoint):
    sender = CreditSender(endpoint, receivers=2, queue=1)
    first = CreditReceiver([endpoint], queue=1)
    first.open()
    with pytest.raises(TimeoutError):
        sender.wait_ready(tick_until(0.5))
    second = CreditReceiver([endpoint], queue=1)
    second.open()
    sender.wait_ready(tick_until())
    for end in (sender, first, second):
        end.close()


def test_no_more_is_sent_than_there_is_credit_for(endpoint):
    sender = CreditSender(endpoint, receivers=1, queue=2)
    receiver = CreditReceiver([endpoint], queue=2)
    receiver.open()
    sender.wait_ready(tick_until())
    sender.send([b"1"], tick_until())
    sender.send([b"2"], tick_until())
    assert not sender.can_send(wait_ms=100)
    with pytest.raises(TimeoutError):
        sender.send([b"3"], tick_until(0.3))
    assert bytes(receiver.receive(tick_until())[0]) == b"1"
    assert not sender.can_send(wait_ms=50), "credit comes back when a message is done, not taken"
    assert bytes(receiver.receive(tick_until())[0]) == b"2"
    assert sender.can_send(wait_ms=1000)
    sender.close()
    receiver.close()


def test_work_goes_to_the_receiver_that_is_ready(endpoint):
    sender = CreditSender(endpoint, receivers=2, queue=1)
    quick, stuck = CreditReceiver([endpoint], queue=1), CreditReceiver([endpoint], queue=1)
    for receiver in (quick, stuck):
        receiver.open()
    sender.wait_ready(tick_until())
    counts = []

    def work() -> None:
        taken = 0
        while quick.receive(tick_until()) is not None:
            taken += 1
        counts.append(taken)

    thread = threading.Thread(target=work)
    thread.start()
    for _ in range(20):
        sender.send([b"work"], tick_until())
    sender.end(20)
    thread.join(DEADLINE_S)
    assert counts == [19], "one message waits at the receiver that never took it"
    for end in (sender, quick, stuck):
        end.close()


def test_gibberish_from_a_receiver_is_no_credit(endpoint):
    import zmq

    sender = CreditSender(endpoint, receivers=1, queue=4)
    stranger = zmq.Context.instance().socket(zmq.DEALER)
    stranger.linger = 0
    stranger.connect(endpoint)
    for parts in ([b"hello"], [b"credit", b"-5"], [b"credit", b"many"], [b"credit"], [b""] * 9):
        stranger.send_multipart(parts)
    with pytest.raises(TimeoutError):
        sender.wait_ready(tick_until(0.5))
    stranger.close()
    sender.close()


def test_a_subscriber_gets_topic_and_messagepack_map(endpoint):
    publisher = Publisher([endpoint], "roof", 100, lossless=False)
    subscriber = SubscriberSocket(endpoint, topic=b"me")
    publisher.wait_subscribers(b"me", 0, tick_until())
    publisher.publish({"schema": "x", "n": [1, 2.5, None]}, tick_until())
    assert msgpack.unpackb(subscriber.receive(5.0)) == {"schema": "x", "n": [1, 2.5, None]}
    publisher.close()
    subscriber.close()


def test_publishing_starts_when_all_who_were_waited_for_have_come(endpoint):
    publisher = Publisher([endpoint], "roof", 100, lossless=True)
    own = SubscriberSocket(endpoint, topic=b"me")
    first = SubscriberSocket(endpoint)
    late: list[SubscriberSocket] = []

    def tick() -> None:
        """The second of the two comes only after the wait has begun."""
        if not late:
            late.append(SubscriberSocket(endpoint))
        in_time()

    in_time = tick_until()
    publisher.wait_subscribers(b"me", 2, tick)
    (second,) = late
    publisher.publish({"n": 1}, tick_until())
    for end in (own, first, second):
        assert msgpack.unpackb(end.receive(5.0)) == {"n": 1}
        end.close()
    publisher.close()


def test_lossless_publishing_waits_and_loses_nothing(endpoint):
    publisher = Publisher([endpoint], "roof", 10, lossless=True)
    subscriber = SubscriberSocket(endpoint, queue=10, topic=b"me")
    publisher.wait_subscribers(b"me", 0, tick_until())
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
    monkeypatch.setattr(sockets, "STALL_S", 0.3)
    publisher = Publisher([endpoint], "roof", 2, lossless=True)
    subscriber = SubscriberSocket(endpoint, queue=2, topic=b"me")
    publisher.wait_subscribers(b"me", 0, tick_until())

    def flood() -> None:
        for _ in range(1000):
            publisher.publish({"load": "y" * 100_000}, tick_until())

    with pytest.raises(RunError, match="taken nothing"):
        flood()
    subscriber.close()
    publisher.close()


def test_live_publishing_is_never_held_back_by_a_subscriber(endpoint):
    publisher = Publisher([endpoint], "roof", 2, lossless=False)
    stuck = SubscriberSocket(endpoint, queue=2, topic=b"stuck")
    publisher.wait_subscribers(b"stuck", 0, tick_until())
    for number in range(500):
        publisher.publish({"n": number, "load": "y" * 100_000}, tick_until())
    seen = []
    while (part := stuck.receive(0.5)) is not None:
        seen.append(msgpack.unpackb(part)["n"])
    assert seen[0] == 0
    assert 0 < len(seen) < 500, "what it could not take it has lost"
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
        CreditSender(f"ipc://{tmp_path}/{'x' * 120}", receivers=1, queue=1)


def test_a_second_listener_cannot_steal_an_ipc_path(endpoint):
    first = Publisher([endpoint], "roof", 10, lossless=False)
    with pytest.raises(PipelineError, match="address already in use"):
        Publisher([endpoint], "roof", 10, lossless=False)
    subscriber = SubscriberSocket(endpoint, topic=b"me")
    first.wait_subscribers(b"me", 0, tick_until())
    first.publish({"n": 1}, tick_until())
    assert subscriber.receive(5.0) is not None, "the first still has its subscribers"
    subscriber.close()
    first.close()
    second = Publisher([endpoint], "roof", 10, lossless=False)
    second.close()


SENDS_AND_ENDS = """
import sys
from pipeline.transport import sockets
publisher = sockets.Publisher([sys.argv[1]], "roof", 1000, lossless=True)
publisher.wait_subscribers(b"me", 0, lambda: None)
for number in range(100):
    publisher.publish({"n": number, "load": "y" * 200_000}, lambda: None)
publisher.close()
sockets.end()
"""


def test_a_process_that_ends_loses_nothing_a_slow_subscriber_has_not_taken_yet(endpoint):
    process = subprocess.Popen([sys.executable, "-c", SENDS_AND_ENDS, endpoint])
    subscriber = SubscriberSocket(endpoint, queue=1, topic=b"me")
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
