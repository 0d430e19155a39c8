"""Malformed messages, kept in a folder with their cause until newer ones take their place.

A letter is one MessagePack file: `cause`, `config`, `t_utc_ns`, `parts`. `replay_dead_letter` reads
it again with the decoder of this release.
"""

import logging
import os
import re
import time
from pathlib import Path
from typing import Any

import msgpack

from pipeline.errors import PipelineError
from pipeline.runtime.settings import DeadLetterSettings
from pipeline.transport import codec

MAX_LETTER_BYTES = 1 << 24
LETTER = re.compile(r"\d{20}\.letter")
log = logging.getLogger(__name__)


class DeadLetters:
    """A folder of at most `keep` letters; without a folder they are only counted and logged."""

    def __init__(self, settings: DeadLetterSettings, config: str) -> None:
        self._folder, self._keep, self._config = settings.folder, settings.keep, config
        self.count = 0
        if self._folder is not None:
            try:
                self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            except OSError as error:
                raise PipelineError(
                    f"{self._folder}: dead_letters.folder cannot be made ({error.strerror})"
                ) from error

    def keep(self, parts: list[Any], cause: str) -> None:
        """Keep a message; one that cannot be kept is lost with a warning, never the run."""
        self.count += 1
        log.warning("malformed message %s", cause)
        if self._folder is None:
            return
        letter = {
            "cause": cause,
            "config": self._config,
            "t_utc_ns": time.time_ns(),
            "parts": [bytes(part) for part in parts],
        }
        packed: bytes = msgpack.packb(letter)
        if len(packed) > MAX_LETTER_BYTES:
            packed = msgpack.packb(letter | {"parts": [], "cause": f"{cause} (too large to keep)"})
        try:
            path = self._folder / f"{time.time_ns():020d}.letter"
            path.with_suffix(".new").write_bytes(packed)
            path.with_suffix(".new").rename(path)
            for old in self.letters(self._folder)[: -self._keep]:
                old.unlink(missing_ok=True)
        except OSError as error:
            log.warning("%s: a dead letter could not be kept (%s)", self._folder, error.strerror)

    @staticmethod
    def letters(folder: Path) -> list[Path]:
        """The letters in a folder, oldest first."""
        return sorted(Path(e.path) for e in os.scandir(folder) if LETTER.fullmatch(e.name))


def read_letter(path: Path) -> dict[str, Any]:
    """The fields of a letter; raises PipelineError if it is none."""
    try:
        letter = msgpack.unpackb(path.read_bytes(), max_map_len=4, max_array_len=64)
    except (OSError, ValueError, TypeError, msgpack.UnpackException) as error:
        raise PipelineError(f"{path}: not a dead letter ({error})") from error
    wanted = {"cause": str, "config": str, "t_utc_ns": int, "parts": list}
    if not isinstance(letter, dict) or {k: type(v) for k, v in letter.items()} != wanted:
        raise PipelineError(f"{path}: not a dead letter; give a file of dead_letters.folder")
    return letter


def replay_letter(path: Path) -> str:
    """What this release's decoder says of the message in a letter."""
    parts = read_letter(path)["parts"]
    try:
        message, trace, _ = codec.decode(parts)
    except codec.CodecError as error:
        return f"still malformed: {error}"
    seq = getattr(message, "seq", None)
    seq = message.info.seq if seq is None else seq
    return f"reads as {type(message).__name__} of frame {seq}; stages {', '.join(trace.stage_ns)}"
