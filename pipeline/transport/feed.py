"""Frames from other programs: the message `irst.frame/1`, and the socket they are pushed to.

Two parts: a MessagePack map (`FrameHeader`), then the pixels row by row, little-endian, nothing
else. docs/sources.md has the table, examples/ a sender in Python and one in C.
"""

from typing import Annotated, Any, Literal

import numpy as np
import zmq
from msgspec import Meta
from msgspec.structs import astuple, replace

from pipeline.errors import PipelineError
from pipeline.messages import BadMessage, Pose, SentFrame
from pipeline.transport.codec import CodecError, unpack_wire
from pipeline.transport.sockets import MAX_MESSAGE_BYTES, bind
from pipeline.wire import Finite, Map, read_map

QUEUE = 16
"""Frames that may wait here; after that the sender waits, or sheds as it likes."""

Integer64 = Annotated[int, Meta(ge=-(1 << 63), le=(1 << 63) - 1)]
Length = Annotated[int, Meta(ge=1, le=16384)]
Remark = Annotated[str, Meta(max_length=64)]


class PoseMap(Map, frozen=True):
    """Where the camera looked, radians; azimuth clockwise from north."""

    az_rad: Finite
    el_rad: Finite
    roll_rad: Finite = 0.0


class FrameHeader(Map, frozen=True, kw_only=True):
    """`irst.frame/1`: one frame. seq counts every frame the sender had, from any number on."""

    schema: Literal["irst.frame/1"]
    seq: Annotated[int, Meta(ge=0, le=(1 << 63) - 1)]
    t_exposure_ns: Integer64
    clock: Annotated[str, Meta(min_length=1, max_length=64)] = "utc"
    dtype: Literal["uint8", "uint16"]
    shape: Annotated[list[Length], Meta(min_length=2, max_length=2)]
    flags: Annotated[tuple[Remark, ...], Meta(max_length=16)] = ()
    pose: PoseMap | None = None


class FeedSocket:
    """Listens at an endpoint; senders connect to it with PUSH.

    Its context is its own, so that a process may end while a thread still waits here.
    """

    def __init__(self, endpoint: str) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = self._context.socket(zmq.PULL)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.RCVHWM, QUEUE)
        self._socket.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
        try:
            self._hold = bind(self._socket, endpoint)
        except PipelineError:
            self._context.term()
            raise

    def receive(self, timeout_s: float) -> SentFrame | BadMessage | None:
        """What came next, with its parts; None if nothing came in time."""
        if not self._socket.poll(round(timeout_s * 1000)):
            return None
        parts = [part.buffer for part in self._socket.recv_multipart(copy=False)]
        return replace(sent_frame(parts), parts=tuple(parts))

    def close(self) -> None:
        """Listen no more; frames that wait here are lost."""
        self._socket.close()
        self._hold.close()
        self._context.term()


def sent_frame(parts: list[Any]) -> SentFrame | BadMessage:
    """The frame in the parts of a message, its pixels a read-only view; or why there is none."""
    if len(parts) != 2:
        return BadMessage(None, f"{len(parts)} parts; send two, header and pixels")
    try:
        fields = unpack_wire(parts[0])
    except CodecError as error:
        return BadMessage(None, f"header is {error}")
    seq = fields.get("seq")
    seq = seq if type(seq) is int and 0 <= seq < 1 << 63 else None
    try:
        header = read_map(fields, FrameHeader, "header")
    except ValueError as error:
        return BadMessage(seq, f"{error}; docs/sources.md has the table")
    dtype = np.dtype(header.dtype).newbyteorder("<")
    height, width = header.shape
    size, found = height * width * dtype.itemsize, memoryview(parts[1]).nbytes
    if size != found:
        return BadMessage(seq, f"{width}×{height} {header.dtype} needs {size} bytes, not {found}")
    pixels_HW = np.frombuffer(parts[1], dtype).reshape(height, width)
    return SentFrame(
        seq=header.seq,
        t_exposure_ns=header.t_exposure_ns,
        clock=header.clock,
        pixels_HW=pixels_HW.astype(header.dtype, copy=False),
        flags=header.flags,
        pose=None if header.pose is None else Pose(*astuple(header.pose)),
    )
