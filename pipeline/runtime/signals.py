"""Signals that end a process: their handlers may raise, and then do so anywhere."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

ENDS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextmanager
def held_signals() -> Iterator[None]:
    """What is done in this block is done whole: handlers of `ENDS` run at its end.

    Blocking the signals would not do: a library's thread that does not block them takes them, and
    Python then runs the handler in the main thread all the same. Elsewhere than in the main thread
    no handler runs, and this does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handlers = {number: then for number in ENDS if callable(then := signal.getsignal(number))}
    came: list[int] = []
    holding = True

    def hold(number: int, frame: FrameType | None) -> None:
        if holding:
            came.append(number)
        else:  # while the handlers are put back
            handlers[signal.Signals(number)](number, frame)

    try:
        for number in handlers:
            signal.signal(number, hold)
        yield
    finally:
        holding = False
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for arrived in dict.fromkeys(came):
            signal.raise_signal(arrived)
