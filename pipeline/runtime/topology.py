"""The flow as one table: a row a node, in the order frames pass them.

A node is a process that runs its stages by direct call; between two nodes is one ZeroMQ hop.
`queue` is how many frames may wait at each replica of a node; in replay a full queue holds the
sender back, live it makes the source shed its oldest frame. `budget_ms` is what the node may
take for a frame of 16 groups. Places kept for later stages: `refine` after `unmix` in the unmix
node, `fuse` before `report` in the back node; a stage runs where a configuration names it.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Node:
    """One row of the table."""

    name: str
    stages: tuple[str, ...]
    takes: str
    gives: str
    replicas: int = 1
    queue: int = 4
    budget_ms: float = 2.0


TOPOLOGY = (
    #    name     stages               takes      gives           replicas  queue  budget
    Node("front", ("detect", "crop"), "Frame", "Patches", 1, 4, 2.5),
    Node("unmix", ("unmix",), "Patches", "Unmixed", 1, 4, 5.0),
    Node("back", ("report",), "Unmixed", "TargetReport", 1, 16, 1.0),
)
