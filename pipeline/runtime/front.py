"""The front node: reads the source, and sends what its stages make of each frame."""

import time
from functools import partial
from typing import Any

from pipeline.component import Source
from pipeline.config import open_source
from pipeline.errors import RunError
from pipeline.messages import Dropped, Trace
from pipeline.runtime.answers import encoded, send, tell_failure
from pipeline.runtime.dead_letters import bounded
from pipeline.runtime.flow import Flow
from pipeline.runtime.inlet import Inlet, Shed
from pipeline.runtime.task import ALIVE_MS, NodeTask
from pipeline.transport.frames import FramePublisher
from pipeline.transport.hub import MAX_TEXT, NodeSocket, Word


def run_front(task: NodeTask, first: Flow, flow: Flow, socket: NodeSocket, wake: int) -> None:
    """Send frames, as many as are granted, until the source ends or the supervisor says stop.

    first: the stages whose frames the node beside is shown. wake: eventfd that ends `receive`.
    """
    live = task.mode == "live"
    node, settings = task.node, task.config.supervisor
    tap = FramePublisher(task.config.publish.frames if live else None, task.sensor)
    inlet = Inlet(
        partial(_same_source, task),
        node.queue,
        overflow=node.overflow if live else "block",
        max_age_ns=round(settings.max_age_ms * 1e6) if live else None,
        intake=task.intake,
        wake=wake,
    )
    granted = 0
    alive_at = 0.0
    try:
        socket.send(Word("ready"))
        while True:
            inlet.awake()
            tap.listen()
            item = inlet.take(granted > 0)
            if isinstance(item, Shed):
                _tell_shed(socket, item)
            elif item is not None:
                tap.publish(item.frame)
                frame, trace = first.process(item.frame, Trace(item.t_ingest_ns, {}))
                if task.config.beside:
                    _show(socket, frame, trace)
                granted -= send(socket, *flow.process(frame, trace))  # what is lost takes no room
            elif inlet.ended:
                break
            received = socket.receive(ALIVE_MS if item is None else 0)
            if received is not None and received[0].kind == "grant":
                granted += received[0].seq
                inlet.open()
            elif received is not None:
                inlet.stop()
            if (now := time.monotonic()) >= alive_at:
                socket.send(Word("alive"))
                alive_at = now + ALIVE_MS / 1e3
    finally:
        inlet.close()
        tap.close()
    if inlet.failure is not None:
        tell_failure(socket, inlet.failure, task.originals, fatal=True)
    socket.send(Word("end", task.intake.taken))


def _show(socket: NodeSocket, frame: Any, trace: Trace) -> None:
    """Send a frame for the node beside; one that cannot be sent is lost later, with its patches."""
    parts = frame if isinstance(frame, Dropped) else encoded(frame, trace)
    if not isinstance(parts, Dropped):
        socket.send(Word("frame", frame.info.seq, t_ns=trace.t_ingest_ns), parts)


def _same_source(task: NodeTask) -> Source:
    """Open the source; raises RunError if it does not give what this run is for."""
    source = open_source(task.config)
    (height, width), sensor = source.shape, source.sensor
    if (height, width, sensor) != (*task.shape, task.sensor):
        source.close()
        raise RunError(
            f"{task.config.source_kind} gives {width}×{height} of {sensor}, this run began with "
            f"{task.shape[1]}×{task.shape[0]} of {task.sensor}; set it as it was, or restart"
        )
    return source


def _tell_shed(socket: NodeSocket, shed: Shed) -> None:
    """Frames are lost, and what came in place of one of them goes to the dead letters."""
    kind = "malformed" if shed.malformed else "lost"
    word = Word(kind, shed.first, shed.end, stage="source", text=shed.reason[:MAX_TEXT])
    socket.send(word, bounded(shed.parts))
