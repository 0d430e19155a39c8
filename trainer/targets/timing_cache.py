"""TensorRT's timing cache in a file: what was measured on this GPU need not be measured again."""

import fcntl
import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from engines.whole import write_whole


class TimingCache(NamedTuple):
    """What the file held, empty at first, and how to put there what is known now."""

    held: bytes
    replace: Callable[[bytes], str]  # → SHA-256 of what is there then


@contextmanager
def timing_cache(path: Path, tell: Callable[[str], None]) -> Iterator[TimingCache]:
    """The cache at this path, held against a second compilation, which waits and is told so.

    The lock is the kernel's and ends with the process. The file is replaced whole, so a process
    killed at any moment leaves the old one or the new one.
    """
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with path.with_suffix(".lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            tell(f"waiting for another compilation, which holds {path}")
            fcntl.flock(lock, fcntl.LOCK_EX)
        held = path.read_bytes() if path.is_file() else b""
        yield TimingCache(held, lambda known: _replace(path, known))


def _replace(path: Path, known: bytes) -> str:
    write_whole(path, known)
    return hashlib.sha256(known).hexdigest()
