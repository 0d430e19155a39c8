"""The sockets between nodes and towards subscribers, each owned by one thread.

Between nodes work is given out on credit: a receiver (DEALER) tells each sender (ROUTER) how many
messages it is ready to take, and the sender sends no more than that. The first credit is also the
start handshake, and since a node gives credit only once those after it are ready, readiness runs
from the end of the flow to its beginning.
"""

import contextlib
import fcntl
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import zmq

from pipeline.errors import PipelineError, RunError
from pipeline.transport.codec import pack_wire

LINGER_MS = 1000
POLL_MS = 100
STALL_S = 60
COPY_BELOW_BYTES = 65536
MAX_MESSAGE_BYTES = 1 << 28
MAX_IPC_PATH_BYTES = 107
CREDIT, MESSAGE, END = b"credit", b"message", b"end"

Tick = Callable[[], None]
"""Called while waiting, at least ten times a second; raises to give the wait up."""


def _socket(kind: int) -> "zmq.Socket[bytes]":
    socket: zmq.Socket[bytes] = zmq.Context.instance().socket(kind)
    socket.setsockopt(zmq.LINGER, LINGER_MS)
    socket.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
    return socket


def end() -> None:
    """Wait until what closed sockets still hold has left, each for its linger; then no more zmq.

    The last thing a process does: without it, what is queued at exit is thrown away.
    """
    zmq.Context.instance().destroy(linger=LINGER_MS)


def bind(socket: "zmq.Socket[bytes]", endpoint: str) -> contextlib.ExitStack:
    """Listen at an endpoint; returns what holds it, to be closed with the socket."""
    hold = contextlib.ExitStack()
    try:
        if endpoint.startswith("ipc://"):
            hold.enter_context(_ipc_lock(endpoint))
        socket.bind(endpoint)
    except zmq.ZMQError as error:
        hold.close()
        socket.close()
        if error.errno == zmq.EADDRINUSE:
            raise _in_use(endpoint) from error
        raise PipelineError(f"{endpoint}: cannot listen there ({_reason(error)})") from error
    except PipelineError:
        socket.close()
        raise
    return hold


def _reason(error: zmq.ZMQError) -> str:
    return zmq.strerror(error.errno or 0)


def _in_use(endpoint: str) -> PipelineError:
    return PipelineError(
        f"{endpoint}: address already in use; stop what listens there or choose another"
    )


def _ipc_lock(endpoint: str) -> IO[bytes]:
    """A lock beside the path: a second bind would succeed and leave the first deaf."""
    path = endpoint.removeprefix("ipc://")
    if len(os.fsencode(path)) > MAX_IPC_PATH_BYTES:
        raise PipelineError(f"{endpoint}: path longer than 107 bytes; use a shorter one or TMPDIR")
    try:
        lock = Path(path + ".lock").open("ab")  # noqa: SIM115, held as long as the socket
    except OSError as error:
        raise PipelineError(f"{endpoint}: cannot listen there ({error.strerror})") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        lock.close()
        raise _in_use(endpoint) from error
    return lock


