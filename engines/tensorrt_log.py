"""What TensorRT says of itself, kept for the line that refuses an engine.

For both libraries, `tensorrt` and `tensorrt_rtx`: their Python interface is the same but for names.
"""

import logging
import re
from collections import deque
from functools import cache
from importlib import import_module
from typing import Any, Literal

from engines.errors import EngineError

Library = Literal["tensorrt", "tensorrt_rtx"]

log = logging.getLogger(__name__)


def library(name: Library) -> Any:
    """The module; raises EngineError where it is not installed."""
    try:
        return import_module(name)
    except ImportError as error:
        raise EngineError(
            f"{name} is not installed ({error}); `pip install {name}` on this machine"
        ) from error


@cache
def logger(trt: Any) -> Any:
    """The process's logger of this library, with `said`, its latest errors.

    There is one, since TensorRT tells all to the first logger it was given.
    """
    serious = (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR)

    class Collector(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.said: deque[str] = deque(maxlen=4)

        def log(self, severity: Any, message: str) -> None:
            if severity in serious:
                self.said.append(_shortened(message))
            elif severity == trt.ILogger.WARNING:
                log.info("%s: %s", trt.__name__, message.strip())

    return Collector()


def told(trt: Any) -> str:
    """The first of the errors since the last call, as words for a line; then they are forgotten."""
    said = logger(trt).said
    first = said[0] if said else "it does not say why"
    said.clear()
    return first


def _shortened(message: str) -> str:
    """Without the places in TensorRT's own source, on one line."""
    return " ".join(re.sub(r"\(?In \w+ at \S+", "(", message).split()).replace("( (", "(")
