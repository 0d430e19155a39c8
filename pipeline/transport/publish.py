"""Target messages out of the pipeline: one publisher, any number of subscribers.

A subscriber can say nothing but what it subscribes to, so that is how it acknowledges: it takes the
topic `acks` when it comes, and `ack.<n>` when the stream has ended and it has had n messages of
targets and gaps. Who never takes `acks`, such as a program of another's, is not waited for.
"""

import contextlib
import re
import socket
import time
from collections.abc import Callable
from typing import Any

import zmq

from pipeline.errors import PipelineError, RunError, Unavailable
from pipeline.transport.backlog import Backlog
from pipeline.transport.codec import pack_wire
from pipeline.transport.refusals import Refusals
from pipeline.transport.security import ClientKeys, ServerKeys
from pipeline.transport.sockets import LINGER_MS, bind, new_socket, reason, speak_ip

POLL_MS = 100
STALL_S = 60
GRACE_S, GRACE_TRIES, MAX_GRACE_S, GRACE_EVERY_S = 0.01, 20, 0.05, 0.25
MAX_TOPIC_BYTES = 1024
"""libzmq walks a topic byte by byte in recursion: one of megabytes overflows its stack."""
ACKS = b"acks"
ACK = b"ack."

Tick = Callable[[], None]
"""Called while waiting, at least ten times a second; raises to give the wait up."""


class Stuck(RunError):
    """A subscriber that must not lose anything takes nothing."""


class Publisher:
    """Publishes maps of plain types on the topic `targets.<sensor_id>`.

    lossless: a subscriber that falls `queue` messages behind holds the publisher back (replay);
    otherwise it loses messages, which it sees by the sequence numbers, and slows nobody (live).
    keys: who is let in; None = everybody who can reach the endpoint.

    How many messages it loses only the subscriber can know. `held_back` is an upper bound: messages
    published while a subscriber was behind (see `backlog`), once for each such subscriber. One that
    reads nothing has lost all of them, one that is only slow gets some, late.
    """

    def __init__(
        self,
        endpoints: list[str],
        sensor_id: str,
        queue: int,
        *,
        lossless: bool,
        keys: ServerKeys | None = None,
    ) -> None:
        self._topic = f"targets.{sensor_id}".encode()
        self._lossless = lossless
        self.subscribers = 0
        self.held_back = 0
        self._backlog = Backlog()
        self._grace_at = 0.0
        self._acknowledging = 0
        self._acknowledged: list[int] = []
        self._hold = contextlib.ExitStack()
        if keys is not None:
            self._hold.enter_context(keys.admitting())
        self._socket = new_socket(zmq.XPUB)
        self._socket.setsockopt(zmq.MAXMSGSIZE, MAX_TOPIC_BYTES)
        self._socket.setsockopt(zmq.SNDHWM, queue)
        self._socket.setsockopt(zmq.XPUB_NODROP, 1)
        self._socket.setsockopt(zmq.XPUB_VERBOSER, 1)  # to count subscribers of one topic
        if lossless:
            self._socket.setsockopt(zmq.LINGER, round(STALL_S * 1000))
        self._refusals: Refusals | None = None
        if keys is not None:
            keys.apply(self._socket)
            self._refusals = Refusals(self._socket)
            self._hold.callback(self._refusals.close)
        try:
            for endpoint in endpoints:
                self._hold.enter_context(bind(self._socket, endpoint))
        except PipelineError:
            self._hold.close()
            raise

    @property
    def refused(self) -> int:
        """Connections that were not let in."""
        return self._refusals.count if self._refusals else 0

    def publish(self, message: dict[str, Any], tick: Tick) -> None:
        """Send one message to all; Stuck if, lossless, one takes nothing for a minute."""
        parts = [self._topic, pack_wire(message)]
        if self._lossless:
            deadline = time.monotonic() + STALL_S
            while not self._sent(parts):
                if time.monotonic() > deadline:
                    raise Stuck(f"a subscriber has taken nothing for {STALL_S} s")
                tick()
                time.sleep(0.001)
        else:
            self._backlog.look()  # not right after a message was sent, when it waits for everybody
            if not self._sent_soon(parts):
                self._backlog.full()
                self._send_past_the_full(parts)
            self.held_back += self._backlog.suspects
        self._listen(0)

    def _sent_soon(self, parts: list[bytes]) -> bool:
        """False if some queue is full, and not only since libzmq's thread has had no time for it.

        As after hundreds of gaps at once, which a subscriber is not to lose that does keep up.
        """
        if self._sent(parts):
            return True
        now = time.monotonic()
        if now < self._grace_at:
            return False
        for _ in range(GRACE_TRIES):  # counted, as either thread may not have run meanwhile
            if time.monotonic() > now + MAX_GRACE_S:
                break
            time.sleep(GRACE_S / GRACE_TRIES)
            if self._sent(parts):
                return True
        self._grace_at = time.monotonic() + GRACE_EVERY_S
        return False

    def _send_past_the_full(self, parts: list[bytes]) -> None:
        """Some subscriber has no room: it alone goes without, until it has."""
        self._socket.setsockopt(zmq.XPUB_NODROP, 0)
        self._socket.send_multipart(parts, zmq.NOBLOCK)
        self._socket.setsockopt(zmq.XPUB_NODROP, 1)

    @property
    def behind(self) -> int:
        """Subscribers that had no room for a message and have not caught up since."""
        return self._backlog.behind

    def _sent(self, parts: list[bytes]) -> bool:
        try:
            self._socket.send_multipart(parts, zmq.NOBLOCK)
        except zmq.Again:
            return False
        return True

    def listen(self, wait_ms: int = 0) -> None:
        """Take in who has come, gone, acknowledged, caught up, or was refused."""
        self._backlog.look()
        self._listen(wait_ms)

    def _listen(self, wait_ms: int) -> None:
        if self._refusals is not None:
            self._refusals.listen()
        while self._socket.poll(wait_ms):
            frame = self._socket.recv(copy=False)
            wait_ms = 0
            event = frame.bytes
            change, topic = (1 if event[:1] == b"\x01" else -1), event[1:]
            if change > 0 and self._topic.startswith(topic):
                self._backlog.met(_connection(frame))
            if topic.startswith(b"targets."):
                self.subscribers += change
            elif topic == ACKS:
                self._acknowledging += change
            elif change > 0 and topic.startswith(ACK) and topic[len(ACK) :].isdigit():
                self._acknowledged.append(int(topic[len(ACK) :][:18]))

    def expect_acknowledged(self) -> None:
        """The end comes next: what was acknowledged before was another stream's."""
        self._listen(0)
        self._acknowledged.clear()

    def wait_acknowledged(self, messages: int, timeout_s: float) -> None:
        """Return once all who acknowledge have had so many messages of targets and gaps.

        Raises RunError if one had fewer, or says nothing in time.
        """
        deadline = time.monotonic() + timeout_s
        while len(self._acknowledged) < self._acknowledging:
            if time.monotonic() > deadline:
                raise RunError(
                    f"{self._acknowledging - len(self._acknowledged)} subscribers did not "
                    f"acknowledge the end of the stream within {timeout_s:g} s"
                )
            self.listen(POLL_MS)
        for had in self._acknowledged:
            if had != messages:
                raise RunError(f"a subscriber had {had} of {messages} messages")

    def abandon(self) -> None:
        """What is on its way gets no more than a second: the stream has failed anyway."""
        self._socket.setsockopt(zmq.LINGER, LINGER_MS)

    def close(self) -> None:
        """Close the socket; what is on its way gets a second, lossless a minute, see `end`."""
        self._socket.close()
        self._hold.close()