class CreditSender:
    """Sends each message to one of the receivers that have credit, the readiest first."""

    def __init__(self, endpoint: str, receivers: int, queue: int) -> None:
        self._socket = _socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self._socket.setsockopt(zmq.SNDHWM, 0)  # credit is the limit
        self._hold = bind(self._socket, endpoint)
        self._receivers = receivers
        self._limit = queue
        self._credit: dict[bytes, int] = {}

    def wait_ready(self, tick: Tick) -> None:
        """Return once every receiver has given its first credit."""
        while len(self._credit) < self._receivers:
            self._collect(POLL_MS)
            tick()

    def send(self, parts: list[Any], tick: Tick) -> None:
        """Send one message, waiting for credit as long as `tick` allows."""
        while not any(self._credit.values()):
            self._collect(POLL_MS)
            tick()
        self._collect(0)
        receiver = max(self._credit, key=self._credit.__getitem__)
        self._credit[receiver] -= 1
        self._send(receiver, [MESSAGE, *parts])

    def can_send(self, wait_ms: int) -> bool:
        """True if a receiver has credit now or within `wait_ms`."""
        self._collect(0)
        if not any(self._credit.values()):
            self._collect(wait_ms)
        return any(self._credit.values())

    def end(self, frames_in: int) -> None:
        """Tell every receiver that nothing more comes, and how many frames there were in all."""
        for receiver in self._credit:
            self._send(receiver, [END, str(frames_in).encode()])

    def close(self) -> None:
        """Close the socket; what is on its way gets a second to leave, see `end`."""
        self._socket.close()
        self._hold.close()

    def _collect(self, wait_ms: int) -> None:
        """Take in the credits that have come."""
        while self._socket.poll(wait_ms):
            receiver, *parts = self._socket.recv_multipart()
            if len(parts) != 2 or parts[0] != CREDIT or not parts[1].isdigit():
                continue  # not one of ours: a credit is the only thing a receiver may say
            credit = self._credit.get(receiver, 0) + int(parts[1][:6])
            self._credit[receiver] = min(credit, self._limit)
            wait_ms = 0

    def _send(self, receiver: bytes, parts: list[Any]) -> None:
        try:
            _send_parts(self._socket, [receiver, *parts])
        except zmq.ZMQError as error:
            raise RunError(f"a receiver is gone ({_reason(error)})") from error


def _send_parts(socket: "zmq.Socket[bytes]", parts: list[Any]) -> None:
    """Send parts, the large ones without a copy."""
    *first, last = parts
    for part in first:
        socket.send(part, zmq.SNDMORE, copy=memoryview(part).nbytes < COPY_BELOW_BYTES)
    socket.send(last, copy=memoryview(last).nbytes < COPY_BELOW_BYTES)


class CreditReceiver:
    """Receives from several senders; gives a credit back for each message that is done."""

    def __init__(self, endpoints: list[str], queue: int) -> None:
        self._queue = queue
        self._sockets = []
        self._poller = zmq.Poller()
        for endpoint in endpoints:
            socket = _socket(zmq.DEALER)
            socket.connect(endpoint)
            self._sockets.append(socket)
            self._poller.register(socket, zmq.POLLIN)
        self._last: zmq.Socket[bytes] | None = None
        self.frames_in = 0

    def open(self) -> None:
        """Give the first credits: this node, and all after it, are ready."""
        for socket in self._sockets:
            socket.send_multipart([CREDIT, str(self._queue).encode()])

    def receive(self, tick: Tick) -> list[Any] | None:
        """The parts of the next message, None once every sender has ended."""
        if self._last is not None:
            self._last.send_multipart([CREDIT, b"1"])
            self._last = None
        while self._sockets:
            for socket, _ in self._poller.poll(POLL_MS):
                kind, *parts = socket.recv_multipart(copy=False)
                if kind.bytes == MESSAGE:
                    self._last = socket
                    return [part.buffer for part in parts]
                if kind.bytes == END:
                    self.frames_in = int(parts[0].bytes)
                    self._finish(socket)
            tick()
        return None

    def _finish(self, socket: "zmq.Socket[bytes]") -> None:
        self._poller.unregister(socket)
        self._sockets.remove(socket)
        socket.close()

    def close(self) -> None:
        """Close what is still open."""
        for socket in list(self._sockets):
            self._finish(socket)


