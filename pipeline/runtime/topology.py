"""The flow as one table: a row a node, in the order frames pass them.

A node is a process that runs its stages by direct call; the supervisor stands between them and
hands every frame from row to row. The edge into a node holds `queue` frames for each of its
replicas; `overflow` says what happens when it is full: `block` holds the sender back,
`drop-oldest` loses the frame that has waited longest, by name, `fail` ends the run. In replay
every edge blocks. `budget_ms` is what the node may take for a frame of 16 groups; `cores` are
those it may run on, None = all. `refine` goes after `unmix` in the unmix node
(configs/refine.yaml); `fuse` has its place before `report` in the back node. A stage runs where a
configuration names it. What a node takes and gives follows from its stages: `flow_types`.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin

from pipeline.component import Stage, component
from pipeline.errors import PipelineError
from pipeline.messages import Frame, TargetReport

Overflow = Literal["block", "drop-oldest", "fail"]


@dataclass(frozen=True)
class Node:
    """One row of the table, with the edge into it."""

    name: str
    stages: tuple[str, ...]
    replicas: int = 1
    queue: int = 4
    overflow: Overflow = "block"
    budget_ms: float = 2.0
    cores: tuple[int, ...] | None = None


TOPOLOGY = (
    #    name     stages             replicas  queue  overflow  budget_ms       # takes → gives
    Node("front", ("detect", "crop"), 1, 16, "drop-oldest", 2.5),  # Frame → Patches
    Node("unmix", ("unmix",), 1, 2, "block", 5.0),  # Patches → Unmixed
    Node("back", ("report",), 1, 16, "block", 1.0),  # Unmixed → TargetReport
)


def flow_types(topology: Iterable[Node], where: str = "topology") -> list[tuple[str, str]]:
    """What each node takes and gives, e.g. ("Frame", "Patches"), by the types of its stages.

    A node without stages passes on what comes. Raises PipelineError, beginning with `where`,
    if a stage does not take what comes to it, runs twice, or no TargetReport comes out.
    """
    flowing: type[Any] = Frame
    seen: set[str] = set()
    types = []
    name = ""
    for node in topology:
        takes, name = flowing, node.name
        for stage in node.stages:
            place = f"{where}: topology.{node.name}.stages: `{stage}`"
            wanted, given = stage_types(component("stage", stage))
            if wanted is not flowing:
                raise PipelineError(
                    f"{place} takes {wanted.__name__}, but {flowing.__name__} comes there"
                )
            if stage in seen:
                raise PipelineError(f"{place} is there already; a stage runs once")
            seen.add(stage)
            flowing = given
        types.append((takes.__name__, flowing.__name__))
    if flowing is not TargetReport:
        raise PipelineError(
            f"{where}: topology.{name}.stages: the flow ends with {flowing.__name__}, "
            "but must end with TargetReport; let `report` be the last stage"
        )
    return types


def stage_types(stage: type[Stage[Any, Any]]) -> tuple[type[Any], type[Any]]:
    """The messages of `class Unmix(Stage[Patches, Unmixed])`: what it takes and what it gives."""
    for kind in stage.__mro__:
        for base in kind.__dict__.get("__orig_bases__", ()):
            if get_origin(base) is Stage:
                takes, gives = get_args(base)
                return takes, gives
    raise PipelineError(f"stage {stage.__name__} does not say what it takes: Stage[Takes, Gives]")
