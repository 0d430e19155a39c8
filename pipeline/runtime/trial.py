"""A trial of new workers on live frames: they do some again, beside the old ones and unseen.

A ledger of their own hands the frames on. There is one frame under trial at a time and a rest after
it, so that the flow is not slowed; whatever goes wrong with it costs no frame of the run.
"""

import time
from collections.abc import Iterator, Sequence
from typing import Any

from pipeline.messages import Dropped, TargetReport, Trace
from pipeline.runtime.dispatch import Dispatcher, Job
from pipeline.runtime.join import Join
from pipeline.runtime.parity import Parity, Refused
from pipeline.runtime.settings import SwapSettings
from pipeline.runtime.topology import Node
from pipeline.transport import codec
from pipeline.transport.hub import Word

REST = 3.0
"""Times as long as the last frame took, before the next."""

PATIENCE_S = 5.0
"""With a frame of which nothing is heard, beyond what a node beside the flow is waited for."""

Report = tuple[TargetReport, Trace]


class Trial:
    """Ends with `passed` True, or by raising Refused.

    ledger: of these rows and of nobody else. patience_s: before another frame is taken.
    same_targets: they are to find what the old ones find, not only as fast.
    """

    def __init__(
        self,
        settings: SwapSettings,
        topology: Sequence[Node],
        ledger: Dispatcher,
        *,
        patience_s: float,
        same_targets: bool,
    ) -> None:
        self._settings, self._same_targets = settings, same_targets
        self._ledger, self._patience_s = ledger, patience_s
        self._parity = Parity(settings, topology[1:])
        self._shown: tuple[int, int, list[Any]] | None = None  # the last, to the node beside
        self._seq: int | None = None  # of the frame under trial
        self._made: dict[str, Report] = {}  # of it, by "old" and "new"
        self._offered_s = self._next_s = 0.0
        self._over_s = time.monotonic() + settings.within_s

    def ready(self, worker: bytes, row: int) -> None:
        """A new worker takes part."""
        self._ledger.ready(worker, row)

    def show(self, seq: int, t_ingest_ns: int, parts: list[Any]) -> None:
        """The front shows a frame, of which `offer` brings the patches."""
        self._shown = seq, t_ingest_ns, parts

    def offer(self, seq: int, t_ingest_ns: int, parts: list[Any]) -> None:
        """A frame has come from the front; it is taken if it is time for one."""
        now_s = time.monotonic()
        if self._seq is not None or now_s < self._next_s:
            return
        self._ledger.begin_at(seq)
        if isinstance(self._ledger, Join):
            if self._shown is None or self._shown[0] != seq:
                return  # it was shown before the trial began
            self._ledger.show(*self._shown)
        self._seq, self._offered_s = seq, now_s
        self._ledger.take(seq, t_ingest_ns, parts)

    def assign(self) -> Iterator[tuple[bytes, Job]]:
        """What is to be sent to whom."""
        return self._ledger.assign()

    def hear(self, worker: bytes, word: Word, parts: list[Any]) -> None:
        """A new worker's answer."""
        job = self._ledger.answer(worker, word.seq)
        if job is None:
            return
        if word.kind == "result":
            self._ledger.forward(job, parts)
        else:
            self._ledger.give_up(job, word.text, word.stage or None)

    def saw(self, outcome: Job | Dropped) -> None:
        """What became of a frame in the run; one that was lost there is not compared."""
        if outcome.seq != self._seq:
            return
        if isinstance(outcome, Dropped):
            self._rest()
        else:
            self._take_in("old", outcome)

    def compare(self) -> None:
        """Take in what the new workers are done with; raises Refused if they lose a frame."""
        self._ledger.expire(time.monotonic_ns())
        while self._ledger.outcomes:
            outcome = self._ledger.outcomes.popleft()
            if outcome.seq != self._seq:
                continue
            if isinstance(outcome, Dropped):
                raise Refused("lost", f"frame {outcome.seq} at {outcome.stage}: {outcome.reason}")
            self._take_in("new", outcome)
        if len(self._made) == 2:
            self._parity.add(self._made["old"], self._made["new"])
            self._rest()
        elif self._seq is not None and time.monotonic() > self._offered_s + self._patience_s:
            self._rest()

    @property
    def passed(self) -> bool:
        """True once enough frames were compared; raises Refused if they do not do as well."""
        if self._parity.frames >= self._settings.frames:
            self._parity.check(same_targets=self._same_targets)
            return True
        if time.monotonic() > self._over_s:
            raise Refused(
                "frames",
                f"{self._parity.frames} frames with targets were compared in "
                f"{self._settings.within_s:g} s, {self._settings.frames} are asked for "
                "(swap.frames; 0 takes over without a trial)",
            )
        return False

    def _take_in(self, whose: str, job: Job) -> None:
        try:
            message, trace, _ = codec.decode(job.parts)
            if not isinstance(message, TargetReport):
                raise codec.CodecError("not a report")
        except codec.CodecError as error:
            raise Refused("lost", f"frame {job.seq}: malformed message: {error}") from error
        self._made[whose] = message, trace

    def _rest(self) -> None:
        now_s = time.monotonic()
        self._next_s = now_s + REST * (now_s - self._offered_s)
        self._seq = None
        self._made.clear()
