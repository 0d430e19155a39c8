"""The configuration: one YAML file, read once, every key checked, errors named by their path.

source:   {kind: synthetic, rate_hz: 100}
sensor:   {sigma_px: 0.5}              # overrides what the source says of itself
engine:   default
detect:   {false_alarms_per_frame: 0.1} # a section for each stage of the flow
topology: {unmix: {replicas: 2}}
publish:  {endpoint: tcp://127.0.0.1:5556}
supervisor, telemetry, dead_letters, swap: see docs/operations.md
"""

import hashlib
import json
import reprlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from pipeline.component import FedSettings, FedSource, Kind, Settings, Source, available, component
from pipeline.errors import PipelineError
from pipeline.formats.yaml_map import read_yaml_map
from pipeline.runtime.settings import (
    DeadLetterSettings,
    NodeSettings,
    PublishSettings,
    SupervisorSettings,
    SwapSettings,
    TelemetrySettings,
)
from pipeline.runtime.topology import TOPOLOGY, Node, flow_types, home, running
from pipeline.sensing import SensorSettings
from pipeline.transport.feed import FeedSocket

S = TypeVar("S", bound=BaseModel)

MAX_SHOWN = 80
RUNTIME_SECTIONS: dict[str, type[Any]] = {
    "publish": PublishSettings,
    "supervisor": SupervisorSettings,
    "telemetry": TelemetrySettings,
    "dead_letters": DeadLetterSettings,
    "swap": SwapSettings,
}


@dataclass(frozen=True)
class PipelineConfig:
    """A checked configuration: every stage of the topology has its settings."""

    source_kind: str
    source: Settings
    sensor: SensorSettings
    engine: str
    topology: tuple[Node, ...]
    stages: dict[str, Settings]
    publish: PublishSettings
    supervisor: SupervisorSettings
    telemetry: TelemetrySettings
    dead_letters: DeadLetterSettings
    swap: SwapSettings

    @property
    def stage_names(self) -> list[str]:
        """All stages in the order of the flow, then those beside it."""
        return [stage for node in self.topology for stage in node.stages]

    @property
    def beside(self) -> Node | None:
        """The node beside the flow, if there is one: the last row."""
        return self.topology[-1] if self.topology[-1].beside else None

    @property
    def front_endpoints(self) -> tuple[str, ...]:
        """Where the front listens: for who records its frames, and for its source's senders."""
        fed = self.source.endpoint if isinstance(self.source, FedSettings) else None
        return tuple(filter(None, (self.publish.frames, fed)))

    @property
    def name(self) -> str:
        """What no two runs on a machine may share."""
        return self.supervisor.name or self.sensor.id or self.source_kind

    @property
    def digest(self) -> str:
        """Hash of all that decides the targets, for the messages: first 12 hexadecimal digits."""
        plain = {
            "sensor": self.sensor.model_dump(mode="json"),
            "engine": self.engine,
            "stages": {
                name: settings.model_dump(mode="json") for name, settings in self.stages.items()
            },
        }
        return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:12]


def load_config(
    path: Path | None,
    *,
    source: dict[str, Any] | None = None,
    engine: str | None = None,
    publish: dict[str, Any] | None = None,
    default_endpoint: str | None = None,
) -> PipelineConfig:
    """Read and check a configuration file; `source`, `engine`, `publish` override what it says.

    default_endpoint: published on if nothing else is said. Without a file every setting has its
    default. Raises PipelineError naming file, path of the field and the fields that exist there.
    """
    where = str(path) if path else "configuration"
    data = read_yaml_map(path) if path else {}
    topology = _topology(data.pop("topology", None), where)
    stage_names = [stage for node in topology for stage in node.stages]
    chosen = source if source is not None else data.get("source", {"kind": "synthetic"})
    data.pop("source", None)
    if not isinstance(chosen, dict) or "kind" not in chosen:
        raise PipelineError(
            f"{where}: source must be a map with a `kind`, e.g. {{kind: synthetic}}"
        )
    kind = chosen["kind"]
    if not isinstance(kind, str):
        raise PipelineError(f"{where}: source.kind must be a name, got {_short(kind)}")
    chosen = {key: value for key, value in chosen.items() if key != "kind"}
    known = ["source", "sensor", "engine", "topology", *RUNTIME_SECTIONS, *stage_names]
    for key in data:
        if key not in known and key in available("stage"):
            raise PipelineError(
                f"{where}: stage `{key}` is in no node; add it at topology.{home(key)}.stages"
            )
        if key not in known:
            raise PipelineError(f"{where}: unknown field `{key}`; known here: {', '.join(known)}")
    engine = engine if engine is not None else data.get("engine", "default")
    if not isinstance(engine, str):
        raise PipelineError(f"{where}: engine must be a name or a path, got {_short(engine)}")
    published = data.get("publish")
    if published is None or isinstance(published, dict):
        data["publish"] = {"endpoint": default_endpoint, **(published or {}), **(publish or {})}
    supervisor = _section(SupervisorSettings, data.get("supervisor"), "supervisor", where)
    if topology[-1].beside and supervisor.beside_ms >= supervisor.max_age_ms:
        raise PipelineError(
            f"{where}: supervisor.beside_ms must be less than max_age_ms, "
            f"{supervisor.max_age_ms:g}: what is waited for longer costs the frame"
        )
    sensor = _section(SensorSettings, data.get("sensor"), "sensor", where)
    if sensor.calibration is not None and "calibrate" not in stage_names:
        raise PipelineError(
            f"{where}: sensor.calibration is for the stage `calibrate`, which no node runs; "
            "put it before detect at topology.front.stages"
        )
    return PipelineConfig(
        source_kind=kind,
        source=_section(
            _component("source", kind, f"{where}: source.kind").Config, chosen, "source", where
        ),
        sensor=sensor,
        engine=engine,
        topology=topology,
        stages={
            name: _section(component("stage", name).Config, data.get(name), name, where)
            for name in stage_names
        },
        **{
            name: _section(model, data.get(name), name, where)
            for name, model in RUNTIME_SECTIONS.items()
        },
    )


