"""The flow as one table: a row a node, in the order frames pass them.

A node is a process that runs its stages by direct call; the supervisor stands between them and
hands every frame from row to row. The edge into a node holds `queue` frames for each of its
replicas; `overflow` says what happens when it is full: `block` holds the sender back,
`drop-oldest` loses the frame that has waited longest, by name, `fail` ends the run. In replay
every edge blocks. `budget_ms` is what the node may take for a frame of 16 groups; `cores` are
those it may run on, None = all. `batch` frames are done at once, at most, which pays where an
engine is faster by the dozen, as on a GPU; the first of them waits for the others `batch_ms` at
most, and never so long that the budgets of what is still to do would not fit into its deadline. In
replay a batch is one frame, so that what it is done with changes nothing.

A stage runs where a configuration names it, and a node without stages is not run: each node costs a
frame 0.6 ms of its age (docs/latency.md). `refine` goes between `unmix` and `report`
(configs/refine.yaml). What a node takes and gives follows from its stages: `flow_types`.

The last row, `yolo`, stands beside the flow: given stages (`recognise`, see configs/fusion.yaml) it
gets every frame while the others work on it, and what it answers in time joins the flow at the
stage that takes it, `fuse`, for which there is the node `back`. What it sheds or loses is only its
answer, not the frame.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin

from pipeline.component import Stage, component
from pipeline.errors import PipelineError
from pipeline.messages import Frame, Objects, Seen, TargetReport

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
    batch: int = 1
    batch_ms: float = 5.0
    beside: bool = False


TOPOLOGY = (
    #    name     stages             replicas  queue  overflow  budget_ms       # takes → gives
    Node("front", ("detect", "crop"), 1, 16, "drop-oldest", 2.5),  # Frame → Patches
    Node("unmix", ("unmix", "report"), 1, 2, "block", 6.0),  # Patches → TargetReport
    Node("back", (), 1, 16, "block", 1.0),  # TargetReport, Objects → TargetReport
    Node("yolo", (), 1, 1, "drop-oldest", 100.0, beside=True),  # Frame → Objects, joins at `fuse`
)


def running(topology: Iterable[Node]) -> tuple[Node, ...]:
    """The rows that are run: the front, which reads the source, and every node with stages."""
    front, *others = topology
    return front, *(node for node in others if node.stages)


def joining_row(rows: Sequence[Node]) -> int:
    """Number of the row with the stage that takes what a node beside the flow answers."""
    return next(number for number, node in enumerate(rows) if any(map(joins, node.stages)))


def joins(stage: str) -> bool:
    """True if a stage takes `Seen`: the flow's message and the answer from beside it."""
    return stage_types(component("stage", stage))[0] is Seen


def home(stage: str) -> str:
    """Name of the row a stage belongs to: where the table has one that takes the same."""
    takes, gives = stage_types(component("stage", stage))
    if gives is Objects:
        return TOPOLOGY[-1].name
    alike = (
        node.name
        for node in TOPOLOGY
        for other in node.stages
        if stage_types(component("stage", other))[0] is takes
    )
    return next(alike, "back")


def flow_types(topology: Iterable[Node], where: str = "topology") -> list[tuple[str, str]]:
    """What each node takes and gives, e.g. ("Frame", "Patches"), by the types of its stages.

    Raises PipelineError, beginning with `where`, if a stage does not take what comes to it, runs
    twice, or no TargetReport comes out.
    """
    rows = running(topology)
    flow = [node for node in rows if not node.beside]
    if len(flow) == len(rows):
        return _types(flow, TargetReport, where)
    if not any(joins(stage) for node in flow[1:] for stage in node.stages):
        raise PipelineError(
            f"{where}: topology.{rows[-1].name}: nobody takes what it says; "
            "let topology.back.stages be [fuse]"
        )
    return _types(flow, TargetReport, where, beside=True) + _types(rows[-1:], Objects, where)


def _types(
    rows: Sequence[Node], ends: type[Any], where: str, *, beside: bool = False
) -> list[tuple[str, str]]:
    """Of consecutive nodes, from a Frame to `ends`; beside: a node beside them has its say."""
    flowing: type[Any] = Frame
    seen: set[str] = set()
    types = []
    for node in rows:
        takes = flowing
        for stage in node.stages:
            place = f"{where}: topology.{node.name}.stages: `{stage}`"
            wanted, given = stage_types(component("stage", stage))
            if wanted is Seen and not beside:
                raise PipelineError(
                    f"{place} takes what a node beside the flow says, and there is none; "
                    "let topology.yolo.stages be [recognise]"
                )
            needed = TargetReport if wanted is Seen else wanted
            if needed is not flowing:
                raise PipelineError(
                    f"{place} takes {needed.__name__}, but {flowing.__name__} comes there"
                )
            if stage in seen:
                raise PipelineError(f"{place} is there already; a stage runs once")
            seen.add(stage)
            flowing = given
        types.append((takes.__name__, flowing.__name__))
    if flowing is not ends:
        stage = "report" if ends is TargetReport else "recognise"
        raise PipelineError(
            f"{where}: topology.{rows[-1].name}.stages: the flow ends with {flowing.__name__}, "
            f"but must end with {ends.__name__}; let `{stage}` be the last stage"
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
