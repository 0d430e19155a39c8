"""Target messages out of the pipeline: one publisher, any number of subscribers.

A subscriber can say nothing but what it subscribes to, so that is how it acknowledges: it takes the
topic `acks` when it comes, and `ack.<n>` when the stream has ended and it has had n messages of
targets and gaps. Who never takes `acks`, such as a program of another's, is not waited for.
"""

import contextlib
import time
from collections.abc import Callable
from typing import Any

import zmq

from pipeline.errors import PipelineError, RunError
from pipeline.transport.codec import pack_wire
from pipeline.transport.security import ClientKeys, ServerKeys
from pipeline.transport.sockets import LINGER_MS, bind, new_socket, reason

POLL_MS = 100
STALL_S = 60
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
        self.held_back = 0  # messages a slow subscriber had no room for
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
        if keys is not None:
            keys.apply(self._socket)
        try:
            for endpoint in endpoints:
                self._hold.enter_context(bind(self._socket, endpoint))
        except PipelineError:
            self._hold.close()
            raise

    def publish(self, message: dict[str, Any], tick: Tick) -> None:
        """Send one message to all; Stuck if, lossless, one takes nothing for a minute."""
        parts = [self._topic, pack_wire(message)]
        deadline = time.monotonic() + STALL_S
        while not self._sent(parts):
            if not self._lossless:
                # Some subscriber has no room: it alone goes without.
                self.held_back += 1
                self._socket.setsockopt(zmq.XPUB_NODROP, 0)
                self._socket.send_multipart(parts, zmq.NOBLOCK)
                self._socket.setsockopt(zmq.XPUB_NODROP, 1)
                break
            if time.monotonic() > deadline:
                raise Stuck(f"a subscriber has taken nothing for {STALL_S} s")
            tick()
            time.sleep(0.001)
        self.listen()

    def _sent(self, parts: list[bytes]) -> bool:
        try:
            self._socket.send_multipart(parts, zmq.NOBLOCK)
        except zmq.Again:
            return False
        return True

    def listen(self, wait_ms: int = 0) -> None:
        """Take in who has come, gone or acknowledged."""
        while self._socket.poll(wait_ms):
            event = self._socket.recv()
            wait_ms = 0
            change, topic = (1 if event[:1] == b"\x01" else -1), event[1:]
            if topic.startswith(b"targets."):
                self.subscribers += change
            elif topic == ACKS:
                self._acknowledging += change
            elif change > 0 and topic.startswith(ACK) and topic[len(ACK) :].isdigit():
                self._acknowledged.append(int(topic[len(ACK) :][:18]))

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


class SubscriberSocket:
    """Receives what a Publisher sends. queue: how many messages may wait here, 0 = any number."""

    def __init__(self, endpoint: str, *, queue: int = 1000, keys: ClientKeys | None = None) -> None:
        self._socket = new_socket(zmq.SUB)
        self._socket.setsockopt(zmq.RCVHWM, queue)
        self._socket.setsockopt(zmq.SUBSCRIBE, ACKS)
        self._socket.setsockopt(zmq.SUBSCRIBE, b"targets.")
        try:
            if keys is not None:
                keys.apply(self._socket)
            if not endpoint.startswith(("tcp://", "ipc://")):
                raise zmq.ZMQError(zmq.EPROTONOSUPPORT)
            self._socket.connect(endpoint)
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

    def acknowledge(self, messages: int | None) -> None:
        """Tell the publisher how many messages there were; None = do not wait for me."""
        if messages is None:
            self._socket.setsockopt(zmq.UNSUBSCRIBE, ACKS)
        else:
            self._socket.setsockopt(zmq.SUBSCRIBE, ACK + str(messages).encode())

    def close(self) -> None:
        """Leave."""
        self._socket.close()
