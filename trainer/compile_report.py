"""What `trainer compile` tried, as a table."""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from engines.manifest import Manifest
from trainer.build import Candidate


def print_candidates(candidates: Sequence[Candidate], chosen: Manifest, console: Console) -> None:
    """A row a variant: how fast, how near its reference, and whether it is good enough."""
    sizes = sorted({found.batch for c in candidates for found in c.build.latency})
    table = Table(
        "build", *map(str, sizes), "error", "CSO-mAP", "change", "",
        title=f"{chosen.name}: ms p50 for so many patches; build: precision, streams × patches",
        title_justify="left",
    )  # fmt: skip
    refused = dict[str, str]()
    for candidate in candidates:
        build, parity = candidate.build, candidate.build.parity
        times = {found.batch: f"{found.p50_ms:.2f}" for found in build.latency}
        score = ("", "", "")
        if parity is not None and parity.cso_map is not None:
            score = (f"{parity.error:.1e}", f"{parity.cso_map:.3f}", f"{-parity.loss:+.4f}")
        if candidate.wrong:
            refused[build.precision] = "; ".join(candidate.wrong)
        table.add_row(
            f"{build.precision} {build.streams} × {candidate.variant.most}",
            *(times.get(size, "") for size in sizes),
            *score,
            "chosen" if candidate.manifest == chosen else "refused" if candidate.wrong else "",
        )
    console.print(table)
    for precision, reasons in refused.items():
        console.print(f"{precision} was refused: {reasons}", highlight=False)
