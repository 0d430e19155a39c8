"""Another engine, or other settings of stages, in a run that goes on.

The new workers are made ready beside the old ones and tried on live frames (`trial`). If they do as
well, they take over at one frame: those begun are finished by the old workers in every node, all
after it are done by the new ones; no frame is lost, none done twice. If they do not, or cannot
start, the run goes on as it was.
"""

import contextlib
import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

from engines.errors import EngineError
from pipeline.config import PipelineConfig
from pipeline.errors import PipelineError, RunError
from pipeline.messages import Dropped
from pipeline.runtime.children import Child, Children
from pipeline.runtime.dispatch import Dispatcher, Job
from pipeline.runtime.join import make_ledger
from pipeline.runtime.parity import Refused
from pipeline.runtime.pins import pinned, unpin
from pipeline.runtime.telemetry import Telemetry
from pipeline.runtime.trial import PATIENCE_S, Trial
from pipeline.transport.hub import HubSocket, Word

log = logging.getLogger(__name__)


def check_swap(old: PipelineConfig, new: PipelineConfig) -> None:
    """Raise PipelineError unless nothing but the engine and stages after the front differ."""
    front = old.topology[0].stages
    if "unmix" in front:
        raise PipelineError(
            "the engine runs in the front node, which cannot change in a run; restart it"
        )
    fixed = {name: new.stages[name] for name in front if name in new.stages}
    same = replace(old, engine=new.engine, stages={**new.stages}, swap=new.swap)
    if same != new or any(old.stages[name] != settings for name, settings in fixed.items()):
        raise PipelineError(
            "only the engine and the stages after the front node can change in a run; "
            "restart it for anything else"
        )


def hand_out(hub: HubSocket, worker: bytes, job: Job) -> None:
    """Send a worker a job, after what the node beside the flow says of it."""
    if isinstance(job.beside, Dropped):
        hub.send(worker, Word("beside", job.seq, text=job.beside.reason))
    elif job.beside is not None:
        hub.send(worker, Word("beside", job.seq), job.beside)
    hub.send(worker, Word("work", job.seq, t_ns=job.t_ingest_ns, code=job.deaths), job.parts)


