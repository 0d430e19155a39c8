"""A run of the flow in processes: hands frames from node to node, and publishes what comes out.

The supervisor is the one process a run cannot do without. Every other may die: what it held is in
the ledger here (`dispatch`), a new one is started (`children`), and order, totals and subscribers
do not suffer, since frames are put in order, counted and published here (`output`).
"""

import contextlib
import math
import multiprocessing
import time
from collections.abc import Callable
from dataclasses import replace
from multiprocessing import util
from types import TracebackType
from typing import Self

from pipeline.config import PipelineConfig
from pipeline.errors import PipelineError, RunError
from pipeline.physics.sensor import Sensor
from pipeline.runtime.children import Child, Children
from pipeline.runtime.dead_letters import DeadLetters
from pipeline.runtime.dispatch import Dispatcher
from pipeline.runtime.inlet import Intake
from pipeline.runtime.join import make_ledger
from pipeline.runtime.listener import Listener
from pipeline.runtime.node import run_node
from pipeline.runtime.outlet import Messages, Outlet
from pipeline.runtime.pins import pinned, pinned_sensor
from pipeline.runtime.rehearsal import settle
from pipeline.runtime.run_folder import run_folder, tend
from pipeline.runtime.signals import held_signals
from pipeline.runtime.swap import Reloader, hand_out
from pipeline.runtime.task import Mode, NodeTask, hub_endpoint
from pipeline.runtime.telemetry import Telemetry
from pipeline.runtime.vigil import Service, SourceVigil
from pipeline.transport.hub import HubSocket, Word
from pipeline.transport.publish import STALL_S, Publisher, Stuck
from pipeline.transport.security import ServerKeys
from pipeline.transport.sockets import remove_stale

DRAIN_S = 2.0
LISTEN_MS = 10
HOUSEKEEPING_S = 0.05
ABSENT_S = 0.5
END_S = 0.5
MAX_HEARD = 256


def _ledger(config: PipelineConfig, mode: Mode) -> Dispatcher:
    """For this topology; in replay nothing gets too old."""
    if mode == "replay":
        return make_ledger(config.topology, None, None)
    age_ms, wait_ms = config.supervisor.max_age_ms, config.supervisor.beside_ms
    return make_ledger(config.topology, round(age_ms * 1e6), round(wait_ms * 1e6))


