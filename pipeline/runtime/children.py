"""The processes of a run: started by spawn, watched, started again with back-off, and ended."""

import logging
import multiprocessing
import os
import signal
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from multiprocessing import resource_tracker
from multiprocessing.process import BaseProcess
from typing import Any

from pipeline.errors import RunError
from pipeline.runtime.settings import SupervisorSettings
from pipeline.runtime.signals import ENDS, held_signals

FIRST_DELAY_S, MAX_DELAY_S = 0.25, 30.0
END_S = 2.0
log = logging.getLogger(__name__)


class BackOff:
    """How long to wait before the next start: at once, then twice as long each time."""

    def __init__(self, limit: int, within_s: float) -> None:
        self._limit, self._within_s = limit, within_s
        self._deaths: deque[float] = deque()

    def delay_s(self, now_s: float) -> float | None:
        """After a death now; None if there were more than the limit in the time."""
        while self._deaths and self._deaths[0] < now_s - self._within_s:
            self._deaths.popleft()
        self._deaths.append(now_s)
        count = len(self._deaths)
        if count > self._limit:
            return None
        return 0.0 if count == 1 else min(FIRST_DELAY_S * 2.0 ** (count - 2), MAX_DELAY_S)


@dataclass
class Child:
    """One replica of a node, through all its processes."""

    name: str
    row: int
    task: Any
    back_off: BackOff
    process: BaseProcess | None = None
    generation: int = 0  # of its configuration
    number: int = 0  # of its process
    ready: bool = False
    done: bool = False  # it was told to end, or said it has nothing more
    heard_s: float = 0.0
    holds: int | None = None  # the frame it is to answer next
    holds_since_s: float = 0.0
    start_at_s: float | None = 0.0  # when to start the next process; None: it runs
    last_words: str = ""
    in_vain: int = 0  # starts, one after another, that did not get as far as ready
    vital: bool = True  # the run cannot do without it

    @property
    def identity(self) -> bytes:
        """What its present process connects with; no two processes ever have the same."""
        return f"{self.name}#{self.generation}.{self.number}".encode()


@dataclass
class Children:
    """All nodes. `entry(task)` is what a process runs; `on_gone(child)` hears of each death."""

    entry: Callable[..., None]
    settings: SupervisorSettings
    on_gone: Callable[[Child], None]
    all: list[Child] = field(default_factory=list)
    retired: list[Child] = field(default_factory=list)  # finish what they hold
    restarts: Counter[str] = field(default_factory=Counter)  # by name

    def __post_init__(self) -> None:
        self._spawn = multiprocessing.get_context("spawn")
        resource_tracker.ensure_running()  # which would unblock the signals of the first start

    def add(self, name: str, row: int, task: Any, *, vital: bool = True) -> None:
        """A node to be started by `watch`, again and again if it is not vital."""
        back_off = BackOff(self.settings.restarts, self.settings.within_s)
        self.all.append(Child(name, row, task, back_off, vital=vital))

    def find(self, identity: bytes) -> Child | None:
        """The child whose present process this is."""
        known = self.all + self.retired
        return next((child for child in known if child.identity == identity), None)

    def knew(self, identity: bytes) -> bool:
        """True if this is, or was, a process of one of these nodes."""
        name = identity.partition(b"#")[0]
        return any(child.name.encode() == name for child in self.all + self.retired)

    def note_work(self, working_on: Mapping[bytes, int]) -> None:
        """Take in which frame each process is to answer next."""
        now_s = time.monotonic()
        for child in self.all + self.retired:
            if child.holds != (holds := working_on.get(child.identity)):
                child.holds, child.holds_since_s = holds, now_s

    def watch(self) -> None:
        """Start what is due; notice the dead and the stalled.

        Raises RunError for a node that died more often than allowed.
        """
        now_s = time.monotonic()
        for child in self.all:
            if child.start_at_s is not None:
                if now_s >= child.start_at_s and not child.done:
                    self._start(child, now_s)
                continue
            process = child.process
            if process is None or child.done:
                continue
            if process.exitcode is not None:
                self._bury(child, now_s, f"died (exit code {process.exitcode})")
            elif how := self.stalled(child):
                _end(process)
                self._bury(child, now_s, how)

    def stalled(self, child: Child) -> str:
        """In what way a process no longer does its work; empty if it does."""
        now_s = time.monotonic()
        patience_s = self.settings.stall_s if child.ready else self.settings.start_s
        if now_s - child.heard_s > patience_s:
            return f"was silent for {patience_s:g} s"
        if child.holds is not None and now_s - child.holds_since_s > self.settings.stall_s:
            return f"did not answer frame {child.holds} in {self.settings.stall_s:g} s"
        return ""

    def be_patient(self) -> None:
        """Count silence anew: it was this process that did not listen."""
        now_s = time.monotonic()
        for child in self.all + self.retired:
            child.heard_s = child.holds_since_s = now_s

    def replace(self, child: Child, how: str) -> None:
        """Start another process for one that is alive; it counts as no death."""
        if child.process is not None:
            _end(child.process)
        self.on_gone(child)
        log.warning("node %s %s; restarting", child.name, how)
        self.restarts[child.name] += 1
        child.start_at_s = time.monotonic()

    def _start(self, child: Child, now_s: float) -> None:
        try:
            with held_signals():
                self._launch(child, now_s)
        except OSError as error:  # the machine has no process or memory to give just now
            child.last_words = f"not started: {error.strerror}"
            self._bury(child, now_s, "is not there")

    def _launch(self, child: Child, now_s: float) -> None:
        """Start with signals blocked, which the node inherits.

        A Ctrl-C goes to all, but is the supervisor's to act on.
        """
        child.number += 1
        child.ready, child.heard_s, child.start_at_s, child.last_words = False, now_s, None, ""
        child.process = child.holds = None
        before = signal.pthread_sigmask(signal.SIG_BLOCK, ENDS)
        try:
            process = self._spawn.Process(
                target=self.entry,
                args=(replace(child.task, identity=child.identity, supervisor_pid=os.getpid()),),
                name=child.name,
                daemon=True,
            )
            process.start()
            child.process = process
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def _bury(self, child: Child, now_s: float, how: str) -> None:
        limit = self.settings.restarts
        child.in_vain = 0 if child.ready else child.in_vain + 1
        delay_s = child.back_off.delay_s(now_s)
        self.on_gone(child)
        cause = f": {child.last_words}" if child.last_words else ""
        allowed = f"{limit} restarts in {self.settings.within_s:g} s are allowed"
        if child.in_vain > limit:  # however long each took
            delay_s, allowed = None, f"{child.in_vain} starts were in vain"
        if delay_s is None and not child.vital:
            delay_s = MAX_DELAY_S
        if delay_s is None:
            raise RunError(f"node {child.name} {how}{cause}; {allowed}")
        log.warning("node %s %s%s; restarting in %.2g s", child.name, how, cause, delay_s)
        self.restarts[child.name] += 1
        child.start_at_s = now_s + delay_s

    def join(self, timeout_s: float) -> None:
        """Give the processes time to end by themselves."""
        deadline = time.monotonic() + timeout_s
        for child in self.all + self.retired:
            if child.process is not None:
                child.process.join(max(0.0, deadline - time.monotonic()))

    def kill(self) -> None:
        """End what still runs."""
        known = self.all + self.retired
        processes = [child.process for child in known if child.process is not None]
        for process in processes:
            process.kill()
        for process in processes:
            process.join()


def _end(process: BaseProcess) -> None:
    """End a process, also one that is stopped."""
    process.kill()
    process.join(END_S)
