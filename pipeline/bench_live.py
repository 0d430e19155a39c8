"""`pipeline bench --live`: live runs at the loads they are built for, beside their budgets.

Method. A scene recording (640 × 512, 14 bit, 16 groups a frame; another without targets) is played
from memory. (1) 100 Hz: frames lost, age at publish; also with everything up to the report in the
process that reads the sensor, as in configs/one_process.yaml. (2) 200 Hz without anything to unmix:
frames lost. (3) Frames faster than they can be done, of each of which only the strongest group is
unmixed: how many are published a second, so what the front saturates at up to detection and
cropping. (4) Half of what replay manages, then twice as much as that, then half again: memory, age,
losses that are not named, and until when after the load's end frames are still lost. With --soak,
(5) 100 Hz for that long: growth of resident memory and descriptors of every process, medians of the
tenths after a fifth of the time and at its end.
"""

import os
import tempfile
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from pipeline.bench import DETECTION_BUDGET_HZ, Bench, four_hops_ms
from pipeline.config import PipelineConfig, open_source
from pipeline.runtime import replay
from pipeline.runtime.memory import keep_freed_memory
from pipeline.runtime.supervisor import Supervisor
from pipeline.summary import adds_up
from pipeline.watch import Look, look_at

BASE_HZ, FAST_HZ = 100.0, 200.0
AGE_P50_MS, AGE_P99_MS = 6.0, 15.0
FOUR_HOPS_MS = 1.5
RECOVERY_S = 1.0
GROWTH = 0.05
SETTLE = 0.2
EASY_S = 5.0
ONE_PROCESS = "topology: {front: {stages: [detect, crop, unmix, report]}, unmix: {stages: []}}"
SATURATING_HZ = 2000.0
DETECTION_ONLY = "detect: {max_blobs: 1}"
LOOK_EVERY = 500  # messages; one takes the time of a frame, which is then late


@dataclass
class Run:
    """What was seen of one live run."""

    ages_ms: list[float] = field(default_factory=list)
    fused: int = 0  # with what a detector beside the flow said in time
    lost: list[int] = field(default_factory=list)  # numbers
    looks: list[Look] = field(default_factory=list)
    end: dict[str, Any] = field(default_factory=dict)

    @property
    def frames(self) -> int:
        """Frames that came in."""
        return int(self.end["frames_in"])

    @property
    def unnamed(self) -> int:
        """Frames neither published nor named as lost."""
        return self.frames - len(self.ages_ms) - len(self.lost)

    def growth(self, name: str) -> dict[str, float]:
        """Relative growth of a figure of each process, after it has settled."""
        settled = self.looks[int(SETTLE * len(self.looks)) :]
        series: dict[str, list[float]] = defaultdict(list)
        for look in settled:
            for (process,), value in look.values.get(name, {}).items():
                series[process].append(value)
        return {process: _growth(values) for process, values in series.items()}


