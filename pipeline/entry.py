"""How a command begins: Ctrl-C while Python still imports what it needs ends it without a word."""

import signal
import sys
from importlib import import_module


def begin(module: str) -> None:
    """Import the module and call its `main`.

    SIGUSR1, `read the configuration again`, means nothing before there is a run.
    """
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    interrupted = signal.getsignal(signal.SIGINT)
    if interrupted is signal.default_int_handler:
        signal.signal(signal.SIGINT, lambda number, _frame: sys.exit(128 + number))
    command = import_module(module).main
    signal.signal(signal.SIGINT, interrupted)
    command()
