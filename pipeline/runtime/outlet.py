"""The end of the flow: what became of frames, put in order, checked, counted and published."""

from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

from pipeline.config import PipelineConfig
from pipeline.messages import Dropped, TargetReport, Trace
from pipeline.runtime.account import Reorder
from pipeline.runtime.dead_letters import DeadLetters
from pipeline.runtime.dispatch import Job
from pipeline.runtime.output import Output
from pipeline.runtime.telemetry import Telemetry
from pipeline.transport import codec
from pipeline.transport.publish import Publisher

Messages = Iterator[dict[str, Any]]


class Outlet:
    """Takes outcomes of the ledger; publishes them, and keeps what was published to be `taken`.

    held_back is called while a subscriber of a replay takes nothing: silence of the nodes is no
    fault of theirs then.
    """

    def __init__(
        self,
        config: PipelineConfig,
        sensor_id: str,
        publisher: Publisher,
        dead_letters: DeadLetters,
        telemetry: Telemetry,
        held_back: Callable[[], None],
    ) -> None:
        self.output = Output(self._publish, sensor_id, config.digest, config.publish.heartbeat_s)
        self._publisher, self._telemetry, self._held_back = publisher, telemetry, held_back
        self._dead_letters = dead_letters
        self._reorder = Reorder()
        self._published: deque[dict[str, Any]] = deque()

    def put_all(self, outcomes: deque[Job | Dropped]) -> None:
        """Take in all outcomes there are."""
        while outcomes:
            for ready in self._reorder.push(*self._report(outcomes.popleft())):
                self.output.put(*ready)

    def _report(self, outcome: Job | Dropped) -> tuple[Any, Trace]:
        if isinstance(outcome, Dropped):
            return outcome, Trace(0, {})
        try:
            message, trace, _ = codec.decode(outcome.parts)
            if not isinstance(message, TargetReport) or message.info.seq != outcome.seq:
                raise codec.CodecError("not the report it is said to be")
        except codec.CodecError as error:
            self._dead_letters.keep(outcome.parts, f"frame {outcome.seq} at the output: {error}")
            reason = f"malformed message: {error}"[:200]
            return Dropped(outcome.seq, "transport", reason), Trace(outcome.t_ingest_ns, {})
        return message, trace

    def _publish(self, message: dict[str, Any]) -> None:
        self._publisher.publish(message, self._held_back)
        self._telemetry.count(message)
        self._published.append(message)

    def taken(self) -> Messages:
        """What was published since this was last asked."""
        while self._published:
            yield self._published.popleft()
