"""Watches over the run as a whole: whether its source gives frames, and what systemd is told."""

import logging
import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import suppress

from pipeline.pacing import rarer

QUIET_S, RARELY_S = 10.0, 600.0
BEAT_S = 1.0
log = logging.getLogger(__name__)


class SourceVigil:
    """Says that no frame comes from the source, ever more rarely, and that they come again.

    silent_s: after so long another front is wanted, and again after as long; None: never.
    """

    def __init__(self, silent_s: float | None) -> None:
        self._silent_s = silent_s
        self._frames = 0
        self._last_s: float | None = None  # when a frame came, or was first waited for
        self._tried_s = 0.0  # since when the present front has been trying
        self._said = False
        self._say_s: Iterator[float] = iter(())
        self._next_s = 0.0

    def look(self, frames: int, now_s: float, *, front_is_there: bool) -> bool:
        """Take in how many frames have come; True if another front is wanted."""
        if self._last_s is None or frames != self._frames:
            if self._said and self._last_s is not None:
                log.warning("frames come from the source again, after %.0f s", now_s - self._last_s)
            self._frames, self._last_s, self._tried_s, self._said = frames, now_s, now_s, False
            self._say_s = rarer(QUIET_S, RARELY_S)
            self._next_s = now_s + next(self._say_s)
            return False
        if not front_is_there:
            self._tried_s = now_s
        if now_s >= self._next_s:
            log.warning("no frame from the source for %.0f s", now_s - self._last_s)
            self._said, self._next_s = True, now_s + next(self._say_s)
        if self._silent_s is None or now_s - self._tried_s < self._silent_s:
            return False
        self._tried_s = now_s
        return True


class Service:
    """Tells systemd how the run is, by sd_notify(3); does nothing where systemd does not ask."""

    def __init__(self, environment: Mapping[str, str] = os.environ) -> None:
        self._address = environment.get("NOTIFY_SOCKET", "").replace("@", "\0", 1)
        self._said: set[str] = set()
        self._beat_at_s = 0.0

    def say_once(self, state: str) -> None:
        """READY=1 when the run is up, STOPPING=1 when it is about to end."""
        if state not in self._said:
            self._said.add(state)
            self._say(state)

    def _say(self, state: str) -> None:
        if self._address:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as line, suppress(OSError):
                line.setblocking(False)
                line.sendto(state.encode(), self._address)

    def beat(self, now_s: float) -> None:
        """Say WATCHDOG=1, once a second."""
        if now_s >= self._beat_at_s:
            self._beat_at_s = now_s + BEAT_S
            self._say("WATCHDOG=1")
