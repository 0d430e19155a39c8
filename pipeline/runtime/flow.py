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
from pipeline.messages import Dropped, Trace
from pipeline.physics.sensor import Sensor
from pipeline.sensing import stage_context

log = logging.getLogger(__name__)


class Flow:
    """Consecutive stages; `clock` gives monotonic nanoseconds."""

    def __init__(
        self, stages: Sequence[tuple[str, Stage[Any, Any]]], clock: Callable[[], int]
    ) -> None:
        self._stages = stages
        self._clock = clock

    def process(self, message: Any, trace: Trace) -> tuple[Any, Trace]:
        """The message after all stages, or `Dropped` if one could not process it.

        What was dropped before comes through as it is.
        """
        if isinstance(message, Dropped):
            return message, trace
        stage_ns = dict(trace.stage_ns)
        seq = message.info.seq
        for name, stage in self._stages:
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
