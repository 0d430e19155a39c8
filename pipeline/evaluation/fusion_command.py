"""The command `pipeline evaluate-fusion`."""

import json
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from pipeline.config import load_config, open_source
from pipeline.errors import PipelineError
from pipeline.evaluation.fusion import compare, figures
from pipeline.formats.writable import check_writable
from pipeline.stages.report import Report


def evaluate_fusion(
    recordings: Annotated[list[Path], typer.Argument(help="Recordings with truth (zarr).")],
    config: Annotated[Path, typer.Option(help="YAML configuration with fusion.")],
    out: Annotated[Path | None, typer.Option("--json", help="Write the figures here.")] = None,
) -> None:
    """False alarms at equal probability of detection, with and without fusion.

    Pd is compared from that which targets of p_exist ≥ 0.5 have without fusion.
    """
    if out is not None:
        check_writable(out)
    sources = []
    for path in recordings:
        if not path.exists():
            raise PipelineError(f"{path}: no such recording")
        source = {"kind": "zarr_recording", "path": str(path)}
        settings = load_config(config, source=source)
        sources.append(open_source(settings))
    found = figures(
        compare(settings, sources), Report.Config().min_p_exist, np.random.default_rng(1)
    )
    print(f"{found['frames']} frames, {found['targets']} targets; false alarms a frame:")
    for row in found["at_equal_pd"]:
        low, high = row["ratio_95"]
        print(
            f"  Pd {row['pd']:.3f}: {row['without']:.2f} without, {row['fused']:.2f} fused, "
            f"ratio {row['ratio']:.2f} (95 %: {low:.2f} to {high:.2f})"
        )
    if out is not None:
        out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
