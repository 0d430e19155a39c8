"""Starts the nodes of a run, listens to them, and ends them: nothing is left behind."""

import math
import multiprocessing
import os
import signal
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from pipeline.config import PipelineConfig
from pipeline.errors import PipelineError, RunError
from pipeline.messages import Wire, check_wire
from pipeline.physics.sensor import Sensor
from pipeline.runtime.node import (
    Mode,
    NodeTask,
    control_endpoint,
    publish_endpoint,
    run_node,
    supervisor_topic,
)
from pipeline.transport import codec
from pipeline.transport.sockets import ControlReceiver, SubscriberSocket

DRAIN_S = 5.0
SILENCE_S = 0.05


class NodeFailure(PipelineError):
    """A node said why it could not go on; its own exit code is kept."""

    def __init__(self, line: str, exit_code: int) -> None:
        super().__init__(line)
        self.exit_code = exit_code


@dataclass
class _Child:
    name: str
    process: BaseProcess
    done: bool = False


class Supervisor:
    """A run of the flow in processes; use as a context manager.

    The nodes are spawned, never forked, and end when the stream does, when `stop` is called, or
    by themselves when this process is gone.
    """

    def __init__(
        self, config: PipelineConfig, mode: Mode, sensor: Sensor, shape: tuple[int, int]
    ) -> None:
        self._config, self._mode, self._sensor, self._shape = config, mode, sensor, shape
        self._children: list[_Child] = []
        self._drained_by = math.inf

    def __enter__(self) -> Self:
        self._folder = tempfile.TemporaryDirectory(prefix="irst-")  # made with mode 0700
        self._run_dir = Path(self._folder.name)
        self._control = ControlReceiver(control_endpoint(self._run_dir))
        self._subscriber = SubscriberSocket(
            publish_endpoint(self._run_dir), queue=0, topic=supervisor_topic(self._run_dir)
        )
        spawn = multiprocessing.get_context("spawn")
        for row, node in enumerate(self._config.topology):
            for replica in range(node.replicas):
                task = NodeTask(
                    config=self._config,
                    row=row,
                    replica=replica,
                    run_dir=self._run_dir,
                    mode=self._mode,
                    sensor=self._sensor,
                    shape=self._shape,
                    supervisor_pid=os.getpid(),
                )
                process = spawn.Process(target=run_node, args=(task,), name=task.name)
                process.start()
                self._children.append(_Child(task.name, process))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()
        deadline = time.monotonic() + (DRAIN_S if kind is None else 0.5)
        for child in self._children:
            child.process.join(max(0.0, deadline - time.monotonic()))
        for child in self._children:
            if child.process.is_alive():
                child.process.kill()
            child.process.join()
        self._subscriber.close()
        self._control.close()
        self._folder.cleanup()

    def stop(self) -> None:
        """Ask the source to end; what is under way is still published, then the nodes end."""
        self._drained_by = min(self._drained_by, time.monotonic() + DRAIN_S)
        for child in self._children[:1]:
            if child.process.is_alive() and child.process.pid:
                os.kill(child.process.pid, signal.SIGTERM)

    def messages(self) -> Iterator[tuple[dict[str, Any], Wire]]:
        """What the run publishes, each also as its checked model, to the end of the stream.

        Raises NodeFailure if a node could not go on, RunError if one died or if, once told to
        stop, the nodes did not drain in time.
        """
        while True:
            part = self._subscriber.receive(SILENCE_S)
            if part is None:
                self._watch()
                if time.monotonic() > self._drained_by:
                    raise RunError(f"the nodes did not drain within {DRAIN_S:g} s")
                continue
            message = codec.unpack_wire(part)
            yield message, check_wire(message)
            if message["schema"] == "irst.eos/1":
                self._watch()
                return

    def _watch(self) -> None:
        """Hear what the nodes have to say, and notice those that can say nothing any more."""
        dead = [c for c in self._children if not c.done and c.process.exitcode is not None]
        while (part := self._control.receive(0.0)) is not None:
            event = codec.unpack_wire(part)
            if event["event"] == "failed":
                raise NodeFailure(event["line"], event["exit_code"])
            if event["event"] == "done":
                for child in self._children:
                    child.done = child.done or child.name == event["node"]
        for child in dead:
            if not child.done:
                code = child.process.exitcode
                raise RunError(f"node {child.name} died (exit code {code}); the run cannot go on")
