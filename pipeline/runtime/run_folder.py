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
YOUNG_S = 3600.0


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
        yield Path(folder)


def tend(folder: Path) -> None:
    """Keep the folder from being taken for an old one, by what cleans temporary files.

    Raises RunError if somebody has removed it all the same: no node could be started again.
    """
    try:
        age_s = time.time() - folder.stat().st_mtime
    except FileNotFoundError as error:
        raise RunError(
            f"{folder}: the run's own folder was removed; keep what cleans temporary files from "
            f"{PREFIX}*, or set TMPDIR to another place"
        ) from error
    if age_s > YOUNG_S:
        for path in (folder, *folder.rglob("*")):
            with suppress(OSError):
                os.utime(path, follow_symlinks=False)


def _sweep(lock: Path) -> None:
    """Remove the folder of a run whose supervisor, which held this lock, is dead."""
    folder = lock.parent.lstat()
    ours = folder.st_uid == os.geteuid() and stat.S_ISDIR(folder.st_mode)
    if ours and time.time() - lock.stat().st_mtime > SETTLED_S:
        with lock.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # BlockingIOError: it lives
            shutil.rmtree(lock.parent, ignore_errors=True)
