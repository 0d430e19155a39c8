"""Frames for those who record them: what the front takes in, published beside the flow.

A recorder that is too slow misses frames, which it sees by their numbers; it slows nobody.
"""

import time

import msgpack
import zmq

from pipeline.errors import PipelineError
from pipeline.messages import Frame, Trace
from pipeline.physics.sensor import Sensor
from pipeline.transport import codec
from pipeline.transport.sockets import bind, new_socket, reason

QUEUE = 64
WELCOME = b"welcome"


class FramePublisher:
    """Publishes frames at an endpoint; does nothing without one."""

    def __init__(self, endpoint: str | None, sensor: Sensor) -> None:
        self._sensor: bytes = msgpack.packb(sensor.to_attributes())
        self._socket: zmq.Socket[bytes] | None = None
        if endpoint is not None:
            self._socket = new_socket(zmq.XPUB)
            self._socket.setsockopt(zmq.SNDHWM, QUEUE)
            self._socket.setsockopt(zmq.XPUB_WELCOME_MSG, WELCOME)
            self._hold = bind(self._socket, endpoint)

    def listen(self) -> None:
        """Welcome who has come: libzmq does it when the socket is used."""
        while self._socket is not None and self._socket.poll(0):
            self._socket.recv()

    def publish(self, frame: Frame) -> None:
        """Hand the frame to everybody who has room for it."""
        if self._socket is not None:
            parts = codec.encode(frame, Trace(0, {}), time.monotonic_ns())
            self._socket.send_multipart([self._sensor, *parts], zmq.NOBLOCK, copy=False)

    def close(self) -> None:
        """Close the socket."""
        if self._socket is not None:
            self._socket.close(linger=0)
            self._hold.close()


class FrameSubscriber:
    """Receives what a FramePublisher publishes."""

    def __init__(self, endpoint: str) -> None:
        self._endpoint = endpoint
        self._socket = new_socket(zmq.SUB)
        self._socket.setsockopt(zmq.RCVHWM, QUEUE)
        self._socket.setsockopt(zmq.SUBSCRIBE, b"")
        try:
            self._socket.connect(endpoint)
        except zmq.ZMQError as error:
            self._socket.close()
            raise PipelineError(f"{endpoint}: not an endpoint ({reason(error)})") from error

    def connected(self, timeout_s: float) -> bool:
        """True once every frame from now on will come: the publisher says so first of all.

        Raises PipelineError if something else is published there.
        """
        if not self._socket.poll(round(timeout_s * 1000)):
            return False
        if self._socket.recv_multipart() != [WELCOME]:
            raise PipelineError(
                f"{self._endpoint}: what is published there are no frames; give the run's "
                "publish.endpoint first, then its publish.frames"
            )
        return True

    def receive(self, timeout_s: float) -> tuple[Frame, Sensor] | None:
        """The next frame and its sensor, None if none came in time.

        Raises CodecError if it is malformed.
        """
        if not self._socket.poll(round(timeout_s * 1000)):
            return None
        described, *parts = [part.buffer for part in self._socket.recv_multipart(copy=False)]
        if not parts:
            return None  # a welcome: the front was started again
        message, _, _ = codec.decode(parts)
        if not isinstance(message, Frame):
            raise codec.CodecError(f"type: {type(message).__name__} is not a Frame")
        try:
            return message, Sensor.from_attributes(codec.unpack_wire(described))
        except (KeyError, TypeError, ValueError) as error:
            raise codec.CodecError(f"sensor: {error}") from error

    def close(self) -> None:
        """Leave."""
        self._socket.close(linger=0)
