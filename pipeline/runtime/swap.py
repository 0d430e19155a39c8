"""Another engine, or other settings of stages, in a run that goes on.

The new workers are made ready beside the old ones. Only when all of them are, they take over at
once, and the old ones finish what they hold: no frame is lost, none done twice. If one of them
cannot start, none takes over: the run goes on as it was.
"""

import contextlib
import logging
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from engines.errors import EngineError
from pipeline.config import PipelineConfig
from pipeline.errors import PipelineError, RunError
from pipeline.runtime.children import Child, Children
from pipeline.runtime.dispatch import Dispatcher
from pipeline.transport.codec import CodecError
from pipeline.transport.hub import FROM_NODE, HubSocket, Word, read_word

log = logging.getLogger(__name__)


def check_swap(old: PipelineConfig, new: PipelineConfig) -> None:
    """Raise PipelineError unless nothing but the engine and stages after the front differ."""
    fixed = {name: new.stages[name] for name in old.topology[0].stages if name in new.stages}
    same = replace(old, engine=new.engine, stages={**new.stages})
    if same != new or any(old.stages[name] != settings for name, settings in fixed.items()):
        raise PipelineError(
            "only the engine and the stages after the front node can change in a run; "
            "restart it for anything else"
        )


class Reloader:
    """Asks for another configuration, readies its workers, and lets them take over."""

    def __init__(self, children: Children, dispatcher: Dispatcher) -> None:
        self._children, self._dispatcher = children, dispatcher
        self._read: Callable[[], PipelineConfig] | None = None
        self._config: PipelineConfig | None = None
        self._new: Children | None = None

    def ask(self, read: Callable[[], PipelineConfig]) -> None:
        """Go on with what `read` gives, at the next opportunity."""
        self._read = read

    def hear(self, identity: bytes, parts: list[Any]) -> None:
        """A worker that has not taken over can only become ready, or say why not."""
        child = self._new.find(identity) if self._new is not None else None
        if child is None:
            return
        child.heard_s = time.monotonic()
        with contextlib.suppress(CodecError):
            word = read_word(parts[0] if parts else b"", FROM_NODE)
            child.ready |= word.kind == "ready"
            if word.kind in ("failed", "faulted"):
                child.last_words = word.text

    def look_after(self, running: PipelineConfig, hub: HubSocket) -> PipelineConfig | None:
        """Do what is due; the new configuration when it has taken over."""
        self._end_retired(hub)
        try:
            if self._read is not None and self._new is None:
                self._begin(running)
            if self._new is not None:
                self._new.watch()
                if all(child.ready for child in self._new.all):
                    return self._take_over(self._new)
        except (PipelineError, EngineError) as error:
            log.warning("the run goes on as it was: %s", error)
            self.close()
        return None

    def _begin(self, running: PipelineConfig) -> None:
        read, self._read = self._read, None
        self._config = read() if read is not None else running
        check_swap(running, self._config)
        self._new = Children(self._children.entry, self._children.settings, _cannot_start)
        for child in self._children.all[1:]:
            task = replace(child.task, config=self._config)
            self._new.add(child.name, child.row, task, vital=child.vital)
            self._new.all[-1].generation = child.generation + 1

    def _take_over(self, new: Children) -> PipelineConfig | None:
        front, *workers = self._children.all
        for child in workers:
            self._dispatcher.retire(child.identity)
        self._children.retired += workers
        self._children.all = [front, *new.all]
        for child in new.all:
            self._dispatcher.ready(child.identity, child.row)
        self._new = None
        log.warning("another configuration has taken over")
        return self._config

    def _end_retired(self, hub: HubSocket) -> None:
        for child in list(self._children.retired):
            if child.process is None or child.process.exitcode is not None:
                self._dispatcher.gone(child.identity)
                self._children.retired.remove(child)
            elif self._dispatcher.is_idle(child.identity):
                hub.send(child.identity, Word("stop"))

    def close(self) -> None:
        """End workers that have not taken over."""
        if self._new is not None:
            self._new.kill()
            self._new = None


def _cannot_start(child: Child) -> None:
    words = f": {child.last_words}" if child.last_words else ""
    raise RunError(f"node {child.name} cannot start{words}")
