"""A node: a process that runs its stages on what the supervisor gives it.

The front reads the source and sends what comes of its frames; every other node answers one frame
after another. All it holds may be lost with it: the supervisor's ledger knows what that was.
"""

import contextlib
import ctypes
import logging
import os
import shutil
import signal
import threading
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import cv2

from engines.errors import EngineError
from pipeline.component import Source
from pipeline.config import PipelineConfig, open_source
from pipeline.errors import PipelineError, RunError, told
from pipeline.messages import Dropped, Objects, Trace
from pipeline.physics.sensor import Sensor
from pipeline.runtime.batch import Batch
from pipeline.runtime.dead_letters import bounded
from pipeline.runtime.flow import Flow, Work, build_flow, shown_to_beside
from pipeline.runtime.inlet import Inlet, Shed
from pipeline.runtime.logs import configure_logs
from pipeline.runtime.memory import keep_freed_memory
from pipeline.runtime.rehearsal import rehearse
from pipeline.runtime.topology import Node
from pipeline.transport import codec, sockets
from pipeline.transport.frames import FramePublisher
from pipeline.transport.hub import MAX_TEXT, NodeSocket, Word

Mode = Literal["replay", "live"]
ORPHAN_CHECK_S = 0.5
ALIVE_MS = 100
LESS_URGENT = 10
PR_SET_PDEATHSIG = 1  # linux/prctl.h
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class NodeTask:
    """All a node's process is told when it starts."""

    config: PipelineConfig
    row: int  # of the topology
    run_dir: Path
    mode: Mode
    sensor: Sensor
    shape: tuple[int, int]
    intake: Any  # an `Intake` in shared memory
    identity: bytes = b""
    supervisor_pid: int = 0

    @property
    def node(self) -> Node:
        """This node's row of the table."""
        return self.config.topology[self.row]

    @property
    def hop(self) -> str:
        """What its messages pass on their way to it, e.g. "front>unmix"."""
        before = self.config.topology[0 if self.node.beside else self.row - 1]
        return f"{before.name}>{self.node.name}"

    def batch(self) -> Batch:
        """What this node does at once: in replay every frame by itself."""
        if self.mode == "replay":
            return Batch.single()
        max_age_ns = round(self.config.supervisor.max_age_ms * 1e6)
        return Batch.live(self.config.topology, self.row, max_age_ns)


def hub_endpoint(run_dir: Path) -> str:
    """Where the supervisor of a run listens."""
    return f"ipc://{run_dir}/hub"


def run_node(task: NodeTask) -> None:
    """Run one node until it is told to stop; the entry point of its process.

    Signals are the supervisor's affair: the node is started with them blocked, and ends by itself
    when its supervisor is gone.
    """
    configure_logs(task.config.telemetry)
    keep_freed_memory()
    cv2.setNumThreads(1)  # the other cores are the other nodes'
    if task.node.cores is not None:
        os.sched_setaffinity(0, task.node.cores)
    if task.node.beside:
        os.nice(LESS_URGENT)  # where cores are short, the flow goes first
    # A stopped process would not notice that its supervisor is gone: its death continues it.
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGCONT)
    threading.Thread(target=_outlive_not, args=(task,), daemon=True).start()
    wake = os.eventfd(0, os.EFD_NONBLOCK)
    socket = NodeSocket(hub_endpoint(task.run_dir), task.identity, wake)
    stages = task.node.stages
    cut = shown_to_beside(stages) if task.row == 0 and task.config.beside else 0
    try:
        first, flow = (
            build_flow(task.config, part, task.sensor, task.shape)
            for part in (stages[:cut], stages[cut:])
        )
        with contextlib.closing(first), contextlib.closing(flow):
            if task.mode == "live":
                _rehearse(task, flow)
            if task.row == 0:
                _run_front(task, first, flow, socket, wake)
            else:
                _run_worker(task, flow, socket)
    except Exception as error:
        log.debug("node %s", task.node.name, exc_info=True)
        _tell_failure(socket, error, fatal=isinstance(error, PipelineError | EngineError))
    finally:
        socket.close()
        sockets.end()


def _rehearse(task: NodeTask, flow: Flow) -> None:
    """In the front with stages of its own: a detector may remember the frames it has seen."""
    if task.row > 0:
        rehearse(flow, task.node.stages, task.sensor, task.shape)
        return
    again = build_flow(task.config, task.node.stages, task.sensor, task.shape)
    with contextlib.closing(again):
        rehearse(again, task.node.stages, task.sensor, task.shape)


def _outlive_not(task: NodeTask) -> None:
    """End this process when its supervisor is gone, whatever it is waiting for."""
    while os.getppid() == task.supervisor_pid:
        time.sleep(ORPHAN_CHECK_S)
    shutil.rmtree(task.run_dir, ignore_errors=True)
    sockets.remove_stale(task.config.publish.endpoint or "")
    for endpoint in task.config.front_endpoints:
        sockets.remove_stale(endpoint, ours=task.row == 0)
    os._exit(1)


def _encoded(message: Any, trace: Trace) -> list[Any] | Dropped:
    """A message as parts, or, if it cannot be sent, word that its frame is lost."""
    try:
        return codec.encode(message, trace, time.monotonic_ns())
    except codec.CodecError as error:
        return Dropped(message.info.seq, "transport", str(error))


def _send(socket: NodeSocket, message: Any, trace: Trace) -> bool:
    """Send what the stages made of a frame; False if that is only that it is lost."""
    parts = message if isinstance(message, Dropped) else _encoded(message, trace)
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


def _show(socket: NodeSocket, frame: Any, trace: Trace) -> None:
    """Send a frame for the node beside; one that cannot be sent is lost later, with its patches."""
    parts = frame if isinstance(frame, Dropped) else _encoded(frame, trace)
    if not isinstance(parts, Dropped):
        socket.send(Word("frame", frame.info.seq, t_ns=trace.t_ingest_ns), parts)


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


def _run_worker(task: NodeTask, flow: Flow, socket: NodeSocket) -> None:
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


def _do(flow: Flow, socket: NodeSocket, batch: list[Work]) -> None:
    for message, trace in flow.process_all(batch):
        _send(socket, message, trace)


def _run_front(task: NodeTask, first: Flow, flow: Flow, socket: NodeSocket, wake: int) -> None:
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
                granted -= _send(socket, *flow.process(frame, trace))  # what is lost takes no room
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
        _tell_failure(socket, inlet.failure, fatal=True)
    socket.send(Word("end", task.intake.taken))


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


def _tell_failure(socket: NodeSocket, error: Exception, *, fatal: bool) -> None:
    """Say why this process ends; what is fatal ends the run, else the node is started again."""
    if isinstance(error, PipelineError | EngineError):
        line, code = str(error), error.exit_code
    else:
        line, code = told(error), RunError.exit_code
    socket.send(Word("failed" if fatal else "faulted", text=line[:MAX_TEXT], code=code))
