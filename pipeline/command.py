"""Runs a command line: a user's mistake is one line on standard error, never a traceback."""

import math
import signal
import sys
from collections.abc import Callable
from typing import Any

import typer

from engines.errors import EngineError
from pipeline.errors import PipelineError, printable

UsageError: type[Exception] = typer.BadParameter.__mro__[
    1
]  # click's own, by whatever name typer carries click


class Interrupted(PipelineError):
    """Told to end in the middle of what is of use as far as it came."""

    def __init__(self, told: KeyboardInterrupt | SystemExit, how_far: str) -> None:
        super().__init__(f"interrupted {how_far}")
        code = told.code if isinstance(told, SystemExit) else None
        self.exit_code = code if isinstance(code, int) else 128 + signal.SIGINT


def run_app(app: typer.Typer, name: str) -> None:
    """Run and exit: 0, 2 for bad input, 1 for a failed run, 130 after Ctrl-C."""
    try:
        sys.exit(app(prog_name=name, standalone_mode=False) or 0)
    except (PipelineError, EngineError) as error:
        _fail(name, str(error), error.exit_code)
    except UsageError as error:
        message: str = getattr(error, "format_message", error.__str__)()
        if not message:  # no command given: the help was printed
            sys.exit(2)
        _fail(name, f"{message} (see --help)", 2)
    except OSError as error:
        _fail(name, f"{error.filename or 'input/output'}: {error.strerror or error}", 1)


def finite(value: float) -> float:
    """The value of an option, which no range keeps from being `nan` or `inf`."""
    if not math.isfinite(value):
        raise typer.BadParameter(f"{value} is not a number to count with")
    return value


def on_end(call: Callable[[], Any]) -> None:
    """Call when told to end: by Ctrl-C, SIGTERM, or the terminal's going, unless under nohup."""
    numbers = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    for number in numbers:
        signal.signal(number, lambda _number, _frame: call())


def _fail(name: str, message: str, exit_code: int) -> None:
    print(f"{name}: {printable(message)}", file=sys.stderr)
    sys.exit(exit_code)
