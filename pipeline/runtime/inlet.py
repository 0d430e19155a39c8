"""The edge from the source into the front: a reading thread, a bounded queue, losses by name."""

import contextlib
import ctypes
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from msgspec.structs import replace

from pipeline.component import Source
from pipeline.errors import PipelineError, RunError, told
from pipeline.messages import Dropped, Frame, Malformed
from pipeline.numbering import MAX_GAP, RESTARTED, Position
from pipeline.pacing import rarer
from pipeline.runtime.topology import Overflow

FIRST_RETRY_S, MOST_RETRY_S = 0.25, 30.0
JOIN_S = 0.3
MAX_LOSSES = 2 * MAX_GAP
log = logging.getLogger(__name__)


class Intake(ctypes.Structure):
    """What the front has shared memory for: it stays known whatever becomes of the front.

    offset, unnumbered: the source's `position`, if it has one (`positioned`).
    """

    _fields_ = (
        ("taken", ctypes.c_int64),
        ("waiting", ctypes.c_int64),
        ("offset", ctypes.c_int64),
        ("unnumbered", ctypes.c_int64),
        ("positioned", ctypes.c_bool),
        ("restarted", ctypes.c_bool),  # a frame that says so waits, or was lost
    )

    @property
    def position(self) -> Position | None:
        """As the source had it that gave the frames up to `taken`."""
        return Position(self.offset, self.unnumbered) if self.positioned else None

    def note(self, position: Position) -> None:
        """Keep the source's position."""
        self.offset, self.unnumbered = position
        self.positioned = True


class Shed(NamedTuple):
    """Frames `first` … `end` − 1 were lost before any stage saw them.

    malformed: what came in their place made no frames; parts are the bytes of one of them.
    """

    first: int
    end: int
    reason: str
    malformed: bool = False
    parts: tuple[Any, ...] = ()

    def alike(self, other: "Shed") -> bool:
        """True if both were lost for the same reason."""
        return (self.reason, self.malformed) == (other.reason, other.malformed)


class Taken(NamedTuple):
    """A frame and when it came in, monotonic."""

    frame: Frame
    t_ingest_ns: int


class Overrun(RunError):
    """The source is faster than the run, which was told to fail then."""


