"""What a node tells the supervisor: what became of a frame, or of itself."""

import time
from typing import Any

from engines.errors import EngineError
from pipeline.errors import PipelineError, RunError, told
from pipeline.messages import Dropped, Trace
from pipeline.runtime.pins import told_of_originals
from pipeline.transport import codec
from pipeline.transport.hub import MAX_TEXT, NodeSocket, Word


def encoded(message: Any, trace: Trace) -> list[Any] | Dropped:
    """A message as parts, or, if it cannot be sent, word that its frame is lost."""
    try:
        return codec.encode(message, trace, time.monotonic_ns())
    except codec.CodecError as error:
        return Dropped(message.info.seq, "transport", str(error))


def send(socket: NodeSocket, message: Any, trace: Trace) -> bool:
    """Send what the stages made of a frame; False if that is only that it is lost."""
    parts = message if isinstance(message, Dropped) else encoded(message, trace)
    if isinstance(parts, Dropped):
        lost = Word(
            "lost",
            parts.seq,
            parts.seq + 1,
            stage=parts.stage[:MAX_TEXT],
            text=parts.reason[:MAX_TEXT],
        )
        socket.send(lost)
        return False
    socket.send(Word("result", message.info.seq, t_ns=trace.t_ingest_ns), parts)
    return True


def tell_failure(
    socket: NodeSocket, error: Exception, originals: dict[str, str], *, fatal: bool
) -> None:
    """Say why this process ends; what is fatal ends a run that has not started.

    originals: see `Pinned`.
    """
    if isinstance(error, PipelineError | EngineError):
        line, code = str(error), error.exit_code
    else:
        line, code = told(error), RunError.exit_code
    line = told_of_originals(line, originals)[:MAX_TEXT]
    socket.send(Word("failed" if fatal else "faulted", text=line, code=code))
