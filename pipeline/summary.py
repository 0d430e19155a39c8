"""The end of a run in figures: frames, targets, latency by stage, accounting, score."""

import time
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from pipeline.component import Truth
from pipeline.physics.score import cso_map, expected_hits, match_at_gate

PD_GATE_PX = 0.25
FALSE_ALARM_GATE_PX = 1.0


@dataclass
class Summary:
    """Collects the messages of a run."""

    targets: int = 0
    groups: int = 0
    found: dict[int, np.ndarray[Any, Any]] = field(default_factory=dict)  # seq → (n, 3) x, y, score
    latency_ns: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))
    end: dict[str, Any] | None = None
    dropped: list[dict[str, Any]] = field(default_factory=list)
    unfused: Counter[str] = field(default_factory=Counter)  # frames by why
    started: float = field(default_factory=time.monotonic)
    seconds: float = 0.0  # from the start message to the last one

    def add(self, message: dict[str, Any]) -> None:
        """Take in one message of the wire."""
        schema = message["schema"]
        now = time.monotonic()
        if schema == "irst.start/1":
            self.started = now
        self.seconds = now - self.started
        if schema == "irst.eos/1":
            self.end = message
        elif schema == "irst.gap/1":
            self.dropped.append(message)
        elif schema == "irst.targets/1":
            columns = message["targets"]
            self.found[message["frame_seq"]] = rows = _rows(columns)
            self.targets += len(rows)
            self.groups += len(message["groups"]["id"])
            for stage, ns in message["stage_ns"].items():
                self.latency_ns[stage].append(ns)
            self.latency_ns["ingest to publish"].append(message["age_ns"])
            if reason := message.get("fusion", {}).get("missing"):
                self.unfused[reason] += 1

    @property
    def frames(self) -> int:
        """Frames with a published report."""
        return len(self.found)

    @property
    def balanced(self) -> bool:
        """True if the stream ended and its totals agree with each other and with what came."""
        return (
            self.end is not None
            and adds_up(self.end)
            and self.end["published"] == self.frames
            and _lost(self.end) == len(self.dropped)
        )


def _rows(columns: dict[str, Any]) -> np.ndarray[Any, Any]:
    """Targets (n, 3) of a message as x px, y px and score: how many thresholds they should meet."""
    cov_px2 = np.array(columns["cov_px2"], dtype=np.float64).reshape(-1, 3)
    hits = expected_hits((cov_px2[:, 0] + cov_px2[:, 2]) / 2.0)
    return np.column_stack([columns["x_px"], columns["y_px"], hits * columns["p_exist"]])


def adds_up(end: dict[str, Any]) -> bool:
    """True if a stream's totals agree: frames in = published + dropped."""
    return bool(end["frames_in"] == end["published"] + _lost(end))


def _lost(end: dict[str, Any]) -> int:
    return sum(entry["frames"] for entry in end["dropped"])


@dataclass(frozen=True)
class Score:
    """Published targets against the truth."""

    cso_map: float
    ap: dict[float, float]
    pd: float  # share of true targets with one of their own within PD_GATE_PX
    false_alarms_per_frame: float  # targets without a true one within 1 px, a published frame
    rmse_px: float | None  # of the matches within PD_GATE_PX, radial


def score(summary: Summary, truth: Truth) -> Score:
    """Score all frames published or dropped; in a dropped one every true target was missed."""
    frames = sorted(summary.found.keys() | {gap["frame_seq"] for gap in summary.dropped})
    found = [summary.found.get(seq, np.empty((0, 3))) for seq in frames]
    true = [truth.of_frame(seq) for seq in frames]
    hits, spurious, squares = 0, 0, []
    for rows, xy_px in zip(found, true, strict=True):
        pairs = match_at_gate(rows[:, :2], xy_px, PD_GATE_PX)
        hits += len(pairs)
        squares.append(np.sum((rows[pairs[:, 0], :2] - xy_px[pairs[:, 1]]) ** 2, axis=1))
        spurious += len(rows) - len(match_at_gate(rows[:, :2], xy_px, FALSE_ALARM_GATE_PX))
    precision = cso_map(found, true)
    total = sum(len(xy_px) for xy_px in true)
    return Score(
        cso_map=precision.mean,
        ap=precision.ap,
        pd=hits / total if total else 0.0,
        false_alarms_per_frame=spurious / max(1, summary.frames),
        rmse_px=float(np.sqrt(np.mean(np.concatenate(squares)))) if hits else None,
    )


def print_summary(console: Console, summary: Summary, result: Score | None) -> None:
    """Show it as a person wants to read it."""
    seconds = summary.seconds
    rate = summary.frames / seconds if seconds > 0 else 0.0
    console.print(
        f"\n[bold]{summary.frames}[/] frames, [bold]{summary.targets}[/] targets in "
        f"{summary.groups} groups; {seconds:.1f} s, [bold]{rate:.1f}[/] frames/s",
        soft_wrap=True,
    )
    table = Table("stage", "p50 ms", "p99 ms", title="latency", title_justify="left")
    for stage, ns in summary.latency_ns.items():
        p50, p99 = np.percentile(np.array(ns) / 1e6, [50, 99])
        table.add_row(stage, f"{p50:.2f}", f"{p99:.2f}")
    console.print(table)
    print_accounting(console, summary.end, balanced=summary.balanced)
    for reason, frames in summary.unfused.items():
        console.print(f"  not fused: {frames} × {reason}", soft_wrap=True, markup=False)
    if result is not None:
        print_score(console, result)


def accounting_line(end: dict[str, Any], balanced: bool) -> str:
    """Frames in = published + dropped, and whether it adds up."""
    verdict = "adds up" if balanced else "does NOT add up"
    return (
        f"accounting: {end['frames_in']} in = {end['published']} published + {_lost(end)} dropped "
        f"({verdict})"
    )


def print_accounting(console: Console, end: dict[str, Any] | None, *, balanced: bool) -> None:
    """Frames in = published + dropped, or the alarm; a line is one line, however narrow."""
    style = None if balanced else "bold red"
    if end is None:
        console.print("the stream did not end: totals unknown", style=style, soft_wrap=True)
        return
    console.print(accounting_line(end, balanced), style=style, soft_wrap=True)
    for entry in end["dropped"]:
        line = f"  dropped at {entry['stage']}: {entry['frames']} × {entry['reason']}"
        console.print(line, soft_wrap=True, markup=False)


def print_score(console: Console, result: Score) -> None:
    """CSO-mAP and the tracker's figures."""
    ap = "  ".join(f"AP{round(t * 100):02d} {value:.3f}" for t, value in result.ap.items())
    rmse = "–" if result.rmse_px is None else f"{result.rmse_px:.3f} px"
    console.print(f"score: [bold]CSO-mAP {result.cso_map:.4f}[/]  ({ap})", soft_wrap=True)
    console.print(
        f"       Pd {result.pd:.3f} within {PD_GATE_PX} px, RMSE {rmse}, "
        f"{result.false_alarms_per_frame:.2f} false alarms a frame (none within "
        f"{FALSE_ALARM_GATE_PX:g} px)",
        soft_wrap=True,
    )
