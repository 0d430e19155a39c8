"""How far a training run is: a bar on a terminal, otherwise a line at each validation."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from itertools import pairwise

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from trainer.fit_config import FitConfig

CLOCK_S = 1e-3
"""Seconds are logged in steps of this size."""


def patches_per_s(records: Sequence[dict[str, float]]) -> list[float]:
    """For each record of a run the patches trained on a second since the one before.

    Seconds are those of training, so a pause of the run does not count; validation does.
    """
    start = {"samples": 0.0, "seconds": 0.0}
    return [
        (now["samples"] - before["samples"]) / max(now["seconds"] - before["seconds"], CLOCK_S)
        for before, now in pairwise([start, *records])
    ]


@contextmanager
def shown(config: FitConfig, step: int, *, hidden: bool) -> Iterator["FitProgress"]:
    """Progress of a run from `step` on, on standard error; nothing at all if hidden."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=8),  # what is said in words fits beside it in 80 columns
        TextColumn("{task.percentage:.1f} %"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=hidden or not console.is_terminal) as bar:
        task = bar.add_task(config.network, total=config.steps, completed=step)
        yield FitProgress(config, bar, task, lines=not (hidden or console.is_terminal))


class FitProgress:
    """Shows a run's step, loss, CSO-mAP, patches/s and time left: on a bar, or as lines."""

    def __init__(self, config: FitConfig, bar: Progress, task: TaskID, *, lines: bool) -> None:
        self._config, self._bar, self._task, self._lines = config, bar, task, lines

    def advance(self, step: int) -> None:
        """So many steps are done."""
        self._bar.update(self._task, completed=step)

    def tell(self, records: Sequence[dict[str, float]]) -> None:
        """The last record is new."""
        config, last, rate = self._config, records[-1], patches_per_s(records)[-1]
        state = f"loss {last['loss']:.2e}  CSO-mAP {last['cso_map']:.3f}  {rate:.0f} patches/s"
        self._bar.update(self._task, description=state)
        if self._lines:
            step = f"{config.network}  step {last['step']} of {config.steps}"
            left = timedelta(seconds=round((config.steps * config.batch - last["samples"]) / rate))
            print(f"{step}  {state}  {left} left", file=sys.stderr, flush=True)
