"""A folder that recorders fill, several at once if need be, each with recordings of its own.

SENSOR-STAMP-NUMBER.zarr has its target messages in SENSOR-STAMP-NUMBER.targets.jsonl. The stamp is
UTC, the number is by one higher than any of that sensor in the folder: which recording is older it
says, whatever the clock was. The file of messages is made first, which one recorder alone can do,
and is locked while the recording is written.
"""

import fcntl
import json
import logging
import os
import re
import shutil
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from pipeline.errors import RunError

log = logging.getLogger(__name__)


class TargetLines:
    """The target messages of a recording, a line of JSON each; raises OSError if there are some."""

    def __init__(self, recording: Path) -> None:
        self.recording = recording
        self._path = _lines_of(recording)
        self._file = self._path.open("x", encoding="utf-8")
        fcntl.flock(self._file, fcntl.LOCK_EX)

    def write(self, message: dict[str, Any]) -> None:
        """Add a message."""
        self._file.write(json.dumps(message) + "\n")
        self._file.flush()

    def refuse_lost(self) -> None:
        """Raise RunError if the file was moved or removed."""
        if not leads_to(self._path, self._file.fileno()):
            raise lost(self.recording)

    def close(self) -> None:
        """Give the recording free; raises RunError if the file was moved or removed."""
        with self._file:
            self.refuse_lost()


def begin(folder: Path, sensor_id: str) -> TargetLines:
    """A name for a new recording, which is nobody else's, and the file of its target messages."""
    folder.mkdir(parents=True, exist_ok=True)
    stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    number = max((_number(path) for path in recordings(folder, sensor_id)), default=-1) + 1
    while True:
        try:
            return TargetLines(folder / f"{sensor_id}-{stamp}-{number:04d}.zarr")
        except FileExistsError:
            number += 1


def recordings(folder: Path, sensor_id: str) -> list[Path]:
    """What recorders have made of this sensor in a folder, oldest first, whoever ran them."""
    name = re.compile(re.escape(sensor_id) + r"-\d{8}T\d{6}Z-\d{4,}\.zarr")
    found = [path for path in folder.iterdir() if name.fullmatch(path.name)]
    return sorted(found, key=lambda path: (_number(path), path.name))


def make_room(folder: Path, sensor_id: str, keep: int) -> None:
    """Delete the oldest recordings of a sensor beyond `keep`, of those that nobody is writing."""
    found = recordings(folder, sensor_id)
    surplus = len(found) - keep
    for path in found:
        if surplus <= 0:
            return
        try:
            _delete(path)
        except BlockingIOError:
            continue
        except OSError as error:
            log.warning("%s: cannot be deleted (%s)", path, error.strerror)
            continue
        log.warning("%s: deleted, the oldest of more than %d", path, keep)
        surplus -= 1


def _delete(recording: Path) -> None:
    """Delete a recording; raises BlockingIOError if it is being written."""
    lines = _lines_of(recording)
    with lines.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with suppress(FileNotFoundError):  # another recorder was quicker
            shutil.rmtree(recording)
        lines.unlink(missing_ok=True)


def leads_to(path: Path, handle: int) -> bool:
    """True while `path` is what is open as `handle`: neither moved nor removed nor made again."""
    try:
        return os.path.samestat(path.stat(), os.fstat(handle))
    except OSError:
        return False


def lost(recording: Path) -> RunError:
    """What is said of a recording that somebody moved or removed too early."""
    return RunError(
        f"{recording}: moved or removed while it was being recorded, whole or in part; record "
        "anew, and leave recordings where they are until they are finished"
    )


def _lines_of(recording: Path) -> Path:
    return recording.with_suffix(".targets.jsonl")


def _number(recording: Path) -> int:
    return int(recording.stem.rsplit("-")[-1])
