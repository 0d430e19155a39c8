"""Malformed messages, kept in a folder with their cause until newer ones take their place.

A letter is one MessagePack file: `cause`, `config`, `t_utc_ns`, `kind` (what it should have been)
and `parts`, of which what goes beyond MAX_BYTES is cut off. `replay_letter` reads it again with the
decoder of this release.
"""

import logging
import os
import re
import time
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import msgpack

from pipeline.errors import PipelineError
from pipeline.messages import BadMessage
from pipeline.pacing import Allowance
from pipeline.runtime.settings import DeadLetterSettings
from pipeline.transport import codec
from pipeline.transport.feed import sent_frame
from pipeline.transport.hub import FROM_NODE, read_word

MAX_BYTES, MAX_PARTS = 1 << 20, 64
MAX_LETTER_BYTES = MAX_BYTES + (1 << 16)
LETTERS_PER_S = 5
"""More are counted only: what sends garbage in floods is known by a few."""
LETTER = re.compile(r"\d{20}\.letter")
LEFTOVER = re.compile(r"\d{20}\.new")
log = logging.getLogger(__name__)

Kind = Literal["message", "word", "frame"]
"""Between nodes; from a node to the supervisor; `irst.frame/1` from a program outside."""


def bounded(parts: Iterable[Any]) -> list[bytes]:
    """The parts of a message as they are kept: not too many, nor too large in all."""
    kept: list[bytes] = []
    for part in islice(parts, MAX_PARTS):
        kept.append(bytes(memoryview(part)[: MAX_BYTES - sum(map(len, kept))]))
    return kept


class DeadLetters:
    """A folder of at most `keep` letters and `keep_mb`; without it they are only counted.

    A letter's name is its time in ns, or the last name + 1: the order, too, where the clock went
    back. Raises PipelineError if the folder cannot be made, or looked through.
    """

    def __init__(self, settings: DeadLetterSettings, config: str) -> None:
        self._settings, self._config = settings, config
        self._kept: deque[tuple[Path, int]] = deque()  # with their bytes, oldest first
        self._allowance = Allowance(LETTERS_PER_S)
        self.count = 0
        if settings.folder is not None:
            try:
                settings.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
                for left in _named(settings.folder, LEFTOVER):  # of a run that was killed
                    left.unlink(missing_ok=True)
                for path in self.letters(settings.folder):
                    with suppress(FileNotFoundError):  # another run's, which it deletes just now
                        self._kept.append((path, path.stat().st_size))
            except OSError as error:
                raise PipelineError(
                    f"{settings.folder}: dead_letters.folder cannot be used ({error.strerror})"
                ) from error

    def keep(
        self, parts: Iterable[Any], cause: str, kind: Kind = "message", *, count: int = 1
    ) -> None:
        """Keep a message, one of `count` alike; if that fails there is a warning, never an end."""
        self.count += count
        log.warning("malformed message %s", cause)
        folder = self._settings.folder
        if folder is None or not self._allowance.take():
            return
        letter = {
            "cause": cause,
            "config": self._config,
            "t_utc_ns": time.time_ns(),
            "kind": kind,
            "parts": bounded(parts),
        }
        try:
            self._write(folder, msgpack.packb(letter))
        except OSError as error:
            log.warning("%s: a dead letter could not be kept (%s)", folder, error.strerror)

    def _write(self, folder: Path, packed: bytes) -> None:
        newest = int(self._kept[-1][0].stem) if self._kept else 0
        path = folder / f"{max(time.time_ns(), newest + 1):020d}.letter"
        new = path.with_suffix(".new")
        try:
            new.write_bytes(packed)
            new.rename(path)
        except OSError:
            new.unlink(missing_ok=True)
            raise
        self._kept.append((path, len(packed)))
        most, most_bytes = self._settings.keep, self._settings.keep_mb * 1e6
        while len(self._kept) > most or sum(size for _, size in self._kept) > most_bytes:
            self._kept.popleft()[0].unlink(missing_ok=True)

    @staticmethod
    def letters(folder: Path) -> list[Path]:
        """The letters in a folder, oldest first."""
        return _named(folder, LETTER)


def _named(folder: Path, pattern: re.Pattern[str]) -> list[Path]:
    return sorted(Path(entry.path) for entry in os.scandir(folder) if pattern.fullmatch(entry.name))


def read_letter(path: Path) -> dict[str, Any]:
    """The fields of a letter; raises PipelineError if it is none."""
    try:
        with path.open("rb") as file:
            packed = file.read(MAX_LETTER_BYTES + 1)
    except OSError as error:
        raise PipelineError(
            f"{path}: cannot be read ({error.strerror}); give files of dead_letters.folder"
        ) from error
    try:
        letter = msgpack.unpackb(packed, max_map_len=5, max_array_len=MAX_PARTS)
    except (ValueError, TypeError, msgpack.UnpackException) as error:
        cause = str(error) or type(error).__name__
        raise PipelineError(
            f"{path}: not a dead letter ({cause}); give files of dead_letters.folder"
        ) from error
    wanted = {"cause": str, "config": str, "t_utc_ns": int, "kind": str, "parts": list}
    found = {key: type(value) for key, value in letter.items()} if type(letter) is dict else {}
    parts = letter["parts"] if found == wanted else [None]
    if not all(isinstance(part, bytes) for part in parts) or letter["kind"] not in READERS:
        raise PipelineError(f"{path}: not a dead letter; give files of dead_letters.folder")
    return dict(letter)


def replay_letter(path: Path) -> str:
    """What this release's decoder says of the message in a letter."""
    letter = read_letter(path)
    try:
        return READERS[letter["kind"]](letter["parts"])
    except codec.CodecError as error:
        cut = sum(map(len, letter["parts"])) == MAX_BYTES or len(letter["parts"]) == MAX_PARTS
        return f"still malformed: {error}{' (it was cut when it was kept)' if cut else ''}"


def _read_message(parts: list[bytes]) -> str:
    message, trace, _ = codec.decode(parts)
    seq = getattr(message, "seq", None)
    seq = message.info.seq if seq is None else seq
    return f"reads as {type(message).__name__} of frame {seq}; stages {', '.join(trace.stage_ns)}"


def _read_word(parts: list[bytes]) -> str:
    word = read_word(parts[0] if parts else b"", FROM_NODE)
    return f"reads as the word `{word.kind}` of frame {word.seq}"


def _read_frame(parts: list[bytes]) -> str:
    sent = sent_frame(parts)
    if isinstance(sent, BadMessage):
        raise codec.CodecError(sent.reason)
    height, width = sent.pixels_HW.shape
    return f"reads as frame {sent.seq}, {width}×{height} {sent.pixels_HW.dtype}"


READERS: dict[str, Callable[[list[bytes]], str]] = {
    "message": _read_message,
    "word": _read_word,
    "frame": _read_frame,
}
