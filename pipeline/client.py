"""Subscribe to a running pipeline from Python.

from pipeline.client import subscribe
for message in subscribe("tcp://127.0.0.1:5556"):
print(message["frame_seq"], message["targets"]["x_px"])
"""

import time
from collections.abc import Iterator
from typing import Any

from pipeline.messages import check_wire
from pipeline.transport.codec import CodecError, unpack_wire
from pipeline.transport.sockets import SubscriberSocket

WAIT_S = 0.1


class Subscriber:
    """An open subscription; `rejected` counts messages that did not fit their schema."""

    def __init__(self, endpoint: str) -> None:
        self._socket = SubscriberSocket(endpoint)
        self.rejected = 0

    def receive(self, timeout_s: float) -> dict[str, Any] | None:
        """The next valid message of any schema, None if none came within `timeout_s`."""
        deadline = time.monotonic() + timeout_s
        while (part := self._socket.receive(max(0.0, deadline - time.monotonic()))) is not None:
            try:
                message = unpack_wire(part)
                check_wire(message)
            except (CodecError, ValueError):
                self.rejected += 1
                continue
            return message
        return None

    def close(self) -> None:
        """End the subscription."""
        self._socket.close()


def subscribe(
    endpoint: str, *, schemas: tuple[str, ...] = ("irst.targets/1",), timeout_s: float | None = None
) -> Iterator[dict[str, Any]]:
    """Messages of the given schemas as plain maps, until the stream ends.

    endpoint: e.g. tcp://127.0.0.1:5556. timeout_s: give up after that long without any message
    (a heartbeat comes every second), None = wait for ever.
    """
    subscriber = Subscriber(endpoint)
    silent_since = time.monotonic()
    try:
        while timeout_s is None or time.monotonic() - silent_since < timeout_s:
            message = subscriber.receive(WAIT_S)
            if message is None:
                continue
            silent_since = time.monotonic()
            if message["schema"] in schemas:
                yield message
            if message["schema"] == "irst.eos/1":
                return
    finally:
        subscriber.close()