class Inlet:
    """Frames as the source has them, numbered on from `intake.taken`, which counts them for all.

    When `queue` frames wait: `block` lets the source wait, `drop-oldest` sheds the oldest, `fail`
    ends it with Overrun. Live, what waited longer than max_age_ns is shed as well, and a source
    that fails is opened again, ever more rarely, until it is there or the inlet is stopped; unless
    it was wrong from the start. The first frame of a source opened again, here or after the death
    of another front, is flagged, unless the source can tell what was lost meanwhile. `wake` is an
    eventfd that is written when there is something new.
    """

    def __init__(
        self,
        open_source: Callable[[], Source],
        queue: int,
        *,
        overflow: Overflow,
        max_age_ns: int | None,
        intake: Any,
        wake: int,
    ) -> None:
        self._open_source, self._queue, self._overflow = open_source, queue, overflow
        self._max_age_ns, self._intake, self._wake = max_age_ns, intake, wake
        self._source: Source | None = None
        self._first = 0
        self._waiting: deque[Taken | Shed] = deque()  # a Shed: what the source itself lost
        self._frames_waiting = 0
        self._unflagged = False  # a frame that said `restarted` was lost, and no other says it yet
        self._shed: deque[Shed] = deque()  # all older than what waits
        self._room = threading.Condition()
        self._stopped = False
        self._reader: threading.Thread | None = None
        self._delays_s = rarer(FIRST_RETRY_S, MOST_RETRY_S)
        self._ended = False
        self.failure: Exception | None = None

    def open(self) -> None:
        """Begin to open and read the source, if that has not begun."""
        if self._reader is None:
            self._reader = threading.Thread(target=self._read, name="source", daemon=True)
            self._reader.start()

    def _read(self) -> None:
        try:
            while not self._stopped and not self._read_once():
                pass
        except Exception as error:  # noqa: BLE001, told to the supervisor by the node
            self.failure = error
        finally:
            self._ended = True
            os.eventfd_write(self._wake, 1)

    def _read_once(self) -> bool:
        """Read the source to its end, or until no more is wanted; False if it failed.

        In that case some time has passed, and it is to be tried again.
        """
        before = self._intake.taken
        try:
            self._read_source()
        except Exception as error:
            if self._is_final(error):
                raise
            if self._intake.taken > before:
                self._delays_s = rarer(FIRST_RETRY_S, MOST_RETRY_S)
            delay_s = next(self._delays_s)
            log.warning("source: %s; it is opened again in %.2g s", told(error), delay_s)
            with self._room:
                self._room.wait_for(lambda: self._stopped, delay_s)
            return False
        return True

    def _read_source(self) -> None:
        source = self._open_source()
        try:
            with self._room:
                self._source, self._first = source, self._intake.taken
            if self._stopped:
                return  # whoever stopped this could not close it yet
            for frame in self._frames(source):
                if not self._put(frame):
                    return
        finally:
            source.close()

    def _frames(self, source: Source) -> Iterator[Frame | Dropped]:
        """Those of the source, the first flagged if losses before it are not known."""
        before = self._intake.position
        told = before is not None and source.resume(_moved(before, self._first))
        silent = self._first > 0 and (not told or self._intake.restarted)
        for frame in source.frames():
            if silent and isinstance(frame, Frame):
                silent, frame = False, _restarted(frame)
            if source.position is not None:
                self._intake.note(_moved(source.position, -self._first))
            yield frame

    def _is_final(self, error: Exception) -> bool:
        """True if to open the source again is of no use, or, in replay, would not be the same."""
        if self._max_age_ns is None or isinstance(error, Overrun):
            return True
        wrong = isinstance(error, PipelineError) and not isinstance(error, RunError)
        return wrong and self._intake.taken == 0

    def _put(self, frame: Frame | Dropped) -> bool:
        """Queue a frame by the policy; False if no more are wanted."""
        t_ingest_ns = time.monotonic_ns()
        with self._room:
            while self._is_full(frame) and self._holds_back(frame):
                if self._stopped:
                    return False
                self._room.wait()
            if self._stopped:
                return False
            if self._is_full(frame) and self._overflow == "fail":
                raise Overrun(
                    f"{self._queue} frames wait at the source and topology.front.overflow is fail; "
                    "let it be drop-oldest, or lower the frame rate"
                )
            seq = self._first + (frame.seq if isinstance(frame, Dropped) else frame.info.seq)
            self._intake.taken = seq + 1
            while self._is_full(frame):
                self._lose("overload: oldest frame shed")
            if isinstance(frame, Dropped):
                self._waiting.append(_shed(frame, seq))
            else:
                info = replace(frame.info, seq=seq)
                self._waiting.append(Taken(replace(frame, info=info), t_ingest_ns))
                self._intake.restarted |= RESTARTED in info.flags
                self._frames_waiting += 1
            self._intake.waiting = self._frames_waiting
        os.eventfd_write(self._wake, 1)
        return True

    def _is_full(self, frame: Frame | Dropped) -> bool:
        """True if there is no room for this; what is lost takes none, unless it is very much."""
        if isinstance(frame, Dropped):
            return len(self._waiting) >= self._queue + MAX_LOSSES
        return self._frames_waiting >= self._queue

    def _holds_back(self, frame: Frame | Dropped) -> bool:
        """True if the source has to wait where there is no room for this."""
        return self._overflow == "block" or (
            self._overflow == "fail" and isinstance(frame, Dropped)
        )

    def _lose(self, reason: str) -> None:
        """Count the oldest as lost; what the source lost keeps the source's reason."""
        item = self._waiting.popleft()
        if isinstance(item, Taken):
            self._frames_waiting -= 1
            self._unflagged |= RESTARTED in item.frame.info.flags
            seq = item.frame.info.seq
            item = Shed(seq, seq + 1, reason)
        before = self._shed[-1] if self._shed else None
        if before is not None and not item.parts and before.alike(item):
            self._shed[-1] = before._replace(end=item.end)
        else:
            self._shed.append(item)

    def take(self, granted: bool) -> Shed | Taken | None:
        """What is next in order: lost frames, or, if one may be sent, a frame."""
        with self._room:
            now_ns = time.monotonic_ns()
            while self._waiting and self._is_lost(self._waiting[0], now_ns):
                limit_ms = (self._max_age_ns or 0) / 1e6
                self._lose(f"older than {limit_ms:g} ms")
                self._room.notify()
            item: Shed | Taken | None = None
            if self._shed:
                item = self._shed.popleft()
            elif granted and self._waiting:
                item = self._waiting.popleft()
                self._frames_waiting -= 1
                self._room.notify()
                if isinstance(item, Taken):
                    item = self._flagged(item)
            self._intake.waiting = self._frames_waiting
        return item

    def _flagged(self, item: Taken) -> Taken:
        """With the flag of a frame lost before it."""
        frame = _restarted(item.frame) if self._unflagged else item.frame
        self._unflagged = False
        if RESTARTED in frame.info.flags:
            self._intake.restarted = False
        return item._replace(frame=frame)

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
            source = self._source
        if source is not None:
            source.close()

    def close(self) -> None:
        """Stop, and give the source a moment to leave behind nothing."""
        self.stop()
        if self._reader is not None:
            self._reader.join(JOIN_S)


def _moved(position: Position, by: int) -> Position:
    """The same place, where our numbers are less by so many."""
    return position._replace(offset=position.offset + by)


def _restarted(frame: Frame) -> Frame:
    """It comes after frames of which it is not known how many were lost."""
    if RESTARTED in (flags := frame.info.flags):
        return frame
    return replace(frame, info=replace(frame.info, flags=(*flags, RESTARTED)))


def _shed(lost: Dropped, seq: int) -> Shed:
    """What the source lost, under its number here."""
    parts = lost.parts if isinstance(lost, Malformed) else ()
    return Shed(seq, seq + 1, lost.reason, isinstance(lost, Malformed), parts)
