"""What subscribers get, in order: start, targets and gaps, heartbeats, and the end with totals."""

import time
from collections.abc import Callable
from typing import Any

from pipeline.errors import RunError
from pipeline.messages import Dropped, Trace, targets_message
from pipeline.runtime.account import Account


class Output:
    """Turns reports into messages and hands them to `send`; counts every frame's outcome."""

    def __init__(
        self,
        send: Callable[[dict[str, Any]], None],
        sensor_id: str,
        config: str,
        heartbeat_s: float,
    ) -> None:
        self._send, self._sensor_id, self._config = send, sensor_id, config
        self._heartbeat_ns = round(heartbeat_s * 1e9)
        self._next_heartbeat_ns = time.monotonic_ns() + self._heartbeat_ns
        self._account = Account()

    def start(self) -> None:
        """Say that a run begins."""
        self._send_event("irst.start/1", config=self._config)

    def put(self, message: Any, trace: Trace) -> None:
        """Publish a report, or a lost frame as a gap."""
        if isinstance(message, Dropped):
            self._account.drop(message)
            self._send_event(
                "irst.gap/1", frame_seq=message.seq, stage=message.stage, reason=message.reason
            )
            return
        self._send(
            targets_message(
                message,
                stage_ns=trace.stage_ns,
                age_ns=time.monotonic_ns() - trace.t_ingest_ns,
                gap=self._account.publish(),
                config=self._config,
            )
        )

    def beat(self) -> None:
        """Send a heartbeat if it is time for one."""
        now_ns = time.monotonic_ns()
        if now_ns >= self._next_heartbeat_ns:
            self._next_heartbeat_ns = now_ns + self._heartbeat_ns
            published = self._account.published
            self._send_event("irst.heartbeat/1", published=published, t_monotonic_ns=now_ns)

    def end(self, frames_in: int) -> None:
        """Send the totals; raises RunError if they do not add up."""
        self._send(self._account.end_message(self._sensor_id, frames_in))
        if self._account.total != frames_in:
            raise RunError(f"{frames_in} frames in but {self._account.total} accounted for")

    def _send_event(self, schema: str, **fields: Any) -> None:
        self._send({"schema": schema, "sensor_id": self._sensor_id, **fields})
