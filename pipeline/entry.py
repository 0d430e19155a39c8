"""How a command begins: Ctrl-C while Python still imports what it needs ends it without a word."""

import os
import signal
from importlib import import_module


def begin(module: str) -> None:
    """Import the module and call its `main`.

    SIGUSR1, `read the configuration again`, means nothing before there is a run.
    """
    interrupted = signal.getsignal(signal.SIGINT)
    if interrupted is signal.default_int_handler:
        # At once: an exception in the middle of an import is made another by some libraries.
        signal.signal(signal.SIGINT, lambda number, _frame: os._exit(128 + number))
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    command = import_module(module).main
    signal.signal(signal.SIGINT, interrupted)
    command()
