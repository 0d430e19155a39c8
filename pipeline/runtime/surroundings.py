"""Whether this machine is as a run needs it, tried without leaving anything behind."""

import os
import socket
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import combinations
from pathlib import Path

from pipeline.component import FedSettings
from pipeline.config import PipelineConfig
from pipeline.errors import PipelineError, Unavailable
from pipeline.transport.probe import listening
from pipeline.transport.security import ServerKeys
from pipeline.transport.sockets import AddressInUse


def check_surroundings(settings: PipelineConfig) -> list[Unavailable]:
    """Keys, folders, cores and addresses; returns what addresses cannot be had at present.

    Raises PipelineError for what can never be.
    """
    keys = ServerKeys.load(settings.publish.keys) if settings.publish.keys else None
    if settings.publish.wait_for and settings.publish.endpoint is None:
        raise PipelineError("publish.wait_for: nobody can subscribe without publish.endpoint")
    if settings.dead_letters.folder is not None:
        try_writing(settings.dead_letters.folder, "dead_letters.folder")
    available = os.sched_getaffinity(0)
    for node in settings.topology:
        if missing := sorted(set(node.cores or ()) - available):
            raise PipelineError(
                f"topology.{node.name}.cores: there is no core {missing[0]}; "
                f"there are {', '.join(map(str, sorted(available)))}"
            )
    metrics, source = settings.telemetry.metrics, settings.source
    wanted = [
        ("publish.endpoint", settings.publish.endpoint),
        ("publish.frames", settings.publish.frames),
        ("telemetry.metrics", f"tcp://{metrics}" if metrics else None),
        ("source.endpoint", source.endpoint if isinstance(source, FedSettings) else None),
    ]
    return _try_addresses([(what, endpoint) for what, endpoint in wanted if endpoint], keys)


def _try_addresses(wanted: Sequence[tuple[str, str]], keys: ServerKeys | None) -> list[Unavailable]:
    """Each address by itself, then every two together: whether they clash the system knows best."""
    not_now = {}
    for what, endpoint in wanted:
        try:
            with listening(endpoint, keys):
                pass
        except Unavailable as error:
            not_now[what] = Unavailable(f"{what}: {error}")
        except PipelineError as error:
            raise PipelineError(f"{what}: {error}") from error
    for (one, first), (other, second) in combinations(wanted, 2):
        free = one not in not_now and other not in not_now
        if first == second or (free and _clash(first, second, keys)):
            raise PipelineError(
                f"{other}: {second} is the address of {one}, too; each needs one of its own"
            )
    return list(not_now.values())


def _clash(first: str, second: str, keys: ServerKeys | None) -> bool:
    with listening(first, keys):
        try:
            with listening(second, keys):
                return False
        except AddressInUse:
            return True


def try_writing(folder: Path, what: str) -> None:
    """Raise PipelineError unless files can be made in a folder, or in the one it would be made in.

    what: the setting that names it.
    """
    try:
        there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise PipelineError(
            f"{what}: {folder} cannot be written ({error.strerror}); choose another folder, or let "
            "this user write there"
        ) from error


@contextmanager
def the_only_one(name: str) -> Iterator[None]:
    """Hold a pipeline's name on this machine; raises PipelineError if another holds it.

    The name is an address in the kernel's abstract namespace, which all users share: whatever ends
    the process frees it.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as lock:
        try:
            lock.bind(_address(name))
        except OSError as error:
            raise PipelineError(
                f"a pipeline named `{name}` runs on this machine already; stop it, or give this "
                "one another supervisor.name"
            ) from error
        yield


def is_running(name: str) -> bool:
    """True if a pipeline of this name runs on this machine."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as caller, suppress(OSError):
        caller.connect(_address(name))
        return True
    return False


def _address(name: str) -> str:
    return f"\0irst-{name}"