class Supervisor:
    """Use as a context manager; every process is gone when the block is left."""

    def __init__(
        self, config: PipelineConfig, mode: Mode, sensor: Sensor, shape: tuple[int, int]
    ) -> None:
        self._config, self._mode, self._sensor, self._shape = config, mode, sensor, shape
        self._dispatcher = _ledger(config, mode)
        self._children = Children(run_node, config.supervisor, self._on_gone)
        self._intake = multiprocessing.get_context("spawn").RawValue(Intake)
        self._started = False
        self._stopping = False
        self._drained_by = math.inf
        self._next_housekeeping = 0.0
        self._failure: PipelineError | None = None  # after which the stream still ends
        self._dead_letters = DeadLetters(config.dead_letters, config.digest)
        self.telemetry = Telemetry()
        self.telemetry.expect(config.topology)
        self._reloader = Reloader(self._children, self._dispatcher, self.telemetry)
        self._vigil = SourceVigil(config.supervisor.silent_s)
        self._service = Service()
        self._closing = contextlib.ExitStack()

    # --- beginning and end -----------------------------------------------------------------

    def __enter__(self) -> Self:
        try:
            with held_signals():
                self._open()
        except BaseException as error:
            self._close(error)
            raise
        return self

    def _open(self) -> None:
        publish, closing = self._config.publish, self._closing
        # Should a second signal keep `__exit__` from it: before Python waits for the nodes to end.
        at_exit = util.Finalize(None, self._close, (SystemExit(),), exitpriority=1)
        closing.callback(at_exit.cancel)
        metrics = self._config.telemetry.metrics if self._mode == "live" else None
        closing.enter_context(self.telemetry.served(metrics))
        self._folder = folder = closing.enter_context(run_folder())
        self._hub = HubSocket(hub_endpoint(folder))
        closing.callback(self._hub.close)
        self._listener = Listener(
            self._hub, self._children, self._dispatcher, self._reloader, self._dead_letters
        )
        self._publisher = Publisher(
            [publish.endpoint] if publish.endpoint else [],
            self._sensor.id,
            publish.queue,
            lossless=self._mode == "replay",
            keys=ServerKeys.load(publish.keys) if publish.keys else None,
        )
        closing.callback(self._publisher.close)
        closing.push(self._abandon)
        self._outlet = Outlet(
            self._config, self._sensor.id, self._publisher, self._dead_letters,
            self.telemetry, self._children.be_patient,
        )  # fmt: skip
        for endpoint in self._config.front_endpoints:  # of a front that was killed
            closing.callback(remove_stale, endpoint)
        closing.callback(self._children.kill)
        closing.callback(self._reloader.close)
        running = pinned(self._config, self._sensor, folder, 0)
        sensor = pinned_sensor(self._config.sensor, self._sensor, self._shape, folder)
        for row, node in enumerate(self._config.topology):
            task = NodeTask(
                config=replace(running.config, sensor=sensor),
                originals=running.originals,
                row=row,
                run_dir=folder,
                mode=self._mode,
                sensor=self._sensor,
                shape=self._shape,
                intake=self._intake,
            )
            for replica in range(node.replicas):
                name = f"{node.name}.{replica}"
                vital = not node.beside or self._mode == "replay"
                self._children.add(name, row, task, vital=vital)
        self._children.watch()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        try:
            if kind is None:
                self._let_nodes_end()
        except BaseException as interrupted:
            self._close(interrupted)
            raise
        self._close(error)

    def _close(self, error: BaseException | None) -> None:
        with held_signals():
            self._closing.__exit__(type(error) if error else None, error, None)

    def _abandon(self, kind: type[BaseException] | None, *_: object) -> None:
        """What a run that has failed still has to say gets no more than a second."""
        if kind is not None:
            self._publisher.abandon()

    def _let_nodes_end(self) -> None:
        for child in self._children.all:
            child.done = True
            if not self._hub.send(child.identity, Word("stop")) and child.process:
                child.process.kill()
        self._children.join(END_S if self._mode == "live" else STALL_S)

    def stop(self) -> None:
        """Ask the source to end; what is under way is still published. Safe in a signal handler."""
        self._stopping = True

    def reload(self, read: Callable[[], PipelineConfig]) -> None:
        """Go on with what `read` gives, see `swap`. Safe in a signal handler."""
        self._reloader.ask(read)

    # --- the loop --------------------------------------------------------------------------

    def messages(self) -> Messages:
        """What the run publishes, to the end of the stream.

        Raises NodeFailure if a node could not go on, RunError if one died more often than allowed.
        """
        while not self._turn_or_end():
            yield from self._outlet.taken()
        yield from self._outlet.taken()
        self._publisher.expect_acknowledged()
        self._outlet.output.end(self._dispatcher.next_in)
        yield from self._outlet.taken()
        if failure := self._failure or self._listener.failure:
            raise failure
        if self._mode == "replay":
            self._publisher.wait_acknowledged(self._outlet.output.frames, STALL_S)

    def _turn_or_end(self) -> bool:
        """`_turn`; what ends a run that has started still ends its stream with totals."""
        try:
            return self._turn()
        except Stuck:
            raise
        except PipelineError as error:
            if not self._started:
                raise
            self._failure = error
            self._give_up("the run failed")
            self._outlet.put_all(self._dispatcher.outcomes)
            return True

    def _turn(self) -> bool:
        """Listen, keep house, hand out and publish once; True when the stream is over."""
        for number in range(MAX_HEARD):
            heard = self._hub.receive(0 if number else LISTEN_MS)
            if not number:
                self._dispatcher.expire(time.monotonic_ns())  # before a late answer is heard
            if heard is None:
                break
            self._listener.hear(*heard)
        if (now := time.monotonic()) >= self._next_housekeeping:
            if now > self._next_housekeeping + ABSENT_S:
                self._children.be_patient()
            self._keep_house(now)
        self._dispatcher.expire(time.monotonic_ns())
        for worker, job in self._dispatcher.assign():
            hand_out(self._hub, worker, job)  # not there: it is dead, and will be buried
        self._reloader.turn(self._dispatcher.outcomes, self._hub)
        self._outlet.put_all(self._dispatcher.outcomes)
        front = self._children.all[0]
        if self._started and front.ready and (room := self._dispatcher.grant()):
            self._hub.send(front.identity, Word("grant", room))
        return self._dispatcher.ended and not len(self._dispatcher)

    def _keep_house(self, now: float) -> None:
        self._next_housekeeping = now + HOUSEKEEPING_S
        tend(self._folder)
        self._service.beat(now)
        self._children.note_work(self._dispatcher.working_on())
        self._children.watch()
        if self._started and (taken := self._reloader.look_after(self._config, self._hub)):
            first, self._config = taken
            self._outlet.output.configure(first, self._config.digest)
        self._publisher.listen()
        self._outlet.output.beat()
        if not self._started:
            self._start_when_ready()
        elif self._mode == "live" and not self._stopping:
            self._watch_source(now)
        if self._stopping:
            self._drain_by(now)
        self.telemetry.observe(
            self._dispatcher, self._children, self._publisher, self._dead_letters, self._intake
        )

    def _watch_source(self, now: float) -> None:
        front = self._children.all[0]
        wanted = self._vigil.look(self._intake.taken, now, front_is_there=front.ready)
        if wanted and not front.done:
            self._children.replace(front, "gave no frame for supervisor.silent_s")

    def _start_when_ready(self) -> None:
        # One the run can do without, and that has died before it was ready, is not waited for.
        ready = all(
            child.ready or (not child.vital and child.number > 1) for child in self._children.all
        )
        if ready:
            self._listener.started = True
            self._service.say_once("READY=1")  # now, as who is waited for may wait for this
        if ready and self._publisher.subscribers >= self._config.publish.wait_for:
            if self._mode == "live":
                settle()
            self._started = True
            self._outlet.output.start()

    def _drain_by(self, now: float) -> None:
        """End the source, and, if what is under way takes too long, give that up by name."""
        front = self._children.all[0]
        if math.isinf(self._drained_by):
            self._service.say_once("STOPPING=1")
            self._drained_by = now + DRAIN_S
            if self._started and front.ready:
                self._hub.send(front.identity, Word("stop"))
                return
        if not (self._started and front.ready) or now > self._drained_by:
            self._give_up("not done when the run was told to end")

    def _give_up(self, reason: str) -> None:
        """End the stream; what is under way is lost by name."""
        self._dispatcher.lose(self._dispatcher.next_in, self._intake.taken, "front", reason)
        self._dispatcher.give_up_all(reason)
        self._dispatcher.end(self._dispatcher.next_in)

    def _on_gone(self, child: Child) -> None:
        """A process is dead; frames it alone knew of are lost by name."""
        if child.row > 0:
            self._dispatcher.gone(child.identity)
            return
        if self._mode == "replay":
            code = f"exit code {child.process.exitcode}" if child.process else ""
            how = ": ".join(filter(None, (code, child.last_words)))
            raise RunError(
                f"node {child.name} died ({how}); a replay without its source cannot go on"
            )
        self._intake.waiting = 0
        reason = "the front node died"
        self._dispatcher.lose(self._dispatcher.next_in, self._intake.taken, "front", reason)
