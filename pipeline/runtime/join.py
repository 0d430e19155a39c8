"""The ledger of a flow with a node beside it, whose answers join the flow before one row.

A frame goes to the node beside as soon as the front shows it, and its patches through the rows as
ever. Before the row that joins a job waits until the answer is there or will not come: what the
node cannot say in time is left out, never the frame.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from pipeline.messages import Dropped
from pipeline.runtime.dispatch import Dispatcher, Job
from pipeline.runtime.topology import Node, joining_row


def make_ledger(
    topology: Sequence[Node], max_age_ns: int | None, wait_ns: int | None
) -> Dispatcher:
    """The ledger of these rows, whether or not the last of them stands beside the flow."""
    if topology[-1].beside:
        return Join(topology, max_age_ns, wait_ns)
    return Dispatcher(topology, max_age_ns)


class Join(Dispatcher):
    """A `Dispatcher` of all rows but the last, which is the node beside, and of that one's work.

    wait_ns: so long after a frame came in its answer is waited for; None in replay, where it is
    waited for however long it takes.
    """

    def __init__(
        self, topology: Sequence[Node], max_age_ns: int | None, wait_ns: int | None
    ) -> None:
        *rows, beside = topology
        super().__init__(rows, max_age_ns)
        self._beside = Dispatcher((rows[0], beside), wait_ns)
        self._name, self._live = beside.name, wait_ns is not None
        self._joining = joining_row(rows)
        self._answers: dict[int, list[Any] | Dropped] = {}

    def show(self, seq: int, t_ingest_ns: int, parts: list[Any]) -> None:
        """The front shows a frame; what it makes of it comes later, by `take`."""
        self._beside.take(seq, t_ingest_ns, parts)

    def begin_at(self, seq: int) -> None:
        """Frames before this one are no affair of this ledger."""
        super().begin_at(seq)
        self._beside.begin_at(seq)

    # --- workers of both -------------------------------------------------------------------

    def ready(self, worker: bytes, row: int) -> None:
        """A worker can be given frames; the last row is the node beside."""
        if row == len(self._rows):
            self._beside.ready(worker, 1)
        else:
            super().ready(worker, row)

    def supersede(self, least: int = 0) -> int:
        """All workers, of both, are to finish what is begun; the first frame of the others."""
        first = max(self.unbegun(), self._beside.unbegun(), least)
        self._beside.supersede(first)
        return super().supersede(first)

    @property
    def superseding(self) -> bool:
        """True while frames are under way that are for retired workers."""
        return super().superseding or self._beside.superseding

    def gone(self, worker: bytes) -> None:
        """A worker is dead."""
        super().gone(worker)
        self._beside.gone(worker)

    def assign(self) -> Iterator[tuple[bytes, Job]]:
        """Give waiting frames to workers; a job that joins has its answer with it."""
        if self._live and not self._beside.has_workers(1):
            self._beside.give_up_all(f"node {self._name} is not ready")
        yield from self._beside.assign()
        self._collect()
        yield from super().assign()

    def answer(self, worker: bytes, seq: int) -> Job | None:
        """The job a worker is done with, of either."""
        return super().answer(worker, seq) or self._beside.answer(worker, seq)

    def forward(self, job: Job, parts: list[Any]) -> None:
        """A worker's result goes on."""
        if self._beside.holds(job):
            self._beside.forward(job, parts)
        else:
            super().forward(job, parts)

    def give_up(self, job: Job, reason: str, stage: str | None = None) -> None:
        """A frame, or the answer to it, will not be done."""
        if self._beside.holds(job):
            self._beside.give_up(job, reason, stage)
        else:
            super().give_up(job, reason, stage)

    def node_of(self, job: Job) -> str:
        """Name of the node whose turn a job is."""
        return self._beside.node_of(job) if self._beside.holds(job) else super().node_of(job)

    # --- answers ---------------------------------------------------------------------------

    def _collect(self) -> None:
        """Take in what the node beside has answered; forget answers nobody waits for."""
        outcomes = self._beside.outcomes
        while outcomes:
            outcome = outcomes.popleft()
            self._answers[outcome.seq] = outcome if isinstance(outcome, Dropped) else outcome.parts
        for seq in [seq for seq in self._answers if seq < self.next_in and seq not in self._jobs]:
            del self._answers[seq]

    def _due(self, number: int) -> Job | None:
        if number != self._joining:
            return super()._due(number)
        return next((job for job in self._rows[number].waiting if self._is_answered(job)), None)

    def _is_answered(self, job: Job) -> bool:
        """True once it is known what the node beside says, which the job then has with it."""
        if job.beside is None:
            if self._beside.knows(job.seq):
                return False
            job.beside = self._answers.pop(job.seq, Dropped(job.seq, self._name, "was not asked"))
        return True

    def expire(self, now_ns: int) -> None:
        """Give up what is too old, of both."""
        self._beside.expire(now_ns)
        super().expire(now_ns)

    def working_on(self) -> dict[bytes, int]:
        """Workers that hold frames, of both."""
        return super().working_on() | self._beside.working_on()

    def depths(self) -> dict[str, tuple[int, int]]:
        """Frames that wait for each node, and frames its workers hold."""
        return super().depths() | self._beside.depths()
