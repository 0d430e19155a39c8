"""A node: a process that runs its stages between two sockets.

`front` reads the source and sends; nodes in between receive, process and send; `back` puts frames
back in order and publishes.
"""

import os
import threading
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any, Literal

from engines.errors import EngineError
from pipeline.component import Source
from pipeline.config import PipelineConfig, open_source
from pipeline.errors import PipelineError, RunError
from pipeline.messages import Dropped, Frame, Trace
from pipeline.physics.sensor import Sensor
from pipeline.runtime.account import Reorder
from pipeline.runtime.flow import build_flow
from pipeline.runtime.memory import keep_freed_memory
from pipeline.runtime.output import Output
from pipeline.runtime.topology import Node
from pipeline.transport import codec, sockets
from pipeline.transport.sockets import (
    ControlSender,
    CreditReceiver,
    CreditSender,
    Publisher,
)

Mode = Literal["replay", "live"]
ORPHAN_CHECK_S = 0.5


@dataclass(frozen=True)
class NodeTask:
    """All a node's process is told when it starts."""

    config: PipelineConfig
    row: int  # of the topology
    replica: int
    run_dir: Path
    mode: Mode
    sensor: Sensor
    shape: tuple[int, int]
    supervisor_pid: int

    @property
    def control_endpoint(self) -> str:
        """Where the supervisor listens."""
        return control_endpoint(self.run_dir)

    @property
    def node(self) -> Node:
        """This node's row of the table."""
        return self.config.topology[self.row]

    @property
    def name(self) -> str:
        """Node and replica, e.g. unmix.0."""
        return f"{self.node.name}.{self.replica}"

    def endpoint(self, row: int, replica: int) -> str:
        """Where a replica of a node sends from."""
        return f"ipc://{self.run_dir}/{self.config.topology[row].name}.{replica}"


def control_endpoint(run_dir: Path) -> str:
    """Where the supervisor of a run listens."""
    return f"ipc://{run_dir}/control"


def publish_endpoint(run_dir: Path) -> str:
    """Where the supervisor itself subscribes, whatever the run publishes to the world."""
    return f"ipc://{run_dir}/publish"


def supervisor_topic(run_dir: Path) -> bytes:
    """What only this run's supervisor subscribes to, so that its subscription is recognised."""
    return f"supervisor.{run_dir.name}".encode()


def run_node(task: NodeTask, stop: Event) -> None:
    """Run one node to the end of the stream; the entry point of its process.

    `stop` is set to end the source. Signals are the supervisor's affair: the node is started with
    them blocked, and ends by itself when its supervisor is gone.
    """
    keep_freed_memory()
    threading.Thread(target=_outlive_not, args=(task.supervisor_pid,), daemon=True).start()
    control = ControlSender(task.control_endpoint)
    try:
        if task.row == 0:
            _run_front(task, stop, control)
        elif task.row == len(task.config.topology) - 1:
            _run_back(task)
        else:
            _run_between(task)
        control.send({"event": "done", "node": task.name})
    except (PipelineError, EngineError) as error:
        control.send(_failure(task, str(error), error.exit_code))
    except Exception as error:  # noqa: BLE001, told to the supervisor, who ends the run
        line = f"node {task.name} failed: {type(error).__name__}: {error}"
        control.send(_failure(task, line, RunError.exit_code))
    finally:
        control.close()
        sockets.end()


def _failure(task: NodeTask, line: str, exit_code: int) -> dict[str, Any]:
    return {"event": "failed", "node": task.name, "exit_code": exit_code, "line": line}


def _outlive_not(supervisor_pid: int) -> None:
    """End this process when its supervisor is gone, whatever it is waiting for."""
    while os.getppid() == supervisor_pid:
        time.sleep(ORPHAN_CHECK_S)
    os._exit(1)


def _no_tick() -> None:
    """Nothing to do while waiting."""


def _sender(task: NodeTask) -> CreditSender:
    after = task.config.topology[task.row + 1]
    endpoint = task.endpoint(task.row, task.replica)
    return CreditSender(endpoint, receivers=after.replicas, queue=after.queue)


def _receiver(task: NodeTask) -> CreditReceiver:
    before = task.config.topology[task.row - 1]
    endpoints = [task.endpoint(task.row - 1, replica) for replica in range(before.replicas)]
    return CreditReceiver(endpoints, task.node.queue)


def _received(parts: list[Any], hop: str) -> tuple[Any, Trace]:
    message, trace, sent_ns = codec.decode(parts)
    stage_ns = trace.stage_ns | {hop: time.monotonic_ns() - sent_ns}
    return message, Trace(trace.t_ingest_ns, stage_ns)


def _hop(task: NodeTask) -> str:
    """Name of the hop into this node, e.g. front>unmix."""
    return f"{task.config.topology[task.row - 1].name}>{task.node.name}"


