"""Do two sets of workers find the same targets in the same frames, and how long do they take?"""

from collections import defaultdict
from collections.abc import Sequence
from statistics import median

import numpy as np
from scipy.optimize import linear_sum_assignment

from pipeline.errors import RunError
from pipeline.messages import TargetReport, Trace
from pipeline.runtime.settings import SwapSettings
from pipeline.runtime.topology import Node


class Refused(RunError):
    """The new workers are not as the old ones; `figure` says in what."""

    def __init__(self, figure: str, line: str) -> None:
        super().__init__(line)
        self.figure = figure


class Parity:
    """Compares what was made of frames, one by one; `check` judges all of them."""

    def __init__(self, settings: SwapSettings, nodes: Sequence[Node]) -> None:
        self._settings, self._nodes = settings, nodes
        self.frames = 0  # in which somebody found a target
        self._targets = self._matched = self._groups = self._same_count = 0
        self._ms: dict[str, tuple[list[float], list[float]]] = defaultdict(lambda: ([], []))
        self._answers = [0, 0]  # of a detector beside the flow: old, new
        self._missing = ""  # why the new one gave none, the last time

    def add(self, old: tuple[TargetReport, Trace], new: tuple[TargetReport, Trace]) -> None:
        """Take in what both made of a frame."""
        ours, theirs = old[0], new[0]
        self._missing = _missing(theirs) or self._missing
        for which, (report, trace) in enumerate((old, new)):
            answered = report.fusion is not None and not _missing(report)
            self._answers[which] += answered
            for node in self._nodes:
                if answered or not node.beside:
                    self._ms[node.name][which].append(_ms(node, trace))
        number = max(len(ours.bbox_px), len(theirs.bbox_px))
        counts, others = (np.bincount(r.group, minlength=number) for r in (ours, theirs))
        if not counts.any() and not others.any():
            return
        self.frames += 1
        self._groups += int(np.sum((counts > 0) | (others > 0)))
        self._same_count += int(np.sum((counts == others) & (counts > 0)))
        self._targets += len(ours.group) + len(theirs.group)
        self._matched += 2 * matches(ours, theirs, self._settings.within_px)

    def check(self, *, same_targets: bool) -> None:
        """Raise Refused if they are slower than allowed or, where asked, find something else."""
        for figure, share, least, what in (
            ("matched", self._matched / max(self._targets, 1), self._settings.matched,
             f"of the targets are found by both within {self._settings.within_px:g} px"),
            ("counted", self._same_count / max(self._groups, 1), self._settings.counted,
             "of the groups have the same number of targets"),
        ):  # fmt: skip
            if same_targets and share < least:
                line = f"{share:.1%} {what}, {least:.1%} are asked for (swap.{figure})"
                raise Refused(figure, line)
        had, has = self._answers
        if has < self._settings.answered * had:
            raise Refused(
                "answered",
                f"the detector answers {has} frames in time where the old one answers {had}, "
                f"{self._settings.answered:.1%} are asked for (swap.answered): {self._missing}",
            )
        for node in self._nodes:
            if not all(self._ms[node.name]):
                continue  # a detector of which one has not answered
            old_ms, new_ms = map(median, self._ms[node.name])
            allowed_ms = max(node.budget_ms, self._settings.slower * old_ms)
            if new_ms > allowed_ms:
                raise Refused(
                    "latency",
                    f"node {node.name} takes {new_ms:.2f} ms where the old one takes "
                    f"{old_ms:.2f}; {allowed_ms:.2f} are allowed",
                )


def matches(ours: TargetReport, theirs: TargetReport, within_px: float) -> int:
    """How many targets of the same groups pair up at most within_px apart."""
    away = np.linalg.norm(ours.xy_px[:, None] - theirs.xy_px[None], axis=-1)
    near = (away <= within_px) & (ours.group[:, None] == theirs.group[None])
    rows, columns = linear_sum_assignment(near, maximize=True)
    return int(near[rows, columns].sum())


def _missing(report: TargetReport) -> str:
    """Why a detector beside the flow said nothing of a frame; empty if it did, or there is none."""
    return "" if report.fusion is None else report.fusion.missing


def _ms(node: Node, trace: Trace) -> float:
    """What a node's stages took of a frame."""
    return sum(trace.stage_ns.get(stage, 0) for stage in node.stages) / 1e6
