"""Runs a command line: a user's mistake is one line on standard error, never a traceback."""

import sys

import typer

from engines.errors import EngineError
from pipeline.errors import PipelineError

UsageError: type[Exception] = typer.BadParameter.__mro__[
    1
]  # click's own, by whatever name typer carries click
INTERRUPTED = 130


def run_app(app: typer.Typer, name: str) -> None:
    """Run and exit: 0, 2 for bad input, 1 for a failed run, 130 when interrupted."""
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
    except (KeyboardInterrupt, typer.Abort):
        _fail(name, "interrupted", INTERRUPTED)


def _fail(name: str, message: str, exit_code: int) -> None:
    print(f"{name}: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(exit_code)
