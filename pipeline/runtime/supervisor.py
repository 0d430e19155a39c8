"""Starts the nodes of a run, listens to them, and ends them: nothing is left behind."""

import contextlib
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
from pipeline.transport.sockets import STALL_S, ControlReceiver, SubscriberSocket

DRAIN_S = 5.0
SILENCE_S = 0.05
CAUSE_S = 0.3


class NodeFailure(PipelineError):
    """A node said why it could not go on; its own exit code is kept."""

    def __init__(self, line: str, exit_code: int) -> None:
        super().__init__(line)
        self.exit_code = exit_code


@dataclass
class _Child:
    name: str
    process: BaseProcess
    draining: bool = False  # it has ended the stream; what is under way will still come
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
        self._spawn = multiprocessing.get_context("spawn")
        self._stop = self._spawn.Event()
        self._children: list[_Child] = []
        self._drained_by = math.inf
        self._failure: NodeFailure | None = None  # of a node after which the stream still ends

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="irst-"))  # mode 0700
            run_dir = Path(folder)
            self._control = ControlReceiver(control_endpoint(run_dir))
            stack.callback(self._control.close)
            self._subscriber = SubscriberSocket(
                publish_endpoint(run_dir), queue=0, topic=supervisor_topic(run_dir)
            )
            stack.callback(self._subscriber.close)
            stack.callback(self._kill)
            self._start(run_dir)
            self._cleanup = stack.pop_all()
        return self

    def _start(self, run_dir: Path) -> None:
        """Start every node with signals blocked: a Ctrl-C goes to all, but is ours to act on.

        Nodes inherit the mask; a signal that comes to us meanwhile waits until they are started.
        """
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
        try:
            for row, node in enumerate(self._config.topology):
                for replica in range(node.replicas):
                    task = NodeTask(
                        config=self._config,
                        row=row,
                        replica=replica,
                        run_dir=run_dir,
                        mode=self._mode,
                        sensor=self._sensor,
                        shape=self._shape,
                        supervisor_pid=os.getpid(),
                    )
                    process = self._spawn.Process(
                        target=run_node, args=(task, self._stop), name=task.name, daemon=True
                    )
                    process.start()
                    self._children.append(_Child(task.name, process))
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """After a good end, give the nodes time to hand their last messages to subscribers."""
        with self._cleanup:
            if kind is None:
                deadline = time.monotonic() + (STALL_S if self._mode == "replay" else DRAIN_S)
                for child in self._children:
                    child.process.join(max(0.0, deadline - time.monotonic()))

    def _kill(self) -> None:
        """End what still runs."""
        for child in self._children:
            child.process.kill()
        for child in self._children:
            child.process.join()

    def stop(self) -> None:
        """Ask the source to end; what is under way is still published, then the nodes end."""
        self._drained_by = min(self._drained_by, time.monotonic() + DRAIN_S)
        self._stop.set()

    def messages(self) -> Iterator[tuple[dict[str, Any], Wire]]:
        """What the run publishes, each also as its checked model, to the end of the stream.

        Raises NodeFailure if a node could not go on, RunError if one died or if, once told to
        stop, the nodes did not drain in time.
        """
        while True:
            part = self._subscriber.receive(SILENCE_S)
            message = {} if part is None else codec.unpack_wire(part)
            if message:
                yield message, check_wire(message)
            if message.get("schema") == "irst.eos/1":
                self._hear_everyone()
                return
            if message.get("schema") in (None, "irst.heartbeat/1"):
                self._watch()
            if time.monotonic() > self._drained_by:
                raise self._failure or RunError(f"the nodes did not drain within {DRAIN_S:g} s")

    def _hear_everyone(self) -> None:
        """Wait until each node has said that all went well; raises what one says instead."""
        deadline = time.monotonic() + DRAIN_S
        while not all(child.done for child in self._children):
            self._watch()
            if time.monotonic() > deadline:
                late = ", ".join(child.name for child in self._children if not child.done)
                raise RunError(f"the stream ended, but not node {late}")
            time.sleep(0.005)
        if self._failure is not None:
            raise self._failure

    def _watch(self) -> None:
        """Hear what the nodes have to say, and notice those that can say nothing any more."""
        dead = self._silent_dead()
        while (part := self._control.receive(0.0)) is not None:
            event = codec.unpack_wire(part)
            child = next(child for child in self._children if child.name == event["node"])
            child.draining |= event["event"] == "draining"
            child.done |= event["event"] != "draining"
            if event["event"] == "failed":
                failure = NodeFailure(event["line"], event["exit_code"])
                if not child.draining:
                    self._raise_dead(within_s=CAUSE_S)  # whose death this one may have failed of
                    raise failure
                self._failure = failure
                self._drained_by = min(self._drained_by, time.monotonic() + STALL_S)
        for child in dead:
            if not child.done:
                raise _died(child)

    def _silent_dead(self) -> list[_Child]:
        """Nodes that ended without a word."""
        return [c for c in self._children if not c.done and c.process.exitcode is not None]

    def _raise_dead(self, within_s: float) -> None:
        """Raise if a node is found dead within that time."""
        deadline = time.monotonic() + within_s
        while time.monotonic() < deadline:
            for child in self._silent_dead():
                raise _died(child)
            time.sleep(0.005)


def _died(child: _Child) -> RunError:
    code = child.process.exitcode
    return RunError(f"node {child.name} died (exit code {code}); the run cannot go on")
