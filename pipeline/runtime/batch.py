"""Frames that a node does at once: gathered while the deadline of each allows it."""

import math
from collections.abc import Sequence

from pipeline.runtime.flow import Work
from pipeline.runtime.topology import Node


class Batch:
    """Collects up to `most` frames' work, the first of which waits at most wait_ns for the others.

    within_ns: so long after a frame came in what is collected must be begun; None: whenever.
    """

    def __init__(self, most: int, wait_ns: int, within_ns: int | None) -> None:
        self._most, self._wait_ns, self._within_ns = most, wait_ns, within_ns
        self._work: list[Work] = []
        self._until_ns = 0

    @classmethod
    def live(cls, topology: Sequence[Node], row: int, max_age_ns: int) -> "Batch":
        """Of a node: what it and those after it may take is left of a frame's deadline."""
        node = topology[row]
        rest = [after for after in topology[row + 1 :] if not after.beside]
        needed_ms = sum(each.budget_ms for each in [node, *rest])
        return cls(node.batch, round(node.batch_ms * 1e6), max_age_ns - round(needed_ms * 1e6))

    @classmethod
    def single(cls) -> "Batch":
        """Every frame by itself."""
        return cls(1, 0, None)

    def __len__(self) -> int:
        """Frames collected."""
        return len(self._work)

    def add(self, work: Work, now_ns: int) -> None:
        """Collect one more frame's work."""
        if not self._work:
            self._until_ns = now_ns + self._wait_ns
        if self._within_ns is not None:
            self._until_ns = min(self._until_ns, work.trace.t_ingest_ns + self._within_ns)
        self._work.append(work)

    def is_due(self, now_ns: int) -> bool:
        """True if what is collected is to be done now."""
        return len(self._work) >= self._most or (bool(self._work) and now_ns >= self._until_ns)

    def wait_ms(self, now_ns: int, most_ms: int) -> int:
        """How long more work may be waited for."""
        if not self._work:
            return most_ms
        return min(most_ms, math.ceil(max(self._until_ns - now_ns, 0) / 1e6))

    def take(self) -> list[Work]:
        """All that is collected; then there is none."""
        work, self._work = self._work, []
        return work
