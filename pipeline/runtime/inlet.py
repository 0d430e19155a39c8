"""The edge from the source into the front: a reading thread, a bounded queue, losses by name."""

import contextlib
import os
import threading
import time
from collections import deque
from dataclasses import dataclass, replace
from typing import Any

from pipeline.component import Source
from pipeline.errors import RunError
from pipeline.messages import Dropped, Frame
from pipeline.runtime.topology import Overflow


@dataclass(frozen=True)
class Shed:
    """Frames `first` … `end` − 1 were lost before any stage saw them."""

    first: int
    end: int
    reason: str


@dataclass(frozen=True)
class Taken:
    """A frame and when it came in, monotonic."""

    frame: Frame
    t_ingest_ns: int


class Overrun(RunError):
    """The source is faster than the run, which was told to fail then."""


class Inlet:
    """Frames as the source has them, numbered on from `taken`, which counts them for all to see.

    When `queue` frames wait: `block` lets the source wait, `drop-oldest` sheds the oldest, `fail`
    ends it with Overrun. Live, what waited longer than max_age_ns is shed as well.
    `wake` is an eventfd that is written when there is something new.
    """

    def __init__(
        self,
        source: Source,
        queue: int,
        *,
        overflow: Overflow,
        max_age_ns: int | None,
        taken: Any,
        wake: int,
    ) -> None:
        self._source, self._queue, self._overflow = source, queue, overflow
        self._max_age_ns, self._taken, self._wake = max_age_ns, taken, wake
        self._first = int(taken.value)
        self._waiting: deque[Taken | Shed] = deque()  # a Shed: what the source itself lost
        self._shed: deque[Shed] = deque()  # all older than what waits
        self._room = threading.Condition()
        self._stopped = False
        self._reader: threading.Thread | None = None
        self._ended = False
        self.failure: Exception | None = None

    def open(self) -> None:
        """Begin to read the source, if that has not begun."""
        if self._reader is None:
            self._reader = threading.Thread(target=self._read, name="source", daemon=True)
            self._reader.start()

    def _read(self) -> None:
        try:
            for frame in self._source.frames():
                if not self._put(frame):
                    break
        except Exception as error:  # noqa: BLE001, told to the supervisor by the node
            self.failure = error
        finally:
            self._ended = True
            os.eventfd_write(self._wake, 1)

    def _put(self, frame: Frame | Dropped) -> bool:
        """Queue a frame by the policy; False if no more are wanted."""
        t_ingest_ns = time.monotonic_ns()
        with self._room:
            while self._overflow == "block" and len(self._waiting) >= self._queue:
                if self._stopped:
                    return False
                self._room.wait()
            if self._stopped:
                return False
            if self._overflow == "fail" and len(self._waiting) >= self._queue:
                raise Overrun(
                    f"{self._queue} frames wait at the source and topology.front.overflow is fail; "
                    "let it be drop-oldest, or lower the frame rate"
                )
            seq = self._first + (frame.seq if isinstance(frame, Dropped) else frame.info.seq)
            self._taken.value = seq + 1
            if len(self._waiting) >= self._queue:
                self._lose(self._waiting.popleft(), "overload: oldest frame shed")
            if isinstance(frame, Dropped):
                self._waiting.append(Shed(seq, seq + 1, frame.reason))
            else:
                info = replace(frame.info, seq=seq)
                self._waiting.append(Taken(replace(frame, info=info), t_ingest_ns))
        os.eventfd_write(self._wake, 1)
        return True

    def _lose(self, item: Taken | Shed, reason: str) -> None:
        """Count the oldest as lost; what the source lost keeps the source's reason."""
        if isinstance(item, Taken):
            seq = item.frame.info.seq
            item = Shed(seq, seq + 1, reason)
        before = self._shed[-1] if self._shed else None
        if before is not None and before.reason == item.reason:
            self._shed[-1] = Shed(before.first, item.end, item.reason)
        else:
            self._shed.append(item)

    def take(self, granted: bool) -> Shed | Taken | None:
        """What is next in order: lost frames, or, if one may be sent, a frame."""
        with self._room:
            now_ns = time.monotonic_ns()
            while self._waiting and self._is_lost(self._waiting[0], now_ns):
                limit_ms = (self._max_age_ns or 0) / 1e6
                self._lose(self._waiting.popleft(), f"older than {limit_ms:g} ms")
                self._room.notify()
            if self._shed:
                return self._shed.popleft()
            if granted and self._waiting:
                self._room.notify()
                return self._waiting.popleft()
        return None

    def _is_lost(self, item: Taken | Shed, now_ns: int) -> bool:
        """Lost by the source, or live for too long."""
        if isinstance(item, Shed):
            return True
        return self._max_age_ns is not None and now_ns - item.t_ingest_ns >= self._max_age_ns

    @property
    def ended(self) -> bool:
        """True once nothing more will come and everything was taken."""
        with self._room:
            over = self._ended or self._stopped
            return over and not self._waiting and not self._shed

    def awake(self) -> None:
        """Reset `wake`."""
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._wake)

    def stop(self) -> None:
        """Take no more from the source; what waits can still be got."""
        with self._room:
            self._stopped = True
            self._room.notify_all()
        self._source.close()
