"""Log records on standard error: one line each, JSON if asked for, and never a flood."""

import json
import logging
import sys
import threading
import time
from dataclasses import dataclass
from typing import Any, TextIO

from pipeline.errors import printable
from pipeline.runtime.settings import TelemetrySettings

BURST, EVERY_S = 5, 10.0


@dataclass
class _Window:
    """What came of a kind since a time: how many records were written, how many held back."""

    since_s: float
    written: int = 0
    held: int = 0
    last: logging.LogRecord | None = None


class LimitedHandler(logging.StreamHandler[TextIO]):
    """Writes BURST records of a kind in EVERY_S seconds, and then how many more there were.

    A kind is a place in the code.
    """

    def __init__(self, stream: TextIO) -> None:
        super().__init__(stream)
        self._windows: dict[tuple[str, int], _Window] = {}

    def emit(self, record: logging.LogRecord) -> None:
        """Write it, or count it until its window ends."""
        kind, now_s = (record.pathname, record.lineno), time.monotonic()
        window = self._windows.get(kind)
        if window is None or (not window.held and now_s - window.since_s >= EVERY_S):
            window = self._windows[kind] = _Window(now_s)
        if window.written < BURST:
            window.written += 1
            super().emit(record)
            return
        window.held, window.last = window.held + 1, record
        if window.held == 1:
            timer = threading.Timer(window.since_s + EVERY_S - now_s, self._end, [kind])
            timer.daemon = True
            timer.start()

    def _end(self, kind: tuple[str, int]) -> None:
        """Say how many of a kind were held back."""
        self.acquire()
        try:
            window = self._windows.pop(kind, None)
            if window is not None and window.last is not None:
                seconds = time.monotonic() - window.since_s
                more = f" ({window.held} more like this in {seconds:.0f} s)"
                told = {"msg": window.last.getMessage() + more, "args": None, "exc_info": None}
                super().emit(logging.makeLogRecord({**window.last.__dict__, **told}))
        finally:
            self.release()

    def close(self) -> None:
        """At the end of the process: say what has not been said."""
        for kind in list(self._windows):
            self._end(kind)
        super().close()


class OneLine(logging.Formatter):
    """A record as one line, whatever is in it."""

    def format(self, record: logging.LogRecord) -> str:
        """Time (UTC), level, process, text."""
        return printable(super().format(record))


class JsonLine(logging.Formatter):
    """A record as one line of JSON."""

    def format(self, record: logging.LogRecord) -> str:
        """`time`, `level`, `logger`, `process`, `message`, its own fields, `cause` if there is."""
        fields: dict[str, Any] = {
            "time": self.formatTime(record, "%Y-%m-%dT%H:%M:%S"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "process": record.process,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            fields["cause"] = self.formatException(record.exc_info)
        return json.dumps(fields)


def configure_logs(settings: TelemetrySettings) -> None:
    """Send this process's records to standard error as configured."""
    formatter = (
        JsonLine()
        if settings.log_json
        else OneLine("%(asctime)s %(levelname)s %(process)d %(message)s", "%Y-%m-%dT%H:%M:%S")
    )
    formatter.converter = time.gmtime
    handler = LimitedHandler(sys.stderr)
    handler.setFormatter(formatter)
    root = logging.getLogger("pipeline")
    root.handlers[:] = [handler]
    root.setLevel(settings.log_level.upper())
    root.propagate = False
