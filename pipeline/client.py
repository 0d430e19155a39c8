"""Subscribe to a running pipeline from Python.

from pipeline.client import subscribe
for message in subscribe("tcp://127.0.0.1:5556"):
print(message["frame_seq"], message["targets"]["x_px"])
"""

import logging
import time
from collections import deque
from collections.abc import Generator
from pathlib import Path
from typing import Any

from pipeline.transport.codec import CodecError, unpack_wire
from pipeline.transport.publish import SubscriberSocket
from pipeline.transport.security import ClientKeys
from pipeline.wire import check_wire

WAIT_S = 0.1
SILENT_S = 5.0
"""A run says something every second (`publish.heartbeat_s`)."""
log = logging.getLogger(__name__)
MAX_NAMED = 4096


class Silence:
    """Says once that nothing comes, and what may be the cause, and once that it is over."""

    def __init__(self, endpoint: str, cause: str) -> None:
        self._endpoint, self._cause = endpoint, cause
        self._since, self._said = time.monotonic(), False

    def heard(self, something: bool) -> None:
        """Take in whether something has come just now."""
        now = time.monotonic()
        silent_s = now - self._since
        if something:
            if self._said:
                log.warning("%s is back after %.0f s", self._endpoint, silent_s)
            self._since, self._said = now, False
        elif silent_s >= SILENT_S and not self._said:
            self._said = True
            log.warning(
                "nothing from %s for %.0f s: is the run up, %s?",
                self._endpoint, silent_s, self._cause,
            )  # fmt: skip


class Subscriber:
    """An open subscription.

    What this subscriber was too slow to take comes as `irst.gap/1`, too, with stage `subscriber`:
    the last MAX_NAMED of it, `missed` counts all. `rejected` counts messages that did not fit their
    schema. keys: folder of `pipeline keys`.
    Silence of 5 s is a warning in the log, its end another.
    """

    def __init__(self, endpoint: str, keys: Path | None = None) -> None:
        own = ClientKeys.load(keys) if keys is not None else None
        self._socket = SubscriberSocket(endpoint, keys=own)
        self._waiting: deque[dict[str, Any]] = deque()
        self._next_seq: int | None = None
        self._had: int | None = None  # targets and gaps since the start, None: it was not seen
        self.rejected = self.missed = 0
        cause = f"is the key of {keys} on its list" if keys else "does it want keys"
        self._silence = Silence(endpoint, cause)

    def receive(self, timeout_s: float) -> dict[str, Any] | None:
        """The next valid message of any schema, None if none came within `timeout_s`."""
        deadline = time.monotonic() + timeout_s
        while not self._waiting:
            left_s = max(0.0, deadline - time.monotonic())
            part = self._socket.receive(min(left_s, WAIT_S))
            self._silence.heard(part is not None)
            if part is None:
                if left_s <= WAIT_S:
                    return None
                continue
            try:
                message = unpack_wire(part)
                check_wire(message)
            except (CodecError, ValueError) as error:
                self.rejected += 1
                if self.rejected == 1:
                    log.warning("a message was refused, and so will be others like it: %s", error)
                continue
            self._follow(message)
        return self._waiting.popleft()

    def _follow(self, message: dict[str, Any]) -> None:
        """Name what is missing before this message, and acknowledge the end of the stream."""
        schema = message["schema"]
        if schema == "irst.start/1":
            self._next_seq, self._had = 0, 0
            self._socket.begin()
        elif schema != "irst.heartbeat/1" and self._had is None and self._next_seq is None:
            self._socket.decline()
        if schema in ("irst.targets/1", "irst.gap/1"):
            self._name_missing(message["sensor_id"], message["frame_seq"])
            self._next_seq = message["frame_seq"] + 1
            if self._had is not None:
                self._had += 1
        elif schema == "irst.eos/1":
            self._name_missing(message["sensor_id"], message["frames_in"])
            if self._had is not None:
                self._socket.acknowledge(self._had)
            self._next_seq = self._had = None  # what comes now is another run's
        self._waiting.append(message)

    def _name_missing(self, sensor_id: str, until: int) -> None:
        """Frames between the last one heard of and `until`, which were not heard of."""
        first = until if self._next_seq is None else self._next_seq
        self.missed += max(until - first, 0)
        for missing in range(max(first, until - MAX_NAMED), until):
            self._waiting.append(
                {
                    "schema": "irst.gap/1",
                    "sensor_id": sensor_id,
                    "frame_seq": missing,
                    "stage": "subscriber",
                    "reason": "this subscriber fell behind",
                }
            )

    def close(self) -> None:
        """End the subscription."""
        self._socket.close()


def subscribe(
    endpoint: str,
    *,
    schemas: tuple[str, ...] = ("irst.targets/1",),
    timeout_s: float | None = None,
    keys: Path | None = None,
) -> Generator[dict[str, Any], None, None]:
    """Messages of the given schemas as plain maps, until the stream ends.

    endpoint: e.g. tcp://127.0.0.1:5556. timeout_s: give up after that long without any message
    (a heartbeat comes every second), None = wait for ever. keys: this client's folder, made by
    `pipeline keys`, for a pipeline that lets in only whom it knows.
    """
    subscriber = Subscriber(endpoint, keys)
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