def _encoded(message: Any, trace: Trace) -> list[Any]:
    """A message as parts, or, if it cannot be sent, word that its frame is lost."""
    try:
        return codec.encode(message, trace, time.monotonic_ns())
    except codec.CodecError as error:
        lost = Dropped(message.info.seq, "transport", str(error))
        return codec.encode(lost, trace, time.monotonic_ns())


def _run_front(task: NodeTask, stop: Event, control: ControlSender) -> None:
    source = open_source(task.config)
    flow = build_flow(task.config, task.node.stages, task.sensor, task.shape)
    sender = _sender(task)
    frames_in = 0
    try:
        sender.wait_ready(_no_tick)
        if task.mode == "replay":
            stream = _paced(source, stop)
        else:
            stream = _shedding(source, sender, task.node.queue, stop)
        try:
            for item, t_ingest_ns in stream:
                frames_in += 1
                message, trace = flow.process(item, Trace(t_ingest_ns, {}))
                sender.send(_encoded(message, trace), _no_tick)
        finally:
            # A source that fails costs nothing of what came before: that is still published.
            control.send({"event": "draining", "node": task.name})
            sender.end(frames_in)
    finally:
        source.close()
        flow.close()
        sender.close()


Stream = Iterator[tuple[Frame | Dropped, int]]


def _paced(source: Source, stop: Event) -> Stream:
    """Every frame, when it is asked for."""
    for frame in source.frames():
        yield frame, time.monotonic_ns()
        if stop.is_set():
            return


def _shedding(source: Source, sender: CreditSender, queue: int, stop: Event) -> Stream:
    """Frames as the source has them; the oldest is shed, visibly, when `queue` are waiting."""
    waiting: deque[tuple[Frame | Dropped, int]] = deque()
    shed: deque[tuple[Dropped, int]] = deque()  # all older than what is waiting
    fresh = threading.Condition()
    failure: list[Exception] = []
    ended = threading.Event()

    def read() -> None:
        try:
            for frame in source.frames():
                with fresh:
                    if len(waiting) >= queue:
                        oldest, t_ingest_ns = waiting.popleft()
                        shed.append((_shed(oldest), t_ingest_ns))
                    waiting.append((frame, time.monotonic_ns()))
                    fresh.notify()
                if stop.is_set():
                    return
        except Exception as error:  # noqa: BLE001, raised below, in the node's own thread
            failure.append(error)
        finally:
            ended.set()

    threading.Thread(target=read, name="source", daemon=True).start()
    while waiting or shed or not (ended.is_set() or stop.is_set()):
        with fresh:
            if not (waiting or shed):
                fresh.wait(0.1)
        # A frame is taken only when it can go on at once, so that what waits can still be shed.
        if (waiting or shed) and sender.can_send(wait_ms=20):
            with fresh:
                entry = shed.popleft() if shed else waiting.popleft()
            yield entry
    if failure:
        raise failure[0]


def _shed(frame: Frame | Dropped) -> Dropped:
    if isinstance(frame, Dropped):
        return frame
    return Dropped(frame.info.seq, "source", "overload: oldest frame shed")


def _run_between(task: NodeTask) -> None:
    flow = build_flow(task.config, task.node.stages, task.sensor, task.shape)
    sender, receiver = _sender(task), _receiver(task)
    hop = _hop(task)
    try:
        sender.wait_ready(_no_tick)
        receiver.open()
        while (parts := receiver.receive(_no_tick)) is not None:
            message, trace = flow.process(*_received(parts, hop))
            sender.send(_encoded(message, trace), _no_tick)
        sender.end(receiver.frames_in)
    finally:
        flow.close()
        receiver.close()
        sender.close()


def _run_back(task: NodeTask) -> None:
    flow = build_flow(task.config, task.node.stages, task.sensor, task.shape)
    settings, sensor_id = task.config.publish, task.sensor.id
    lossless = task.mode == "replay"
    endpoints = [
        endpoint for endpoint in (publish_endpoint(task.run_dir), settings.endpoint) if endpoint
    ]
    publisher = Publisher(endpoints, sensor_id, settings.queue, lossless=lossless)
    receiver = _receiver(task)

    def send(message: dict[str, Any]) -> None:
        publisher.publish(message, _no_tick)

    output = Output(send, sensor_id, task.config.digest, settings.heartbeat_s)

    reorder = Reorder()
    hop = _hop(task)
    try:
        publisher.wait_subscribers(supervisor_topic(task.run_dir), settings.wait_for, _no_tick)
        output.start()
        receiver.open()
        while (parts := receiver.receive(output.beat)) is not None:
            message, trace = flow.process(*_received(parts, hop))
            for ready in reorder.push(message, trace):
                output.put(*ready)
            output.beat()
        for left in reorder.finish(receiver.frames_in):
            output.put(*left)
        output.end(receiver.frames_in)
    finally:
        flow.close()
        receiver.close()
        publisher.close()
