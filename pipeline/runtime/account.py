"""What became of every frame: in = published + dropped, exactly."""

from collections import Counter, deque
from typing import Any

from pipeline.messages import Dropped, Trace

MAX_REASONS = 64
MAX_GAP = 4096


class Account:
    """Counts frames by outcome and tells which numbers never came.

    However long the run: beyond MAX_REASONS reasons are counted together, and a gap names the
    last MAX_GAP numbers.
    """

    def __init__(self) -> None:
        self.published = 0
        self.dropped: Counter[tuple[str, str]] = Counter()
        self._gap: deque[int] = deque(maxlen=MAX_GAP)

    @property
    def gap(self) -> list[int]:
        """The numbers lost since the last published frame."""
        return list(self._gap)

    def publish(self) -> None:
        """Count a published frame."""
        self.published += 1
        self._gap.clear()

    def drop(self, lost: Dropped) -> None:
        """Count a lost frame."""
        key = (lost.stage, lost.reason)
        if key not in self.dropped and len(self.dropped) >= MAX_REASONS:
            key = (lost.stage, "other reasons")
        self.dropped[key] += 1
        self._gap.append(lost.seq)

    @property
    def total(self) -> int:
        """Frames accounted for."""
        return self.published + sum(self.dropped.values())

    def end_message(self, sensor_id: str, frames_in: int) -> dict[str, Any]:
        """The totals as `irst.eos/1`."""
        return {
            "schema": "irst.eos/1",
            "sensor_id": sensor_id,
            "frames_in": frames_in,
            "published": self.published,
            "dropped": [
                {"stage": stage, "reason": reason, "frames": frames}
                for (stage, reason), frames in sorted(self.dropped.items())
            ],
        }


class Reorder:
    """Gives reports and `Dropped` back in the order of their frame numbers, counting from 0."""

    def __init__(self) -> None:
        self._waiting: dict[int, tuple[Any, Trace]] = {}
        self._next = 0

    def push(self, message: Any, trace: Trace) -> list[tuple[Any, Trace]]:
        """Take one in; returns those whose turn has come."""
        seq = message.seq if isinstance(message, Dropped) else message.info.seq
        self._waiting[seq] = message, trace
        ready = []
        while self._next in self._waiting:
            ready.append(self._waiting.pop(self._next))
            self._next += 1
        return ready
