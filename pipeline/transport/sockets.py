"""How every socket is made, listens and is ended; each is owned by one thread."""

import atexit
import contextlib
import errno
import fcntl
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import zmq

from pipeline.errors import PipelineError, Unavailable

LINGER_MS = 1000
COPY_BELOW_BYTES = 65536
MAX_MESSAGE_BYTES = 1 << 28
MAX_IPC_PATH_BYTES = 107
NOT_OURS = (zmq.EADDRNOTAVAIL, errno.ENODEV)


def new_socket(kind: int) -> "zmq.Socket[bytes]":
    """A socket that ends within a second and takes no message beyond MAX_MESSAGE_BYTES."""
    socket: zmq.Socket[bytes] = zmq.Context.instance().socket(kind)
    socket.setsockopt(zmq.LINGER, LINGER_MS)
    socket.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
    return socket


def end() -> None:
    """Wait until what closed sockets still hold has left, each for its linger; then no more zmq.

    The last thing a process does: without it, what is queued at exit is thrown away.
    """
    zmq.Context.instance().destroy(linger=LINGER_MS)


atexit.register(end)


def bind(socket: "zmq.Socket[bytes]", endpoint: str) -> contextlib.ExitStack:
    """Listen at an endpoint; returns what holds it, to be closed with the socket."""
    hold = contextlib.ExitStack()
    try:
        if endpoint.startswith("ipc://"):
            hold.enter_context(_ipc_path(endpoint))
        speak_ip(socket, endpoint)
        socket.bind(endpoint)
    except zmq.ZMQError as error:
        hold.close()
        socket.close()
        if error.errno == zmq.EADDRINUSE:
            raise _in_use(endpoint) from error
        if error.errno in NOT_OURS:
            raise Unavailable(
                f"{endpoint}: this machine has no such address now; `ip address` shows those it has"
            ) from error
        raise PipelineError(f"{endpoint}: cannot listen there ({reason(error)})") from error
    except PipelineError:
        socket.close()
        raise
    return hold


def speak_ip(socket: "zmq.Socket[bytes]", endpoint: str) -> None:
    """Make a socket speak IPv6 for an address in brackets: by itself it speaks IPv4 only."""
    socket.setsockopt(zmq.IPV6, endpoint.startswith("tcp://["))


def reason(error: zmq.ZMQError) -> str:
    """What went wrong, in the system's words."""
    return zmq.strerror(error.errno or 0)


class AddressInUse(Unavailable):
    """Somebody else listens there, for now."""


def _in_use(endpoint: str) -> AddressInUse:
    return AddressInUse(
        f"{endpoint}: address already in use; stop what listens there or choose another"
    )


@contextlib.contextmanager
def _ipc_path(endpoint: str) -> Iterator[None]:
    """Hold an ipc path by a lock beside it, and leave neither behind.

    Without the lock a second bind would succeed and leave the first deaf.
    """
    path = endpoint.removeprefix("ipc://")
    if len(os.fsencode(path)) > MAX_IPC_PATH_BYTES:
        raise PipelineError(f"{endpoint}: path longer than 107 bytes; use a shorter one or TMPDIR")
    _refuse_what_is_not_ours(endpoint, path)
    try:
        lock = _locked(Path(path + ".lock"))
    except BlockingIOError as error:
        raise _in_use(endpoint) from error
    except FileNotFoundError as error:
        raise PipelineError(
            f"{endpoint}: there is no folder {Path(path).parent}; make it, or choose another path"
        ) from error
    except OSError as error:
        raise PipelineError(f"{endpoint}: cannot listen there ({error.strerror})") from error
    with lock:
        try:
            yield
        finally:
            _unlink(path)


def _refuse_what_is_not_ours(endpoint: str, path: str) -> None:
    """Raise PipelineError where something lies that is no socket, or no lock: it would be lost."""
    for place, is_ours in ((path, stat.S_ISSOCK), (path + ".lock", stat.S_ISREG)):
        with contextlib.suppress(OSError):  # nothing there, or it is said when it is opened
            found = Path(place).lstat()
            if not is_ours(found.st_mode) or (place != path and found.st_size > 0):
                raise PipelineError(
                    f"{endpoint}: {place} is there already and not ours; choose another path"
                )


def _locked(path: Path) -> IO[bytes]:
    """The file at `path`, locked; BlockingIOError if another process has it."""
    while True:
        lock = path.open("ab")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(lock.fileno()), path.stat()):
                return lock
        except FileNotFoundError:
            pass  # deleted by who held it, between our opening and locking it
        except BlockingIOError:
            lock.close()
            raise
        lock.close()


def remove_stale(endpoint: str, *, ours: bool = False) -> None:
    """Remove what a process that was killed has left of an ipc endpoint; one in use stays.

    ours: it is this process that uses it, and is about to end.
    """
    if not endpoint.startswith("ipc://"):
        return
    if ours:
        _unlink(endpoint.removeprefix("ipc://"))
    else:
        with contextlib.suppress(PipelineError), _ipc_path(endpoint):
            pass


def _unlink(path: str) -> None:
    for left in (path, path + ".lock"):
        Path(left).unlink(missing_ok=True)
