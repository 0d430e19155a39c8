"""What `trainer compile` tried, as a table."""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from engines.manifest import Manifest
from trainer.compile import Candidate


def print_candidates(candidates: Sequence[Candidate], chosen: Manifest, console: Console) -> None:
    """A row a variant: how fast, how near its reference, and whether it is good enough."""
    builds = [candidate.manifest.build for candidate in candidates]
    sizes = sorted({found.batch for build in builds if build for found in build.latency})
    table = Table(
        "precision", "threads", *(f"B = {size}" for size in sizes), "error", "CSO-mAP", "",
        title=f"{chosen.name}: ms p50 for B patches", title_justify="left",
    )  # fmt: skip
    for candidate in candidates:
        build = candidate.manifest.build
        if build is None:
            continue
        times = {found.batch: f"{found.p50_ms:.2f}" for found in build.latency}
        verdict = "; ".join(candidate.wrong)
        if candidate.manifest == chosen:
            verdict = "[bold]chosen"
        parity = build.parity
        table.add_row(
            build.precision,
            str(build.threads or "all"),
            *(times.get(size, "–") for size in sizes),
            "–" if parity is None else f"{parity.error:.1e}",
            "–"
            if parity is None or parity.cso_map is None
            else f"{parity.cso_map:.4f} ({parity.cso_map - (parity.reference_cso_map or 0):+.4f})",
            verdict,
        )
    console.print(table)
