"""What the process of a node is told when it starts."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pipeline.config import PipelineConfig
from pipeline.physics.sensor import Sensor
from pipeline.runtime.batch import Batch
from pipeline.runtime.topology import Node

Mode = Literal["replay", "live"]
ALIVE_MS = 100
"""A node says at least so often that it is there."""


@dataclass(frozen=True)
class NodeTask:
    """All a node's process is told when it starts."""

    config: PipelineConfig
    row: int  # of the topology
    run_dir: Path
    mode: Mode
    sensor: Sensor
    shape: tuple[int, int]
    intake: Any  # an `Intake` in shared memory
    originals: dict[str, str] = field(default_factory=dict)  # of copies that `config` names
    identity: bytes = b""
    supervisor_pid: int = 0

    @property
    def node(self) -> Node:
        """This node's row of the table."""
        return self.config.topology[self.row]

    @property
    def hop(self) -> str:
        """What its messages pass on their way to it, e.g. "front>unmix"."""
        before = self.config.topology[0 if self.node.beside else self.row - 1]
        return f"{before.name}>{self.node.name}"

    def batch(self) -> Batch:
        """What this node does at once: in replay every frame by itself."""
        if self.mode == "replay":
            return Batch.single()
        max_age_ns = round(self.config.supervisor.max_age_ms * 1e6)
        return Batch.live(self.config.topology, self.row, max_age_ns)


def hub_endpoint(run_dir: Path) -> str:
    """Where the supervisor of a run listens."""
    return f"ipc://{run_dir}/hub"
