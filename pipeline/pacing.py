"""Frames at a rate: what turns a file into something like a live sensor."""

import time
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