def _connection(frame: zmq.Frame) -> int:
    """The file descriptor a message came through; -1 if it is not known."""
    try:
        return int(frame.get(zmq.SRCFD))
    except zmq.ZMQError:
        return -1


def _check_host(endpoint: str) -> None:
    """Raise Unavailable if nobody knows the host; libzmq would wait until somebody does.

    A name server that does not answer is no answer.
    """
    host = re.fullmatch(r"tcp://([A-Za-z0-9._-]+):[0-9]+", endpoint)
    if host is None:
        return
    try:
        socket.getaddrinfo(host[1], None, socket.AF_INET)
    except socket.gaierror as error:
        if error.errno != socket.EAI_AGAIN:
            raise Unavailable(
                f"{endpoint}: no host `{host[1]}` is known now ({error.strerror}); check the name"
            ) from error


class SubscriberSocket:
    """Receives what a Publisher sends. queue: how many messages may wait here, 0 = any number."""

    def __init__(self, endpoint: str, *, queue: int = 1000, keys: ClientKeys | None = None) -> None:
        self._socket = new_socket(zmq.SUB)
        self._socket.setsockopt(zmq.RCVHWM, queue)
        self._said: set[bytes] = set()
        self.begin()
        self._socket.setsockopt(zmq.SUBSCRIBE, b"targets.")
        try:
            if keys is not None:
                keys.apply(self._socket)
            if not endpoint.startswith(("tcp://", "ipc://")):
                raise zmq.ZMQError(zmq.EPROTONOSUPPORT)
            _check_host(endpoint)
            speak_ip(self._socket, endpoint)
            self._socket.connect(endpoint)
        except PipelineError:
            self._socket.close()
            raise
        except zmq.ZMQError as error:
            self._socket.close()
            raise PipelineError(
                f"{endpoint}: not an endpoint ({reason(error)}); use e.g. tcp://127.0.0.1:5556"
            ) from error

    def receive(self, timeout_s: float) -> bytes | None:
        """The next message's MessagePack bytes, None if none came in time."""
        if not self._socket.poll(round(timeout_s * 1000)):
            return None
        parts = self._socket.recv_multipart()
        return parts[1] if len(parts) == 2 else b""

    def begin(self) -> None:
        """A stream begins: its publisher is to wait until all of it has been acknowledged."""
        self._say(ACKS)

    def acknowledge(self, messages: int) -> None:
        """Tell the publisher how many messages there were."""
        self._say(ACKS, ACK + str(messages).encode())

    def decline(self) -> None:
        """Tell the publisher not to wait: this subscriber came when the stream had begun."""
        self._say()

    def _say(self, *topics: bytes) -> None:
        """Be subscribed to these of the topics that are for the publisher to see, and no other."""
        for topic in self._said - set(topics):
            self._socket.setsockopt(zmq.UNSUBSCRIBE, topic)
        for topic in set(topics) - self._said:
            self._socket.setsockopt(zmq.SUBSCRIBE, topic)
        self._said = set(topics)

    def close(self) -> None:
        """Leave."""
        self._socket.close()
