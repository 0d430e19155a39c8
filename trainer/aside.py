"""Writing a few files that belong together whole or not at all."""

import fcntl
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from trainer.errors import TrainerError


@contextmanager
def aside(out_dir: Path, name: str) -> Iterator[Path]:
    """An empty folder `.NAME.part` in out_dir, removed in the end, for one process at a time.

    What a killed process left there is removed by the next. Raises TrainerError while another
    process is at work in out_dir.
    """
    folder = out_dir / f".{name}.part"
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        lock = os.open(out_dir, os.O_RDONLY)
    except OSError as error:
        raise TrainerError(f"{out_dir}: cannot write there ({error.strerror})") from error
    try:
        _held(lock, out_dir)
        shutil.rmtree(folder, ignore_errors=True)
        try:
            folder.mkdir()
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(lock)


def _held(lock: int, out_dir: Path) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise TrainerError(
            f"{out_dir}: another process is writing there; wait for it, or choose another folder"
        ) from error


def move_in(files: Sequence[Path], out_dir: Path) -> None:
    """Flush files to the disk and move them into place, in this order."""
    for file in files:
        _flush(file)
    for file in files:
        file.replace(out_dir / file.name)
    _flush(out_dir)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
