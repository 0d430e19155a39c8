"""The folder of a run's own sockets, in TMPDIR; those of runs that were killed are swept."""

import fcntl
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pipeline.errors import RunError

PREFIX = "irst-"
SETTLED_S = 10.0


@contextmanager
def run_folder() -> Iterator[Path]:
    """A folder that is this user's alone, as long as the block lasts.

    Mostly the nodes of a supervisor that is dead remove its folder, but not if they were killed
    with it.
    """
    for lock in Path(tempfile.gettempdir()).glob(f"{PREFIX}*/hub.lock"):
        with suppress(OSError):
            _sweep(lock)
    with tempfile.TemporaryDirectory(prefix=PREFIX) as folder:
        held = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(held, fcntl.LOCK_SH)  # systemd-tmpfiles leaves alone what is locked
            yield Path(folder)
        finally:
            os.close(held)


def check_there(folder: Path) -> None:
    """Raise RunError if somebody has removed the folder: no node could be started again."""
    if not folder.exists():
        raise RunError(
            f"{folder}: the run's own folder was removed; keep what cleans temporary files from "
            f"{PREFIX}*, or set TMPDIR to another place"
        )


def _sweep(lock: Path) -> None:
    """Remove the folder of a run whose supervisor, which held this lock, is dead."""
    folder = lock.parent.lstat()
    ours = folder.st_uid == os.geteuid() and stat.S_ISDIR(folder.st_mode)
    if ours and time.time() - lock.stat().st_mtime > SETTLED_S:
        with lock.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # BlockingIOError: it lives
            shutil.rmtree(lock.parent, ignore_errors=True)
