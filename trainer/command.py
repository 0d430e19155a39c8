"""What the commands of `trainer` share."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from trainer.errors import TrainerError

NetworkArgument = Annotated[
    str,
    typer.Argument(metavar="NETWORK", help="A file of trainer/networks; yolo: of whole frames."),
]


def need_torch() -> None:
    """Raise TrainerError, one line, unless what training needs is installed."""
    missing = [
        name
        for name in ("torch", "onnx", "onnxscript", "matplotlib", "tensorboardX")
        if find_spec(name) is None
    ]
    if missing:
        raise TrainerError(
            f'needs {", ".join(missing)}, not installed: pip install "irst-pipeline[train]"'
        )


def make_folder(path: Path) -> None:
    """Make a folder for results; raises TrainerError where it cannot be."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TrainerError(f"{path}: cannot write there ({error.strerror})") from error


@contextmanager
def progress(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar on standard error that appears with the first step, so not before an error."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    bar = Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True))
    task = bar.add_task(what, total=total)

    def show(done: int) -> None:
        bar.start()
        bar.update(task, completed=done)

    try:
        yield show
    finally:
        if bar.live.is_started:
            bar.stop()
