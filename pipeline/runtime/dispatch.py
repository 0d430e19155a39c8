"""Who works on which frame: the ledger of every frame between the front node and the output.

A frame that came in waits for a row of the topology, or is held by one worker of it, or its outcome
is known; there is no fourth place. What a dead worker held goes to the head of the queue again, so
nothing is lost with it, and an answer counts only if it comes from the worker the ledger names, so
nothing is done twice. Knows no sockets, processes or clocks.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from pipeline.errors import RunError
from pipeline.messages import Dropped
from pipeline.runtime.topology import Node, Overflow

HELD_BY_WORKER = 2
"""Batches a worker holds: one it works on, and the next, so that it need not wait for it."""
MAX_DEATHS = 2
"""Workers that may die on a frame before it is given up."""


@dataclass(eq=False)
class Job:
    """A frame on its way: the parts of its latest message, and whose turn it is.

    beside: what a node beside the flow says of it, or why it says nothing; see `join`.
    """

    seq: int
    t_ingest_ns: int
    parts: list[Any]
    row: int
    worker: bytes | None = None
    deaths: int = 0
    superseded: bool = False  # to be finished by the workers that are retired
    beside: list[Any] | Dropped | None = None


@dataclass
class _Row:
    node: Node
    overflow: Overflow
    waiting: deque[Job] = field(default_factory=deque)
    workers: dict[bytes, dict[int, Job]] = field(default_factory=dict)  # what each of them holds

    @property
    def capacity(self) -> int:
        return self.node.queue * self.node.replicas

    @property
    def held(self) -> int:
        return sum(map(len, self.workers.values()))


def _suspects(held: list[Job], batch: int) -> list[Job]:
    """Of what a worker that is dead held, in its order, the frames it may have died on.

    One that another has died on already is done by itself; what came after had not been begun.
    """
    alone = next((n for n, job in enumerate(held[:batch]) if job.deaths > 0), batch)
    return held[: max(alone, 1)]


class Dispatcher:
    """The ledger. `outcomes` collects `Dropped` frames, and each `Job` that is through all rows.

    max_age_ns: a frame that is not done so long after it came in is given up; None in replay, where
    every edge blocks as well. Row 0 is the front, which takes frames in and works by itself.
    """

    def __init__(self, topology: Sequence[Node], max_age_ns: int | None) -> None:
        live = max_age_ns is not None
        self._rows = [_Row(node, node.overflow if live else "block") for node in topology]
        self.max_age_ns = max_age_ns
        self._jobs: dict[int, Job] = {}
        self._retired: set[bytes] = set()  # workers that are given nothing more
        self._granted = 0  # frames the front may still send
        self._first = 0  # frame that is for workers which are not retired
        self.next_in = 0
        self.ended = False
        self.outcomes: deque[Job | Dropped] = deque()

    # --- the front -------------------------------------------------------------------------

    def take(self, seq: int, t_ingest_ns: int, parts: list[Any]) -> None:
        """A frame comes from the front; the numbers it leaves out never arrived."""
        self._granted = max(0, self._granted - 1)
        if seq < self.next_in:
            return  # from a front that is dead: accounted for already
        self.lose(self.next_in, seq, "transport", "never arrived")
        self.next_in = seq + 1
        job = Job(seq, t_ingest_ns, parts, row=0, superseded=seq < self._first)
        self.forward(job, parts)

    def lose(self, first: int, end: int, stage: str, reason: str) -> None:
        """Frames `first` … `end` − 1 will not come from the front."""
        for seq in range(max(first, self.next_in), end):
            self.outcomes.append(Dropped(seq, stage, reason))
        self.next_in = max(self.next_in, end)

    def begin_at(self, seq: int) -> None:
        """Frames before this one are no affair of this ledger."""
        self.next_in = seq

    def end(self, frames_in: int) -> None:
        """The front has nothing more; there were so many frames in all."""
        self.lose(self.next_in, frames_in, "transport", "never arrived")
        self.ended = True

    def grant(self) -> int:
        """How many frames more the front may send than it has been told; it is told now.

        Not while it may send one and others are on their way: the message would cost these time.
        """
        if self._granted and self._jobs:
            return 0
        row = self._rows[:2][-1]  # the edge out of the front; its own where no other node is
        room = row.capacity - self._granted
        if row.overflow == "block":
            room -= len(row.waiting)
        room = max(0, room)
        self._granted += room
        return room

    def front_is_new(self) -> None:
        """Another front has started, which has been granted nothing yet."""
        self._granted = 0

    # --- workers ---------------------------------------------------------------------------

    def ready(self, worker: bytes, row: int) -> None:
        """A worker can be given frames."""
        self._rows[row].workers.setdefault(worker, {})

    def supersede(self, least: int = 0) -> int:
        """All workers are to finish the frames begun, and nothing more; the first of the others.

        Those are for workers that come to be ready from now on. least: the first of the others is
        not before this one.
        """
        self._retired = {worker for row in self._rows for worker in row.workers}
        self._first = max(self.unbegun(), least)
        for job in self._jobs.values():
            job.superseded = job.seq < self._first
        return self._first

    def unbegun(self) -> int:
        """The first frame from which on none is begun."""
        begun = [job.seq for job in self._jobs.values() if job.row > 1 or job.worker is not None]
        return max(begun) + 1 if begun else min(self._jobs, default=self.next_in)

    @property
    def superseding(self) -> bool:
        """True while frames are under way that are for retired workers."""
        return any(job.superseded for job in self._jobs.values())

    def gone(self, worker: bytes) -> None:
        """A worker is dead: what it held is the next to be done, by whoever is ready."""
        self._retired.discard(worker)
        for row in self._rows:
            held = list(row.workers.pop(worker, {}).values())
            for job in _suspects(held, row.node.batch):
                job.deaths += 1
            for job in reversed(held):
                if self._jobs.get(job.seq) is not job:
                    continue  # given up meanwhile
                job.worker = None
                row.waiting.appendleft(job)
                if job.deaths >= MAX_DEATHS:
                    self.give_up(job, f"its worker died {job.deaths} times")

    def assign(self) -> Iterator[tuple[bytes, Job]]:
        """Give waiting frames to workers with room for them, the idlest first."""
        for number, row in enumerate(self._rows):
            while self._room_after(number) and (job := self._due(number)):
                workers = self._able(row, job)
                worker = min(workers, key=lambda name: len(row.workers[name]), default=b"")
                if not workers or len(row.workers[worker]) >= HELD_BY_WORKER * row.node.batch:
                    break
                row.waiting.remove(job)
                job.worker = worker
                row.workers[worker][job.seq] = job
                yield worker, job

    def _able(self, row: _Row, job: Job) -> list[bytes]:
        """Workers a frame may be given to; where those it is for are gone, all that are not."""
        current = [worker for worker in row.workers if worker not in self._retired]
        if not job.superseded:
            return current
        return [worker for worker in row.workers if worker in self._retired] or current

    def _due(self, number: int) -> Job | None:
        """The frame a row is to work on next."""
        waiting = self._rows[number].waiting
        return waiting[0] if waiting else None

    def has_workers(self, number: int) -> bool:
        """True if somebody can be given frames of a row."""
        return bool(self._rows[number].workers)

    def holds(self, job: Job) -> bool:
        """True if this job is on its way here."""
        return self._jobs.get(job.seq) is job

    def knows(self, seq: int) -> bool:
        """True if a frame of this number is on its way."""
        return seq in self._jobs

    def node_of(self, job: Job) -> str:
        """Name of the node whose turn a job is."""
        return self._rows[job.row].node.name

    def _room_after(self, number: int) -> bool:
        """True if what the row gives will find room in the next one."""
        if number + 1 == len(self._rows):
            return True
        after = self._rows[number + 1]
        promised = len(after.waiting) + self._rows[number].held
        return after.overflow != "block" or promised < after.capacity

    def answer(self, worker: bytes, seq: int) -> Job | None:
        """The job a worker is done with; None if it was given up, or is not this worker's."""
        for row in self._rows:
            job = row.workers.get(worker, {}).pop(seq, None)
            if job is not None:
                return job if self._jobs.get(seq) is job else None
        return None

    def forward(self, job: Job, parts: list[Any]) -> None:
        """A result goes to the next row, or out."""
        job.parts, job.worker, job.deaths = parts, None, 0
        job.row += 1
        if job.row < len(self._rows):
            self._enqueue(job)
        else:
            self._jobs.pop(job.seq, None)
            self.outcomes.append(job)

    def give_up(self, job: Job, reason: str, stage: str | None = None) -> None:
        """A frame will not be done; a worker that has it still owes an answer."""
        row = self._rows[job.row]
        if job.worker is None:
            row.waiting.remove(job)
        del self._jobs[job.seq]
        self.outcomes.append(Dropped(job.seq, stage or row.node.name, reason))

    def _enqueue(self, job: Job) -> None:
        row = self._rows[job.row]
        self._jobs[job.seq] = job
        row.waiting.append(job)
        if len(row.waiting) <= row.capacity or row.overflow == "block":
            return
        if row.overflow == "fail":
            raise RunError(
                f"more than {row.capacity} frames wait for node {row.node.name} and its overflow "
                f"policy is fail; let topology.{row.node.name}.overflow be drop-oldest, or add "
                "replicas"
            )
        self.give_up(row.waiting[0], "overload: oldest frame shed")

    # --- time ------------------------------------------------------------------------------

    def expire(self, now_ns: int) -> None:
        """Give up what is too old to be of use, wherever it is."""
        if self.max_age_ns is None:
            return
        oldest_ns = now_ns - self.max_age_ns
        while self._jobs and (job := next(iter(self._jobs.values()))).t_ingest_ns < oldest_ns:
            self.give_up(job, f"older than {self.max_age_ns / 1e6:g} ms")

    def give_up_all(self, reason: str) -> None:
        """Nothing more can be done."""
        for job in list(self._jobs.values()):
            self.give_up(job, reason)

    # --- telemetry -------------------------------------------------------------------------

    def working_on(self) -> dict[bytes, int]:
        """Workers that hold frames, given up or not, and the one each has had longest."""
        rows = (row.workers.items() for row in self._rows)
        return {worker: next(iter(held)) for row in rows for worker, held in row if held}

    def depths(self) -> dict[str, tuple[int, int]]:
        """Frames that wait for each node, and frames its workers hold."""
        return {row.node.name: (len(row.waiting), row.held) for row in self._rows[1:]}

    def __len__(self) -> int:
        """Frames on their way."""
        return len(self._jobs)