def _growth(values: list[float]) -> float:
    """Of the median of the last tenth over that of the first."""
    tenth = max(1, len(values) // 10)
    return float(np.median(values[-tenth:]) / np.median(values[:tenth])) - 1.0


def live_run(config: PipelineConfig) -> Run:
    """Run to the end of its source; what it says of itself is looked at now and then."""
    source = open_source(config)
    sensor, shape = source.sensor, source.shape
    source.close()
    run = Run()
    with Supervisor(config, "live", sensor, shape) as supervisor:
        for number, message in enumerate(supervisor.messages()):
            if message["schema"] == "irst.targets/1":
                run.ages_ms.append(message["age_ns"] / 1e6)
                run.fused += message.get("fusion", {}).get("missing") == ""
            elif message["schema"] == "irst.gap/1":
                run.lost.append(message["frame_seq"])
            elif message["schema"] == "irst.eos/1":
                run.end = message
            if number % LOOK_EVERY == 0:
                run.looks.append(look_at(supervisor.telemetry.registry))
    if not adds_up(run.end):
        raise AssertionError(f"totals do not add up: {run.end}")
    return run


def run_live_bench(frames: int, engine: str | None, seconds: float, soak_s: float) -> None:
    """Measure and print; see the module for the method."""
    console = Console()
    keep_freed_memory()
    table = Table(
        "measure", "measured", "budget", "",
        title=f"live, {os.cpu_count()} cores", title_justify="left",
    )  # fmt: skip

    def row(measure: str, measured: float, budget: float, *, unit: str = "") -> None:
        verdict = "within" if measured <= budget else "[bold red]over"
        table.add_row(measure, f"{measured:.4g}{unit}", f"{budget:g}{unit}", verdict)

    def rate_row(measure: str, measured_hz: float, wanted_hz: float) -> None:
        verdict = "within" if measured_hz >= wanted_hz else "[bold red]under"
        table.add_row(measure, f"{measured_hz:.0f} Hz", f"≥ {wanted_hz:g} Hz", verdict)

    with tempfile.TemporaryDirectory(prefix="irst-") as folder:
        scene = Bench(Path(folder), engine, "scene")
        scene.make(frames)
        empty = Bench(Path(folder), engine, "empty")
        empty.make(frames, singles=0, groups=0)

        for how, more in (("", ""), (", one process", ONE_PROCESS)):
            run = live_run(scene.live([(seconds, BASE_HZ)], more))
            row(f"{BASE_HZ:g} Hz{how}: frames lost of {run.frames}", len(run.lost), 0)
            p50, p99 = np.percentile(run.ages_ms, [50, 99])
            row("  age at publish p50", float(p50), AGE_P50_MS, unit=" ms")
            row("  age at publish p99", float(p99), AGE_P99_MS, unit=" ms")
        run = live_run(empty.live([(seconds, FAST_HZ)]))
        row(f"{FAST_HZ:g} Hz, nothing to unmix: lost of {run.frames}", len(run.lost), 0)
        run = live_run(scene.live([(seconds, SATURATING_HZ)], DETECTION_ONLY))
        rate_row("saturated up to detection", len(run.ages_ms) / seconds, DETECTION_BUDGET_HZ)
        _overload(row, scene, seconds)
        if soak_s:
            run = live_run(scene.live([(soak_s, BASE_HZ)]))
            row(f"soak of {soak_s:g} s: frames lost of {run.frames}", len(run.lost), 0)
            for process, growth in run.growth("irst_node_memory_bytes").items():
                row(f"  memory of {process}: growth", growth, GROWTH)
            for process, growth in run.growth("irst_node_descriptors").items():
                row(f"  descriptors of {process}: growth", growth, 0)
    row(
        "four hops of a full frame p50",
        float(np.median(four_hops_ms(frames))),
        FOUR_HOPS_MS,
        unit=" ms",
    )
    console.print(table)


def _overload(row: Any, scene: Bench, seconds: float) -> None:
    source = open_source(scene.config())
    stamps = [m["stage_ns"] for m in replay.over_zeromq(scene.config(), source) if "stage_ns" in m]
    source.close()
    slowest_ns = max(
        float(np.mean([sum(stamp[stage] for stage in node.stages) for stamp in stamps]))
        for node in scene.config().topology
    )
    can_hz = 1e9 / slowest_ns
    easy, hard = can_hz / 2.0, can_hz * 2.0
    config = scene.live([(EASY_S, easy), (seconds, hard), (EASY_S, easy)])
    run = live_run(config)
    hard_from = round(EASY_S * easy)
    easy_from = hard_from + round(seconds * hard)
    after = [(seq - easy_from) / easy for seq in run.lost if seq >= easy_from]
    row(f"{hard:.0f} Hz, twice what it can: lost without a name", run.unnamed, 0)
    row(
        f"  oldest of {len(run.ages_ms)} published",
        max(run.ages_ms),
        config.supervisor.max_age_ms,
        unit=" ms",
    )
    row("  last loss after the load's end", max(after, default=0.0), RECOVERY_S, unit=" s")
    for process, growth in run.growth("irst_node_memory_bytes").items():
        row(f"  memory of {process}: growth", growth, GROWTH)