def _component(kind: Kind, name: str, place: str) -> type[Any]:
    """The class of a component that the configuration names at `place`."""
    try:
        return component(kind, name)
    except PipelineError as error:
        raise PipelineError(f"{place}: {error}") from error


def _section(model: type[S], data: Any, name: str, where: str) -> S:
    try:
        return model.model_validate({} if data is None else data)
    except ValidationError as error:
        raise PipelineError(f"{where}: {_explain(error, model, name)}") from error


def _explain(error: ValidationError, model: type[BaseModel], name: str) -> str:
    """The first fault of a section as one line."""
    fault = error.errors()[0]
    *parents, field = [str(part) for part in fault["loc"]] or [""]
    path = ".".join([name, *parents])
    if fault["type"] == "extra_forbidden":
        known = ", ".join(model.model_fields) or "none"
        return f"unknown field `{field}` at {path}; known there: {known}"
    if fault["type"] == "missing":
        return f"field `{field}` is missing at {path}"
    place = f"{path}.{field}" if field else path
    message = fault["msg"][0].lower() + fault["msg"][1:]
    return f"{place}: {message}, got {_short(fault['input'])}"


def _short(value: Any) -> str:
    """A value for an error message; aliases can make it far larger than the file it is from."""
    shown = reprlib.repr(value)
    return shown if len(shown) <= MAX_SHOWN else shown[:MAX_SHOWN] + "…"


def _topology(data: Any, where: str) -> tuple[Node, ...]:
    """The table with the configured changes applied."""
    if data is None:
        return running(TOPOLOGY)
    names = [node.name for node in TOPOLOGY]
    if not isinstance(data, dict):
        raise PipelineError(f"{where}: topology must be a map of nodes ({', '.join(names)})")
    for name in data:
        if name not in names:
            raise PipelineError(
                f"{where}: unknown field `{name}` at topology; known there: {', '.join(names)}"
            )
    rows = []
    for node in TOPOLOGY:
        changes = _section(NodeSettings, data.get(node.name), f"topology.{node.name}", where)
        for stage in changes.stages or ():
            _component("stage", stage, f"{where}: topology.{node.name}.stages")
        rows.append(replace(node, **changes.model_dump(exclude_none=True)))
    for name in ("front", "back"):
        row = rows[names.index(name)]
        if row.replicas != 1:
            raise PipelineError(
                f"{where}: topology.{name}.replicas must be 1, got {row.replicas}; "
                "only nodes in between can have more"
            )
    if rows[0].batch != 1:
        raise PipelineError(
            f"{where}: topology.front.batch must be 1, got {rows[0].batch}; "
            "the front does frames as they come, only the nodes after it several at once"
        )
    flow_types(rows, where)
    return running(rows)


def open_source(config: PipelineConfig) -> Source:
    """The configured source; raises PipelineError if it cannot be opened."""
    kind = component("source", config.source_kind)
    source: Source = kind.build(config.source, config.sensor.overrides())
    if isinstance(source, FedSource):
        source.listen = FeedSocket
    return source
