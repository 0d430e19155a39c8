"""A node: a process that runs its stages between two sockets.

`front` reads the source and sends; nodes in between receive, process and send; `back` puts frames
back in order and publishes. All wait in one way: a `tick` that notices a vanished supervisor.
"""

import os
import signal
import threading
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Literal

from engines.errors import EngineError
from pipeline.component import Source, component
from pipeline.config import PipelineConfig
from pipeline.errors import PipelineError
from pipeline.messages import Dropped, Frame, Trace
from pipeline.physics.sensor import Sensor
from pipeline.runtime.account import Reorder
from pipeline.runtime.flow import build_flow
from pipeline.runtime.output import Output
from pipeline.runtime.topology import Node
from pipeline.transport import codec
from pipeline.transport.sockets import (
    ControlSender,
    CreditReceiver,
    CreditSender,
    Publisher,
)

Mode = Literal["replay", "live"]


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


class Stopped(Exception):
    """The node was told to stop, or its supervisor is gone."""


def run_node(task: NodeTask) -> None:
    """Run one node to the end of the stream; the entry point of its process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the supervisor decides
    control = ControlSender(control_endpoint(task.run_dir))

    def tick() -> None:
        if os.getppid() != task.supervisor_pid:
            raise Stopped

    try:
        last = task.row == len(task.config.topology) - 1
        run = _run_front if task.row == 0 else _run_back if last else _run_between
        run(task, control, tick)
        control.send({"event": "done", "node": task.name})
    except Stopped:
        pass
    except (PipelineError, EngineError) as error:
        event = {"event": "failed", "node": task.name, "exit_code": error.exit_code}
        control.send(event | {"line": str(error)})
    finally:
        control.close()


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


def _run_front(task: NodeTask, control: ControlSender, tick: Any) -> None:
    source: Source = component("source", task.config.source_kind).build(
        task.config.source, task.config.sensor.overrides()
    )
    flow = build_flow(task.config, task.node.stages, task.sensor, task.shape)
    sender = _sender(task)
    stop = threading.Event()

    def stop_source(_signal: int, _frame: FrameType | None) -> None:
        stop.set()

    signal.signal(signal.SIGTERM, stop_source)
    try:
        sender.wait_ready(tick)
        control.send({"event": "started", "node": task.name})
        if task.mode == "replay":
            stream = _paced(source, stop)
        else:
            stream = _shedding(source, sender, task.node.queue, stop, tick)
        frames_in = 0
        try:
            for item, t_ingest_ns in stream:
                frames_in += 1
                message, trace = flow.process(item, Trace(t_ingest_ns, {}))
                sender.send(codec.encode(message, trace, time.monotonic_ns()), tick)
        finally:
            sender.end(frames_in)  # a source that fails costs nothing of what came before
    finally:
        source.close()
        flow.close()
        sender.close()


Stream = Iterator[tuple[Frame | Dropped, int]]


def _paced(source: Source, stop: threading.Event) -> Stream:
    """Every frame, when it is asked for."""
    for frame in source.frames():
        yield frame, time.monotonic_ns()
        if stop.is_set():
            return


def _shedding(
    source: Source, sender: CreditSender, queue: int, stop: threading.Event, tick: Any
) -> Stream:
    """Frames as the source has them; the oldest is dropped, visibly, when `queue` are waiting."""
    waiting: deque[tuple[Frame | Dropped, int]] = deque()
    fresh = threading.Condition()
    failure: list[PipelineError] = []
    ended = threading.Event()

    def read() -> None:
        try:
            for frame in source.frames():
                with fresh:
                    held = [row for row, (item, _) in enumerate(waiting) if isinstance(item, Frame)]
                    if len(held) >= queue:
                        item, t_ingest_ns = waiting[held[0]]
                        assert isinstance(item, Frame)  # noqa: S101, by the line above
                        lost = Dropped(item.info.seq, "source", "overload: oldest frame shed")
                        waiting[held[0]] = (lost, t_ingest_ns)
                    waiting.append((frame, time.monotonic_ns()))
                    fresh.notify()
                if stop.is_set():
                    return
        except PipelineError as error:
            failure.append(error)
        finally:
            ended.set()

    reader = threading.Thread(target=read, name="source", daemon=True)
    reader.start()
    while waiting or not (ended.is_set() or stop.is_set()):
        tick()
        with fresh:
            if not waiting:
                fresh.wait(0.1)
        # A frame is taken only when it can go on at once, so that what waits can still be shed.
        if waiting and sender.can_send(wait_ms=20):
            with fresh:
                entry = waiting.popleft()
            yield entry
    if failure:
        raise failure[0]


def _run_between(task: NodeTask, control: ControlSender, tick: Any) -> None:
    flow = build_flow(task.config, task.node.stages, task.sensor, task.shape)
    sender, receiver = _sender(task), _receiver(task)
    hop = _hop(task)
    try:
        sender.wait_ready(tick)
        receiver.open()
        control.send({"event": "started", "node": task.name})
        while (parts := receiver.receive(tick)) is not None:
            message, trace = flow.process(*_received(parts, hop))
            sender.send(codec.encode(message, trace, time.monotonic_ns()), tick)
        sender.end(receiver.frames_in)
    finally:
        flow.close()
        receiver.close()
        sender.close()


def _run_back(task: NodeTask, control: ControlSender, tick: Any) -> None:
    flow = build_flow(task.config, task.node.stages, task.sensor, task.shape)
    settings, sensor_id = task.config.publish, task.sensor.id
    lossless = task.mode == "replay"
    endpoints = [
        endpoint for endpoint in (publish_endpoint(task.run_dir), settings.endpoint) if endpoint
    ]
    publisher = Publisher(endpoints, sensor_id, settings.queue, lossless=lossless)
    receiver = _receiver(task)

    def send(message: dict[str, Any]) -> None:
        publisher.publish(message, tick)

    output = Output(send, sensor_id, task.config.digest, settings.heartbeat_s)

    def idle() -> None:
        tick()
        output.beat()

    reorder = Reorder()
    hop = _hop(task)
    try:
        publisher.wait_subscribers(supervisor_topic(task.run_dir), settings.wait_for, tick)
        output.start()
        receiver.open()
        control.send({"event": "started", "node": task.name})
        while (parts := receiver.receive(idle)) is not None:
            message, trace = flow.process(*_received(parts, hop))
            for ready in reorder.push(message, trace):
                output.put(*ready)
            idle()
        for left in reorder.finish(receiver.frames_in):
            output.put(*left)
        output.end(receiver.frames_in)
    finally:
        flow.close()
        receiver.close()
        publisher.close()
