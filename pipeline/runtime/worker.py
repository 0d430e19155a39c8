"""A node that answers one frame after another."""

import time
from typing import Any

from pipeline.messages import Dropped, Objects, Trace
from pipeline.runtime.answers import send
from pipeline.runtime.flow import Flow, Work
from pipeline.runtime.task import ALIVE_MS, NodeTask
from pipeline.transport import codec
from pipeline.transport.hub import MAX_TEXT, NodeSocket, Word


def run_worker(task: NodeTask, flow: Flow, socket: NodeSocket) -> None:
    """Answer the frames that are handed out, several at once if that is due, until told to stop."""
    beside: tuple[int, tuple[Any, Trace]] | None = None
    batch = task.batch()
    socket.send(Word("ready"))
    while True:
        received = socket.receive(batch.wait_ms(time.monotonic_ns(), ALIVE_MS))
        if received is not None:
            word, parts = received
            if word.kind == "stop":
                return
            if word.kind == "beside":
                beside = word.seq, _said_beside(word, parts)
            if word.kind == "work" and (work := _work(task, socket, word, parts, beside)):
                if word.code:  # processes have died on it: by itself
                    _do(flow, socket, batch.take())
                    _do(flow, socket, [work])
                else:
                    batch.add(work, time.monotonic_ns())
        elif not batch.is_due(time.monotonic_ns()):
            socket.send(Word("alive"))
        if batch.is_due(time.monotonic_ns()):
            _do(flow, socket, batch.take())


def _work(
    task: NodeTask,
    socket: NodeSocket,
    word: Word,
    parts: list[Any],
    beside: tuple[int, tuple[Any, Trace]] | None,
) -> Work | None:
    """What a word of work asks for; None, once that is said, if it cannot be read."""
    try:
        message, trace, sent_ns = codec.decode(parts)
    except codec.CodecError as error:
        socket.send(Word("malformed", word.seq, text=str(error)[:MAX_TEXT]))
        return None
    if isinstance(message, Dropped) or message.info.seq != word.seq:
        socket.send(Word("malformed", word.seq, text="not the frame it is said to be"))
        return None
    trace = Trace(trace.t_ingest_ns, trace.stage_ns | {task.hop: time.monotonic_ns() - sent_ns})
    said = beside[1] if beside is not None and beside[0] == word.seq else None
    return Work(message, trace, said)


def _said_beside(word: Word, parts: list[Any]) -> tuple[Any, Trace]:
    """What the node beside has made of a frame, or why it says nothing."""
    reason = word.text
    if parts:
        try:
            message, trace, _ = codec.decode(parts)
            if isinstance(message, Objects) and message.info.seq == word.seq:
                return message, trace
            reason = "malformed message: not of this frame"
        except codec.CodecError as error:
            reason = f"malformed message: {error}"[:MAX_TEXT]
    return Dropped(word.seq, "transport", reason), Trace(0, {})


def _do(flow: Flow, socket: NodeSocket, batch: list[Work]) -> None:
    for message, trace in flow.process_all(batch):
        send(socket, message, trace)