class Publisher:
    """Publishes maps of plain types on the topic `targets.<sensor_id>`.

    lossless: a subscriber that falls `queue` messages behind holds the publisher back (replay);
    otherwise it loses messages, which it sees by the sequence numbers, and slows nobody (live).
    """

    def __init__(self, endpoints: list[str], sensor_id: str, queue: int, *, lossless: bool) -> None:
        self._topic = f"targets.{sensor_id}".encode()
        self._socket = _socket(zmq.XPUB)
        self._socket.setsockopt(zmq.SNDHWM, queue)
        self._socket.setsockopt(zmq.XPUB_NODROP, lossless)
        if lossless:
            self._socket.setsockopt(zmq.LINGER, round(STALL_S * 1000))
        self._socket.setsockopt(zmq.XPUB_VERBOSE, 1)  # to count subscribers of one topic
        self._hold = contextlib.ExitStack()
        for endpoint in endpoints:
            self._hold.enter_context(bind(self._socket, endpoint))

    def wait_subscribers(self, topic: bytes, others: int, tick: Tick) -> None:
        """Return once somebody has subscribed to exactly this topic, and `others` to targets.

        Whoever subscribes to the topic subscribes to targets too, and is not one of the others.
        """
        known, targets = False, 0
        while not known or targets <= others:
            if self._socket.poll(POLL_MS):
                event = self._socket.recv()
                known |= event == b"\x01" + topic
                targets += event.startswith(b"\x01targets.")
            tick()

    def publish(self, message: dict[str, Any], tick: Tick) -> None:
        """Send one message to all; RunError if, lossless, one takes nothing for a minute."""
        parts = [self._topic, pack_wire(message)]
        deadline = time.monotonic() + STALL_S
        while True:
            try:
                self._socket.send_multipart(parts, zmq.NOBLOCK)
                break
            except zmq.Again:
                if time.monotonic() > deadline:
                    raise RunError(f"a subscriber has taken nothing for {STALL_S} s") from None
                tick()
                time.sleep(0.001)
        while self._socket.poll(0):
            self._socket.recv()  # later subscriptions: nothing to do

    def close(self) -> None:
        """Close the socket; what is on its way gets a second, lossless a minute, see `end`."""
        self._socket.close()
        self._hold.close()


class SubscriberSocket:
    """Receives what a Publisher sends.

    queue: how many messages may wait here, 0 = without limit. topic: subscribed to as well.
    """

    def __init__(self, endpoint: str, *, queue: int = 1000, topic: bytes = b"") -> None:
        self._socket = _socket(zmq.SUB)
        self._socket.setsockopt(zmq.RCVHWM, queue)
        self._socket.setsockopt(zmq.SUBSCRIBE, b"targets.")
        if topic:
            self._socket.setsockopt(zmq.SUBSCRIBE, topic)
        try:
            if not endpoint.startswith(("tcp://", "ipc://")):
                raise zmq.ZMQError(zmq.EPROTONOSUPPORT)
            self._socket.connect(endpoint)
        except zmq.ZMQError as error:
            self._socket.close()
            raise PipelineError(
                f"{endpoint}: not an endpoint ({_reason(error)}); use e.g. tcp://127.0.0.1:5556"
            ) from error

    def receive(self, timeout_s: float) -> bytes | None:
        """The next message's MessagePack bytes, None if none came in time."""
        if not self._socket.poll(round(timeout_s * 1000)):
            return None
        parts = self._socket.recv_multipart()
        return parts[1] if len(parts) == 2 else b""

    def close(self) -> None:
        """Leave."""
        self._socket.close()


class ControlSender:
    """A node's line to its supervisor: small maps, never lost on one machine."""

    def __init__(self, endpoint: str) -> None:
        self._socket = _socket(zmq.PUSH)
        self._socket.connect(endpoint)

    def send(self, event: dict[str, Any]) -> None:
        """Tell the supervisor."""
        self._socket.send(pack_wire(event))

    def close(self) -> None:
        """Close the socket; what is on its way gets a second to leave, see `end`."""
        self._socket.close()


class ControlReceiver:
    """The supervisor's end of all nodes' lines."""

    def __init__(self, endpoint: str) -> None:
        self._socket = _socket(zmq.PULL)
        self._hold = bind(self._socket, endpoint)

    def receive(self, timeout_s: float) -> bytes | None:
        """The next event's bytes, None if none came in time."""
        return self._socket.recv() if self._socket.poll(round(timeout_s * 1000)) else None

    def close(self) -> None:
        """Leave."""
        self._socket.close(linger=0)
        self._hold.close()
