"""Who was refused at a socket with CURVE keys: counted, and said now and then."""

import logging
import time

import zmq
from zmq.utils.monitor import recv_monitor_message

EVERY_S = 60.0
WRONG_SERVER_KEY = 0x11000001
"""ZMQ_PROTOCOL_ERROR_ZMTP_CRYPTOGRAPHIC"""
log = logging.getLogger(__name__)


class Refusals:
    """Listens to what libzmq says of failed handshakes; a client that is refused tries again."""

    def __init__(self, socket: "zmq.Socket[bytes]") -> None:
        self._monitor = socket.get_monitor_socket(
            zmq.EVENT_HANDSHAKE_FAILED_AUTH
            | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
            | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL  # the other side noticed first, and has gone
        )
        self.count = self._said = 0
        self._say_at = 0.0

    def listen(self) -> None:
        """Take in what has been refused; one line in the log at first, then one a minute."""
        why = ""
        while self._monitor.poll(0):
            event = recv_monitor_message(self._monitor)
            self.count += 1
            why = _reason(event["event"], event["value"])
        if why and (now := time.monotonic()) >= self._say_at:
            log.warning("connections refused: %d, the last as %s", self.count - self._said, why)
            self._say_at, self._said = now + EVERY_S, self.count

    def close(self) -> None:
        """Listen no more; to be called once the socket is closed."""
        self._monitor.close(linger=0)


def _reason(event: int, value: int) -> str:
    if event == zmq.EVENT_HANDSHAKE_FAILED_AUTH:
        return "its key is not on the list"
    if event == zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL and value == WRONG_SERVER_KEY:
        return "it has the key of another pipeline"
    return "it has no key"
