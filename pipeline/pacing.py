"""Rates: frames like those of a live sensor, so many things a second, ever rarer attempts."""

import time
from collections.abc import Callable, Iterator
from threading import Event


class Pace:
    """Holds frame n back until n / rate_hz seconds after the first; does nothing without a rate.

    A consumer that falls behind gets the frames that are due at once: the schedule is kept, not
    the interval. Setting `closed` ends any wait.
    """

    def __init__(self, rate_hz: float | None, closed: Event) -> None:
        self._interval_s = 0.0 if rate_hz is None else 1.0 / rate_hz
        self._closed = closed
        self._started_s: float | None = None

    def wait(self, seq: int) -> None:
        """Return when frame `seq` is due, or the source closed."""
        if self._started_s is None:
            self._started_s = time.monotonic()
        left_s = self._started_s + seq * self._interval_s - time.monotonic()
        if left_s > 0.0:
            self._closed.wait(left_s)


class Allowance:
    """So many things a second, counted anew each second."""

    def __init__(self, per_s: int, clock_s: Callable[[], float] = time.monotonic) -> None:
        self._per_s, self._clock_s = per_s, clock_s
        self._since_s = clock_s()
        self._left = per_s

    def take(self) -> bool:
        """True if this one is within the allowance."""
        now_s = self._clock_s()
        if now_s >= self._since_s + 1.0:
            self._since_s, self._left = now_s, self._per_s
        self._left -= 1
        return self._left >= 0


def rarer(first_s: float, most_s: float) -> Iterator[float]:
    """Seconds to wait before one attempt after another: each time twice as long, without end."""
    while True:
        yield first_s
        first_s = min(2.0 * first_s, most_s)
