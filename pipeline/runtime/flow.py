"""The stages of the flow, run by direct call: the one place where a message meets a stage.

A node runs its part of the flow, in-process replay all of it, both through `Flow`; so the same
frame gives the same targets, bit for bit, however the flow is cut into processes.
"""

import logging
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from pipeline.component import Stage, component
from pipeline.config import PipelineConfig
from pipeline.messages import Dropped, Frame, Seen, Trace
from pipeline.physics.sensor import Sensor
from pipeline.runtime.topology import stage_types
from pipeline.sensing import stage_context

log = logging.getLogger(__name__)

NEW = Trace(0, {})


class Work(NamedTuple):
    """A message to be processed.

    beside: `Objects`, or `Dropped`, that a node beside the flow made of its frame, for the stage
    that takes them.
    """

    message: Any
    trace: Trace
    beside: tuple[Any, Trace] | None = None


class Flow:
    """Consecutive stages; `clock` gives monotonic nanoseconds."""

    def __init__(
        self, stages: Sequence[tuple[str, Stage[Any, Any]]], clock: Callable[[], int]
    ) -> None:
        self._stages = stages
        self._clock = clock
        self._joins = {name for name, stage in stages if _takes(stage) is Seen}

    def process(
        self, message: Any, trace: Trace, beside: tuple[Any, Trace] | None = None
    ) -> tuple[Any, Trace]:
        """The message after all stages, or `Dropped` if one could not process it.

        What was dropped before comes through as it is.
        """
        (done,) = self.process_all([Work(message, trace, beside)])
        return done

    def process_all(self, batch: Sequence[Work]) -> list[tuple[Any, Trace]]:
        """`process` of several frames' messages; stages do together what they can.

        What a stage takes for all of them counts for each: so long it was there.
        """
        messages = [work.message for work in batch]
        stage_ns = [dict(work.trace.stage_ns) for work in batch]
        for name, stage in self._stages:
            going = [n for n, message in enumerate(messages) if not isinstance(message, Dropped)]
            if not going:
                break
            if name in self._joins:
                for n in going:
                    seq = messages[n].info.seq
                    said, trace = batch[n].beside or (Dropped(seq, name, "was not asked"), NEW)
                    messages[n] = Seen(messages[n], said)
                    stage_ns[n] |= trace.stage_ns
            started = self._clock()
            results = _results(name, stage, [messages[n] for n in going])
            took_ns = self._clock() - started
            for n, result in zip(going, results, strict=True):
                messages[n] = result
                if not isinstance(result, Dropped):
                    stage_ns[n][name] = took_ns
        return [
            (message, Trace(work.trace.t_ingest_ns, ns))
            for message, work, ns in zip(messages, batch, stage_ns, strict=True)
        ]

    def close(self) -> None:
        """Release what the stages hold."""
        for _, stage in self._stages:
            stage.close()


def _results(name: str, stage: Stage[Any, Any], messages: list[Any]) -> list[Any]:
    """What a stage makes of messages, together or, if that fails, one by one."""
    if len(messages) > 1:
        try:
            return stage.process_all(messages)
        except Exception:
            log.debug("%d frames together at %s", len(messages), name, exc_info=True)
    return [_result(name, stage, message) for message in messages]


def _result(name: str, stage: Stage[Any, Any], message: Any) -> Any:
    """What a stage makes of a message, or `Dropped`."""
    try:
        return stage.process(message)
    except Exception as error:
        # Whatever a stage trips over costs this frame, counted and published as a gap with its
        # reason, not the run.
        seq = message.info.seq
        log.debug("frame %d lost at %s", seq, name, exc_info=True)
        reason = " ".join(str(error).split()) or type(error).__name__
        return Dropped(seq, name, reason[:200])


def _takes(stage: Any) -> type[Any] | None:
    return stage_types(type(stage))[0] if isinstance(stage, Stage) else None


def shown_to_beside(names: Sequence[str]) -> int:
    """How many of a front's stages come before what a node beside it is shown: those of frames."""
    types = [stage_types(component("stage", name)) for name in names]
    return next((n for n, (_, gives) in enumerate(types) if gives is not Frame), len(types))


def build_flow(
    config: PipelineConfig,
    names: Sequence[str],
    sensor: Sensor,
    shape: tuple[int, int],
    clock: Callable[[], int] = time.monotonic_ns,
) -> Flow:
    """Build the named stages; raises PipelineError or EngineError if one cannot be had."""
    context = stage_context(config.sensor, sensor, shape, config.engine)
    stages = [
        (name, component("stage", name).build(config.stages[name], context)) for name in names
    ]
    return Flow(stages, clock)