class Reloader:
    """Asks for another configuration, readies and tries its workers, and lets them take over."""

    def __init__(self, children: Children, dispatcher: Dispatcher, telemetry: Telemetry) -> None:
        self._children, self._dispatcher, self._telemetry = children, dispatcher, telemetry
        self._read: Callable[[], PipelineConfig] | None = None
        self._config: PipelineConfig | None = None
        self._generation = 0  # of the workers that run
        self._new: Children | None = None
        self._trial: Trial | None = None

    def ask(self, read: Callable[[], PipelineConfig]) -> None:
        """Go on with what `read` gives, at the next opportunity."""
        self._read = read

    # --- the flow, while there is a trial ---------------------------------------------------

    def find(self, identity: bytes) -> Child | None:
        """The worker, of those that have not taken over, whose process this is."""
        return self._new.find(identity) if self._new is not None else None

    def hear(self, child: Child, word: Word, parts: list[Any]) -> None:
        """What a worker says that has not taken over."""
        child.ready |= word.kind == "ready"
        if word.kind in ("failed", "faulted"):
            child.last_words = word.text
        elif self._trial is not None and word.kind in ("result", "lost", "malformed"):
            with self._refusing():
                self._trial.hear(child.identity, word, parts)

    def show(self, seq: int, t_ingest_ns: int, parts: list[Any]) -> None:
        """The front shows a frame to the node beside the flow; its patches come after it."""
        if self._trial is not None:
            self._trial.show(seq, t_ingest_ns, parts)

    def offer(self, seq: int, t_ingest_ns: int, parts: list[Any]) -> None:
        """A frame has come from the front."""
        if self._trial is not None:
            with self._refusing():
                self._trial.offer(seq, t_ingest_ns, parts)

    def turn(self, outcomes: Iterable[Job | Dropped], hub: HubSocket) -> None:
        """See what became of frames in the run, and hand out what is under trial."""
        if self._trial is None:
            return
        with self._refusing():
            for outcome in outcomes:
                self._trial.saw(outcome)
            self._trial.compare()
        for worker, job in self._trial.assign() if self._trial is not None else ():
            hand_out(hub, worker, job)

    # --- now and then -----------------------------------------------------------------------

    def look_after(
        self, running: PipelineConfig, hub: HubSocket
    ) -> tuple[int, PipelineConfig] | None:
        """Do what is due; the new configuration and its first frame when it has taken over."""
        self._end_retired(hub)
        with self._refusing():
            if self._read is not None and self._new is None and not self._children.retired:
                self._begin(running)
            if self._new is not None:
                self._new.watch()
                if self._has_passed(running, self._new):
                    return self._take_over(self._new)
        return None

    def _begin(self, running: PipelineConfig) -> None:
        read, self._read = self._read, None
        self._config = read() if read is not None else running
        check_swap(running, self._config)
        front, *workers = self._children.all
        generation = self._generation + 1
        copies = pinned(self._config, front.task.sensor, front.task.run_dir, generation)
        config = replace(copies.config, sensor=front.task.config.sensor)
        self._new = Children(self._children.entry, self._children.settings, _cannot_start)
        for child in workers:
            task = replace(child.task, config=config, originals=copies.originals)
            self._new.add(child.name, child.row, task, vital=child.vital)
            self._new.all[-1].generation = generation

    def _has_passed(self, running: PipelineConfig, new: Children) -> bool:
        if not all(child.ready for child in new.all) or self._config is None:
            return False
        if self._config.swap.frames == 0:
            return True
        if self._trial is None:
            wait_ns = round(running.supervisor.beside_ms * 1e6)
            self._trial = Trial(
                self._config.swap,
                running.topology,
                make_ledger(running.topology, self._dispatcher.max_age_ns, wait_ns),
                patience_s=PATIENCE_S + wait_ns / 1e9,
                same_targets=self._config.stages == running.stages,
            )
            for child in new.all:
                self._trial.ready(child.identity, child.row)
        return self._trial.passed

    def _take_over(self, new: Children) -> tuple[int, PipelineConfig] | None:
        first = self._dispatcher.supersede()
        front, *workers = self._children.all
        self._children.retired += workers
        self._children.all = [front, *new.all]
        for child in new.all:
            self._dispatcher.ready(child.identity, child.row)
        unpin(front.task.run_dir, self._generation)
        self._generation += 1
        self._new = self._trial = None
        self._telemetry.count_swap(None)
        log.warning("another configuration has taken over from frame %d on", first)
        return None if self._config is None else (first, self._config)

    def _end_retired(self, hub: HubSocket) -> None:
        for child in list(self._children.retired):
            if child.process is None or child.process.exitcode is not None:
                self._dispatcher.gone(child.identity)
                self._children.retired.remove(child)
            elif self._children.stalled(child):
                child.process.kill()
            elif not self._dispatcher.superseding:
                hub.send(child.identity, Word("stop"))

    @contextlib.contextmanager
    def _refusing(self) -> Iterator[None]:
        """What goes wrong with new workers ends them, and nothing else."""
        try:
            yield
        except (PipelineError, EngineError) as error:
            self.close()
            self._telemetry.count_swap(error.figure if isinstance(error, Refused) else "start")
            log.warning("the run goes on as it was: %s", error)

    def close(self) -> None:
        """End workers that have not taken over."""
        if self._new is not None:
            self._new.kill()
            front = self._children.all[0]
            unpin(front.task.run_dir, self._generation + 1)
        self._new = self._trial = None


def _cannot_start(child: Child) -> None:
    words = f": {child.last_words}" if child.last_words else ""
    raise RunError(f"node {child.name} cannot start{words}")
