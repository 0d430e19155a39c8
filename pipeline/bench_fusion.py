"""`pipeline bench --fusion`: what a detector beside the flow costs in latency, on and off.

Method. The scene of `pipeline bench --live` is played live from memory, at 100 Hz and at 10 Hz,
each without fusion and with it, configured as in configs/fusion.yaml: frames lost, age at publish,
and the share of the published frames that the detector answered in time.
"""

import os
import tempfile
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from pipeline.bench import Bench
from pipeline.bench_live import BASE_HZ, live_run
from pipeline.runtime.memory import keep_freed_memory

RATES_HZ = (BASE_HZ, 10.0)
FUSION = """
topology: {{yolo: {{stages: [recognise]}}, back: {{stages: [fuse]}}}}
recognise: {{engine: {detector}}}
report: {{min_p_exist: 0.05}}
supervisor: {{beside_ms: 250}}
"""


def run_fusion_bench(frames: int, engine: str | None, seconds: float, detector: str) -> None:
    """Measure and print; see the module for the method. detector: as `recognise.engine`."""
    console = Console()
    keep_freed_memory()
    table = Table(
        "frames/s", "fusion", "frames", "lost", "age p50 ms", "p90 ms", "p99 ms", "fused",
        title=f"live, {os.cpu_count()} cores, detector {detector}", title_justify="left",
    )  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="irst-") as folder:
        scene = Bench(Path(folder), engine, "scene")
        scene.make(frames)
        for rate_hz in RATES_HZ:
            for fusion, more in (("off", ""), ("on", FUSION.format(detector=detector))):
                run = live_run(scene.live([(seconds, rate_hz)], more))
                ages_ms = np.percentile(run.ages_ms, [50, 90, 99])
                table.add_row(
                    f"{rate_hz:g}", fusion, str(run.frames), str(len(run.lost)),
                    *(f"{age_ms:.1f}" for age_ms in ages_ms),
                    f"{run.fused / len(run.ages_ms):.1%}",
                )  # fmt: skip
            table.add_section()
    console.print(table)
