"""The stages of the flow, run by direct call: the one place where a message meets a stage.

A node runs its part of the flow, in-process replay all of it, both through `Flow`; so the same
frame gives the same targets, bit for bit, however the flow is cut into processes.
"""

import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

from pipeline.component import Stage, component
from pipeline.config import PipelineConfig
from pipeline.messages import Dropped, Frame, Seen, Trace
from pipeline.physics.sensor import Sensor
from pipeline.runtime.topology import stage_types
from pipeline.sensing import stage_context

log = logging.getLogger(__name__)


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

        What was dropped before comes through as it is. beside: `Objects`, or `Dropped`, that a node
        beside the flow made of the frame, for the stage that takes them.
        """
        if isinstance(message, Dropped):
            return message, trace
        stage_ns = dict(trace.stage_ns)
        seq = message.info.seq
        for name, stage in self._stages:
            if name in self._joins:
                said, trace_beside = beside or (Dropped(seq, name, "was not asked"), trace)
                message, stage_ns = Seen(message, said), stage_ns | trace_beside.stage_ns
            started = self._clock()
            try:
                message = stage.process(message)
            except Exception as error:
                # Whatever a stage trips over costs this frame, counted and published as a gap
                # with its reason, not the run.
                log.debug("frame %d lost at %s", seq, name, exc_info=True)
                reason = " ".join(str(error).split()) or type(error).__name__
                return Dropped(seq, name, reason[:200]), Trace(trace.t_ingest_ns, stage_ns)
            stage_ns[name] = self._clock() - started
        return message, Trace(trace.t_ingest_ns, stage_ns)

    def close(self) -> None:
        """Release what the stages hold."""
        for _, stage in self._stages:
            stage.close()


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
