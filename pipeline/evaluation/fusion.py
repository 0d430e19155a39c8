"""What fusing with a detector beside the flow gains or costs, on recordings with truth."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.component import Source
from pipeline.config import PipelineConfig
from pipeline.errors import PipelineError
from pipeline.physics.score import match_at_gate
from pipeline.runtime.replay import in_process
from pipeline.runtime.topology import joins
from pipeline.stages.report import Report

GATE_PX = 1.0
LEAST_P = 0.05
"""Targets of less are not looked at, fused or not."""
SHARES = (1.0, 0.95, 0.9, 0.8)
"""Of the probability of detection without fusion, at which false alarms are compared."""
RESAMPLES = 1000
Vector = NDArray[np.float64]


@dataclass(frozen=True)
class Compared:
    """All targets of some frames, as they were and as they are fused."""

    frame: NDArray[np.int64]  # (M,)
    hit: NDArray[np.bool_]  # (M,) a true target is theirs
    before: Vector  # (M,) p_exist
    after: Vector  # (M,)
    true: NDArray[np.int64]  # (F,) true targets of each frame
    unfused: int  # frames in which the detector said nothing

    def false_alarms(self, p: Vector, pd: float, weight: Vector) -> float:
        """False alarms a frame where p is thresholded so that Pd is `pd`; weight: of each frame.

        Infinite where that Pd is not reached.
        """
        order = np.argsort(-p, kind="stable")
        each = weight[self.frame[order]]
        reached = np.cumsum(each * self.hit[order]) / max(float(weight @ self.true), 1.0)
        false = np.cumsum(each * ~self.hit[order]) / weight.sum()
        place = int(np.searchsorted(reached, pd - 1e-12))
        return float(false[place]) if place < len(false) else float("inf")

    def pd(self, p: Vector, least: float, weight: Vector) -> float:
        """Probability of detection of the targets of at least this existence."""
        found = weight[self.frame] @ (self.hit & (p >= least))
        return float(found / max(float(weight @ self.true), 1.0))


def compare(config: PipelineConfig, sources: Sequence[Source]) -> Compared:
    """Run all frames through the flow as configured, and without its fusion."""
    if config.beside is None:
        raise PipelineError("evaluate-fusion: the configuration fuses nothing; see docs/fusion.md")
    frame, hit, before, after = [], [], [], []
    true: list[int] = []
    unfused = 0
    for source in sources:
        if source.truth is None:
            raise PipelineError(f"{_name(source)}: has no truth to compare with")
        alone = _targets(_without_fusion(_permissive(config)), source)
        fused = _targets(_permissive(config), source)
        for seq, message in fused.items():
            xy = _positions(message)
            if seq not in alone or not np.array_equal(xy, _positions(alone[seq])):
                raise PipelineError(f"{_name(source)}: frame {seq} is not the same twice")
            truth = source.truth.of_frame(seq)
            right = np.zeros(len(xy), np.bool_)
            right[match_at_gate(xy, truth, GATE_PX)[:, 0]] = True
            frame.append(np.full(len(xy), len(true)))
            hit.append(right)
            before.append(np.array(alone[seq]["targets"]["p_exist"]))
            after.append(np.array(message["targets"]["p_exist"]))
            true.append(len(truth))
            unfused += bool(message["fusion"]["missing"])
    return Compared(
        np.concatenate(frame),
        np.concatenate(hit),
        np.concatenate(before),
        np.concatenate(after),
        np.array(true),
        unfused,
    )


def figures(compared: Compared, least: float, rng: np.random.Generator) -> dict[str, Any]:
    """False alarms a frame at equal Pd, with 95 % bootstrap intervals over frames.

    least: existence from which a target counts without fusion; the Pd this gives is the first that
    false alarms are compared at.
    """
    frames = len(compared.true)
    draws = rng.multinomial(frames, np.full(frames, 1.0 / frames), RESAMPLES).astype(np.float64)
    even = np.ones(frames)
    rows = []
    for share in SHARES:
        pd = share * compared.pd(compared.before, least, even)
        row: dict[str, Any] = {
            "pd": pd,
            "without": compared.false_alarms(compared.before, pd, even),
            "fused": compared.false_alarms(compared.after, pd, even),
        }
        ratios = []
        for weight in draws:
            at = share * compared.pd(compared.before, least, weight)
            without = compared.false_alarms(compared.before, at, weight)
            ratios.append(compared.false_alarms(compared.after, at, weight) / max(without, 1e-9))
        row["ratio"] = row["fused"] / max(row["without"], 1e-9)
        row["ratio_95"] = [float(q) for q in np.quantile(ratios, [0.025, 0.975])]
        rows.append(row)
    return {
        "frames": frames,
        "targets": int(compared.true.sum()),
        "unfused": compared.unfused,
        "least_p_exist": least,
        "at_equal_pd": rows,
    }


def _permissive(config: PipelineConfig) -> PipelineConfig:
    """With all targets that have any probability, so that a threshold can be put afterwards."""
    report = config.stages["report"]
    assert isinstance(report, Report.Config)  # noqa: S101, what the name means
    stages = config.stages | {"report": report.model_copy(update={"min_p_exist": LEAST_P})}
    return replace(config, stages=stages)


def _without_fusion(config: PipelineConfig) -> PipelineConfig:
    rows = tuple(
        replace(node, stages=tuple(stage for stage in node.stages if not joins(stage)))
        for node in config.topology
        if not node.beside
    )
    return replace(config, topology=rows)


def _targets(config: PipelineConfig, source: Source) -> dict[int, dict[str, Any]]:
    return {
        message["frame_seq"]: message
        for message in in_process(config, source)
        if message["schema"] == "irst.targets/1"
    }


def _positions(message: dict[str, Any]) -> Vector:
    columns = message["targets"]
    return np.column_stack([columns["x_px"], columns["y_px"]]).reshape(-1, 2)


def _name(source: Source) -> str:
    path: Path | None = getattr(source, "path", None)
    return str(path or source.sensor.id)
