"""A sender's frame numbers into those of a source, so that what was lost on the way is seen."""

from dataclasses import dataclass
from typing import NamedTuple

MAX_GAP = 1000
"""A longer jump of the sender's numbers is a new beginning, not so many lost frames."""

RESTARTED = "restarted"
"""Flag of the first frame after its sender began anew: what was lost between is not known."""


@dataclass(frozen=True)
class Step:
    """A frame's number here, the numbers lost before it, and whether its sender began anew."""

    seq: int
    lost: range
    restarted: bool


class Position(NamedTuple):
    """Where a numbering is, for another process to go on with.

    offset: what a frame's number at its sender is more than its number here. unnumbered: how many
    of ours, since the last that it gave a number, had none.
    """

    offset: int
    unnumbered: int


class Numbering:
    """Counts frames and losses from 0, as the flow wants them.

    Numbers that go back, or ahead by more than MAX_GAP, mean that the sender has begun anew; how
    much was lost meanwhile is not known. last: the number after which a sender may go on with 1 (or
    with the next: newer ones count further).
    """

    def __init__(self, last: int | None = None) -> None:
        self._last = last
        self._next = 0
        self._expected: int | None = None
        self._unnumbered = 0
        self._restarted = False  # and no frame has said so yet

    def take(self, number: int) -> Step:
        """The next frame, which has this number at its sender."""
        missing = 0 if self._expected is None else number - self._expected
        if self._last is not None:
            missing %= self._last
        restarted = not 0 <= missing <= MAX_GAP
        self._restarted |= restarted
        lost = 0 if restarted else max(missing - self._unnumbered, 0)
        first = self._next
        self._next += lost + 1
        self._unnumbered = 0
        self._expected = 1 if number == self._last else number + 1
        return Step(first + lost, range(first, first + lost), restarted)

    def unnumbered(self) -> int:
        """A frame that was lost and whose number at the sender could not be read: its number."""
        self._unnumbered += 1
        self._next += 1
        return self._next - 1

    @property
    def position(self) -> Position | None:
        """None before the first number."""
        if self._expected is None:
            return None
        return Position(self._expected - self._next + self._unnumbered, self._unnumbered)

    def resume(self, position: Position) -> None:
        """Go on, before the first frame, with the sender of another numbering."""
        self._expected = self._next + position.offset - position.unnumbered
        self._unnumbered = position.unnumbered

    def begin_anew(self) -> None:
        """The sender starts again, with any number."""
        self._expected = None
        self._unnumbered = 0
        self._restarted = True

    def flags(self) -> tuple[str, ...]:
        """Those of a frame that is given now: the first since its sender began anew says so."""
        restarted, self._restarted = self._restarted, False
        return (RESTARTED,) if restarted else ()
