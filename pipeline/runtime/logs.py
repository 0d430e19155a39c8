"""Log records on standard error: one line each, JSON if asked for, and never a flood."""

import json
import logging
import sys
import time
from collections import OrderedDict
from typing import Any

from pipeline.runtime.settings import TelemetrySettings

BURST, EVERY_S = 5, 10.0
MAX_KINDS = 256


class RateLimit(logging.Filter):
    """Lets BURST records of a kind through in EVERY_S seconds; the next says how many it held."""

    def __init__(self) -> None:
        super().__init__()
        self._kinds: OrderedDict[tuple[str, int], list[float]] = OrderedDict()

    def filter(self, record: logging.LogRecord) -> bool:
        """True if the record may pass. A kind is a place in the code."""
        key = (record.pathname, record.lineno)
        now = time.monotonic()
        since, passed, held = self._kinds.pop(key, [now, 0, 0])
        if now - since >= EVERY_S:
            if held:
                record.msg = f"{record.msg} ({held:.0f} more like this in {now - since:.0f} s)"
            since, passed, held = now, 0, 0
        allowed = passed < BURST
        self._kinds[key] = [since, passed + allowed, held + (not allowed)]
        if len(self._kinds) > MAX_KINDS:
            self._kinds.popitem(last=False)
        return allowed


class OneLine(logging.Formatter):
    """A record as one line, whatever is in it."""

    def format(self, record: logging.LogRecord) -> str:
        """Time (UTC), level, process, text."""
        return " ".join(super().format(record).split())


class JsonLine(logging.Formatter):
    """A record as one line of JSON."""

    def format(self, record: logging.LogRecord) -> str:
        """The fields `time`, `level`, `logger`, `process`, `message`, and `cause` if there is."""
        fields: dict[str, Any] = {
            "time": self.formatTime(record, "%Y-%m-%dT%H:%M:%S"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "process": record.process,
            "message": record.getMessage(),
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
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(formatter)
    handler.addFilter(RateLimit())
    root = logging.getLogger("pipeline")
    root.handlers[:] = [handler]
    root.setLevel(settings.log_level.upper())
    root.propagate = False
