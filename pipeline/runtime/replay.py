"""Replay: every frame of a source through the flow, nothing dropped."""

import time
from collections import deque
from typing import Any

from pipeline.component import Source
from pipeline.config import PipelineConfig
from pipeline.messages import Trace
from pipeline.runtime.flow import build_flow, shown_to_beside
from pipeline.runtime.memory import keep_freed_memory
from pipeline.runtime.outlet import Messages
from pipeline.runtime.output import Output
from pipeline.runtime.supervisor import Supervisor


def over_zeromq(config: PipelineConfig, source: Source) -> Messages:
    """Messages of a run in processes; the front node opens the source anew."""
    with Supervisor(config, "replay", source.sensor, source.shape) as supervisor:
        yield from supervisor.messages()


def in_process(config: PipelineConfig, source: Source) -> Messages:
    """The same messages, but for heartbeats, from a plain loop over the same table."""
    keep_freed_memory()
    waiting: deque[dict[str, Any]] = deque()
    cut = shown_to_beside(config.topology[0].stages) if config.beside else 0
    names = [stage for node in config.topology if not node.beside for stage in node.stages]
    first, flow, beside = (
        build_flow(config, part, source.sensor, source.shape)
        for part in (names[:cut], names[cut:], config.beside.stages if config.beside else ())
    )
    heartbeat_s = config.publish.heartbeat_s
    output = Output(waiting.append, source.sensor.id, config.digest, heartbeat_s)
    frames_in = 0
    try:
        output.start()
        yield from _drain(waiting)
        for frame in source.frames():
            frames_in += 1
            shown = first.process(frame, Trace(time.monotonic_ns(), {}))
            output.put(*flow.process(*shown, beside.process(*shown)))
            yield from _drain(waiting)
        output.end(frames_in)
        yield from _drain(waiting)
    finally:
        for part in (first, flow, beside):
            part.close()


def _drain(waiting: deque[dict[str, Any]]) -> Messages:
    while waiting:
        yield waiting.popleft()
