"""What `trainer bench` measured: a table, bench.json and bench.png."""

import json
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from trainer.bench import PLAIN, Row, machine


def report(rows: Sequence[Row], folder: Path, console: Console) -> None:
    """Print, and write both files."""
    console.print(_table(rows))
    facts = {"machine": machine(), "rival": PLAIN, "rows": [row._asdict() for row in rows]}
    (folder / "bench.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    _picture(rows, folder / "bench.png")
    console.print(f"wrote {folder / 'bench.json'} and bench.png", highlight=False)


def _table(rows: Sequence[Row]) -> Table:
    table = Table(
        "network", "runs on", "B", "ms p50", "ms p99", "patches/s", f"× {PLAIN}",
        title=", ".join(f"{key} {value}" for key, value in machine().items() if value),
        title_justify="left",
    )  # fmt: skip
    before = None
    for row in rows:
        if before is not None and (row.network, row.runs) != before:
            table.add_section()
        before = (row.network, row.runs)
        table.add_row(
            row.network, row.runs, str(row.batch), f"{row.p50_ms:.2f}", f"{row.p99_ms:.2f}",
            f"{row.patches_per_s:.0f}", f"{row.ratio:.2f}",
        )  # fmt: skip
    return table


def _picture(rows: Sequence[Row], path: Path) -> None:
    networks = list(dict.fromkeys(row.network for row in rows))
    figure = Figure(figsize=(5.0 * len(networks), 4.0), layout="constrained")
    panels = figure.subplots(1, len(networks), squeeze=False)[0]
    for axes, network in zip(panels, networks, strict=True):
        own = [row for row in rows if row.network == network]
        for runs in dict.fromkeys(row.runs for row in own):
            line = [row for row in own if row.runs == runs]
            style = "k--" if runs == PLAIN else "o-"
            axes.loglog(
                [row.batch for row in line],
                [row.patches_per_s for row in line],
                style,
                label=runs,
                markersize=3,
            )
        axes.set(title=network, xlabel="patches at a time", ylabel="patches/s")
        axes.grid(visible=True, which="both", alpha=0.3)
        axes.legend(fontsize=7)
    figure.savefig(path, dpi=110)
