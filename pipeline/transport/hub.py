"""The lines between a run's supervisor (ROUTER) and its nodes (DEALER).

Every message is a word, a small MessagePack list, and the parts of a pipeline message if one goes
with it. A node says only what it is asked for: the front sends as many frames as it was granted,
a worker answers what it was given. So no queue is hidden in a socket, where a death would lose it.
Where a node stands beside the flow, the front also sends each `frame` itself, ahead of what it
makes of it; the answer goes ahead of the work it belongs to, as `beside`, or the text says why
there is none.
"""

from typing import Annotated, Any

import msgspec
import zmq
from msgspec import Meta, Struct

from pipeline.messages import misfit
from pipeline.transport.codec import CodecError
from pipeline.transport.sockets import COPY_BELOW_BYTES, bind, new_socket

MAX_WORD_BYTES = 16384
MAX_TEXT = 2000
TO_NODE = frozenset({"grant", "work", "beside", "stop"})
FROM_NODE = frozenset(
    {"ready", "alive", "frame", "result", "lost", "malformed", "failed", "faulted", "end"}
)


Number = Annotated[int, Meta(ge=0)]
Line = Annotated[str, Meta(max_length=MAX_TEXT)]


class Word(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What one side tells the other.

    seq: of the frame; of the first of several lost; of `end` and `grant`, how many frames.
    end: one past the last lost. t_ns: when the frame came in, monotonic. code: to exit with, of
    `failed`; of `work`, how many processes have died on it.
    """

    kind: Line
    seq: Number = 0
    end: Number = 0
    t_ns: int = 0
    stage: Line = ""
    text: Line = ""
    code: int = 0

    def pack(self) -> bytes:
        """As the first part of a message."""
        return msgspec.msgpack.encode(self)


_WORDS = msgspec.msgpack.Decoder(Word)


def read_word(part: Any, kinds: frozenset[str]) -> Word:
    """The word of a message's first part; raises CodecError unless it is one of these kinds."""
    if memoryview(part).nbytes > MAX_WORD_BYTES:
        raise CodecError(f"word: larger than {MAX_WORD_BYTES} bytes")
    try:
        word = _WORDS.decode(part)
    except (ValueError, RecursionError) as error:
        raise CodecError(misfit("word", error)) from error
    if word.pack() != part:
        raise CodecError(f"word: {word.kind!r:.80} is not as it is written")
    if word.kind not in kinds:
        raise CodecError(f"word: {word.kind!r:.80} is none of {', '.join(sorted(kinds))}")
    return word


class HubSocket:
    """The supervisor's end of all lines; a node is known by the identity it connected with."""

    def __init__(self, endpoint: str) -> None:
        self._socket = new_socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self._socket.setsockopt(zmq.SNDHWM, 0)  # what is granted and held is the limit
        self._hold = bind(self._socket, endpoint)
        self._poller = zmq.Poller()
        self._poller.register(self._socket, zmq.POLLIN)

    def receive(self, wait_ms: int) -> tuple[bytes, list[Any]] | None:
        """Who sent the next message, and its parts; None if none came in time."""
        if not self._poller.poll(wait_ms):
            return None
        node, *parts = self._socket.recv_multipart(copy=False)
        return node.bytes, [part.buffer for part in parts]

    def send(self, node: bytes, word: Word, parts: list[Any] | None = None) -> bool:
        """Send to a node; False if it is not there."""
        try:
            _send(self._socket, [node, word.pack(), *(parts or [])])
        except zmq.ZMQError as error:
            if error.errno in (zmq.EHOSTUNREACH, zmq.EAGAIN):
                return False
            raise
        return True

    def close(self) -> None:
        """Close the socket; what is on its way is thrown away."""
        self._socket.close(linger=0)
        self._hold.close()


class NodeSocket:
    """A node's line to its supervisor. wake: a file descriptor that ends a wait, too."""

    def __init__(self, endpoint: str, identity: bytes, wake: int | None = None) -> None:
        self._socket = new_socket(zmq.DEALER)
        self._socket.setsockopt(zmq.ROUTING_ID, identity)
        self._socket.setsockopt(zmq.SNDHWM, 0)
        self._socket.connect(endpoint)
        self._poller = zmq.Poller()
        self._poller.register(self._socket, zmq.POLLIN)
        if wake is not None:
            self._poller.register(wake, zmq.POLLIN)

    def receive(self, wait_ms: int) -> tuple[Word, list[Any]] | None:
        """The next word with its parts; None if none came in time, or the wait was ended."""
        if self._socket not in dict(self._poller.poll(wait_ms)):
            return None
        first, *parts = self._socket.recv_multipart(copy=False)
        return read_word(first.buffer, TO_NODE), [part.buffer for part in parts]

    def send(self, word: Word, parts: list[Any] | None = None) -> None:
        """Tell the supervisor."""
        _send(self._socket, [word.pack(), *(parts or [])])

    def close(self) -> None:
        """Close the socket; what is on its way gets a second to leave, see `sockets.end`."""
        self._socket.close()


def _send(socket: "zmq.Socket[bytes]", parts: list[Any]) -> None:
    """Send parts, the large ones without a copy."""
    *first, last = parts
    for part in first:
        socket.send(part, zmq.SNDMORE, copy=memoryview(part).nbytes < COPY_BELOW_BYTES)
    socket.send(last, copy=memoryview(last).nbytes < COPY_BELOW_BYTES)
