"""What subscribers get, in order: start, targets and gaps, heartbeats, and the end with totals."""

import time
from collections.abc import Callable
from typing import Any

from pipeline.errors import RunError
from pipeline.messages import Dropped, Trace
from pipeline.runtime.account import Account
from pipeline.wire import check_wire, targets_message


class Output:
    """Turns reports into checked messages for `send`; counts every frame's outcome."""

    def __init__(
        self,
        send: Callable[[dict[str, Any]], None],
        sensor_id: str,
        config: str,
        heartbeat_s: float,
    ) -> None:
        self._send, self._sensor_id, self.config = send, sensor_id, config
        self._heartbeat_ns = round(heartbeat_s * 1e9)
        self._next_heartbeat_ns = time.monotonic_ns() + self._heartbeat_ns
        self._account = Account()
        self._later: tuple[int, str] | None = None

    def configure(self, first: int, config: str) -> None:
        """Frames from `first` on are made with another configuration."""
        self._later = first, config

    def start(self) -> None:
        """Say that a run begins."""
        self._send_event("irst.start/1", config=self.config)

    @property
    def frames(self) -> int:
        """Frames published and lost so far."""
        return self._account.total

    def put(self, message: Any, trace: Trace) -> None:
        """Publish a report, or a lost frame as a gap; what fits no schema is a lost frame."""
        if isinstance(message, Dropped):
            self._drop(message)
            return
        if self._later is not None and message.info.seq >= self._later[0]:
            self.config, self._later = self._later[1], None
        targets = targets_message(
            message,
            stage_ns=trace.stage_ns,
            age_ns=0,
            gap=self._account.gap,
            config=self.config,
        )
        try:
            check_wire(targets)
        except ValueError as error:
            reason = "not fit to publish: " + " ".join(str(error).split())
            self._drop(Dropped(message.info.seq, "publish", reason[:200]))
            return
        self._account.publish()
        targets["age_ns"] = time.monotonic_ns() - trace.t_ingest_ns  # as late as can be
        self._send(targets)

    def _drop(self, lost: Dropped) -> None:
        self._account.drop(lost)
        self._send_event("irst.gap/1", frame_seq=lost.seq, stage=lost.stage, reason=lost.reason)

    def beat(self) -> None:
        """Send a heartbeat if it is time for one."""
        now_ns = time.monotonic_ns()
        if now_ns >= self._next_heartbeat_ns:
            self._next_heartbeat_ns = now_ns + self._heartbeat_ns
            published = self._account.published
            self._send_event("irst.heartbeat/1", published=published, t_monotonic_ns=now_ns)

    def end(self, frames_in: int) -> None:
        """Send the totals; raises RunError if they do not add up."""
        end = self._account.end_message(self._sensor_id, frames_in)
        check_wire(end)
        self._send(end)
        if self._account.total != frames_in:
            raise RunError(f"{frames_in} frames in but {self._account.total} accounted for")

    def _send_event(self, schema: str, **fields: Any) -> None:
        message = {"schema": schema, "sensor_id": self._sensor_id, **fields}
        check_wire(message)
        self._send(message)
