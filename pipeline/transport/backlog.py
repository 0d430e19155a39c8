"""Which subscribers are behind, by what waits for them in the kernel.

libzmq tells of a full queue once. It then sends past that subscriber until this has read half of
what waits, and nobody counts what it goes without. But bytes wait in its connection until it has
caught up, and they can be asked for: the connection comes with the subscription.
"""

import contextlib
import fcntl
import logging
import os
import socket
import struct
import termios
import time
from dataclasses import dataclass

SIOCOUTQNSD = 0x894B  # linux/sockios.h: of TCP, what has not been sent yet
LOOK_S = 0.05
WAITING_LOOKS, EMPTY_LOOKS = 2, 3
"""In a row; a message just sent waits a moment, and between two reads nothing may for a moment."""
log = logging.getLogger(__name__)


@dataclass
class _Line:
    """A subscriber's connection; the number of a file may be another's once it is closed."""

    fd: int
    inode: int
    peer: str
    suspect_since: float | None = None
    behind: bool = False
    waiting_looks: int = 0
    empty_looks: int = 0

    def waiting_bytes(self) -> int | None:
        """What waits for the subscriber in the kernel; None if the connection is gone."""
        try:
            if os.fstat(self.fd).st_ino != self.inode:
                return None
        except OSError:
            return None
        for question in (SIOCOUTQNSD, termios.TIOCOUTQ):  # ipc knows the second only
            with contextlib.suppress(OSError):
                return int(struct.unpack("i", fcntl.ioctl(self.fd, question, bytes(4)))[0])
        return None


class Backlog:
    """Connections of subscribers, and which of them are behind.

    When a queue is full it is not said whose, so all are `suspect`, until nothing has waited for
    them for EMPTY_LOOKS looks; those for which something does are `behind`, until then, too.
    """

    def __init__(self) -> None:
        self._lines: dict[int, _Line] = {}
        self._look_at = 0.0

    def met(self, fd: int) -> None:
        """A subscriber has come over the connection with this file descriptor."""
        try:
            inode, peer = os.fstat(fd).st_ino, _peer(fd)
        except OSError:
            return  # it has gone again
        known = self._lines.get(fd)
        if known is None or known.inode != inode:
            self._lines[fd] = _Line(fd, inode, peer)

    def full(self) -> None:
        """Some subscriber had no room for a message."""
        for fd, line in list(self._lines.items()):
            line.empty_looks = 0
            if line.suspect_since is None and line.waiting_bytes() is None:
                del self._lines[fd]  # it has gone since
            elif line.suspect_since is None:
                line.suspect_since, line.waiting_looks = time.monotonic(), 0

    def look(self) -> None:
        """See who is behind, has caught up or has gone; to be called often."""
        if (now := time.monotonic()) < self._look_at:
            return
        self._look_at = now + LOOK_S
        for fd, line in list(self._lines.items()):
            if line.suspect_since is not None:
                self._look_at_one(line, fd, now)

    def _look_at_one(self, line: _Line, fd: int, now: float) -> None:
        waiting = line.waiting_bytes()
        line.waiting_looks = line.waiting_looks + 1 if waiting else 0
        line.empty_looks = 0 if waiting else line.empty_looks + 1
        if waiting is None:
            del self._lines[fd]
        if line.waiting_looks >= WAITING_LOOKS and not line.behind:
            line.behind = True
            log.warning("subscriber %s is behind and loses messages", line.peer)
        elif waiting is None or line.empty_looks >= EMPTY_LOOKS:
            if line.behind:
                how = "is gone" if waiting is None else "has caught up"
                since = line.suspect_since or now
                log.warning("subscriber %s %s after %.1f s", line.peer, how, now - since)
            line.suspect_since, line.behind = None, False

    @property
    def suspects(self) -> int:
        """How many may be without what is published now; never too few."""
        return sum(line.suspect_since is not None for line in self._lines.values())

    @property
    def behind(self) -> int:
        """How many are behind."""
        return sum(line.behind for line in self._lines.values())


def _peer(fd: int) -> str:
    """Who is at the other end: a process of this machine, or an address."""
    with socket.socket(fileno=os.dup(fd)) as end:
        if end.family == socket.AF_UNIX:
            pid, _, _ = struct.unpack(
                "3i", end.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
            )
            return f"of process {pid}"
        return f"at {end.getpeername()[0]}"
