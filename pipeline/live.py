"""The commands of a live run: `run`, `check`, `keys`, `watch`, `record`, `replay-dead-letter`."""

import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from pipeline.config import PipelineConfig, load_config, open_source
from pipeline.errors import PipelineError, RunError
from pipeline.summary import adds_up, print_accounting

ConfigOption = Annotated[Path | None, typer.Option("--config", help="YAML configuration.")]
EngineOption = Annotated[
    str | None, typer.Option("--engine", help="Name of a shipped engine, or path of a manifest.")
]
DEFAULT_ENDPOINT = "tcp://127.0.0.1:5556"
DEFAULT_METRICS = "127.0.0.1:9464"


def add_commands(app: typer.Typer) -> None:
    """Give the commands of this file to the `pipeline` command."""
    for command in (run, check, keys, watch, record, replay_dead_letter):
        app.command()(command)


def run(config: ConfigOption = None, engine: EngineOption = None) -> None:
    """Run beside a sensor until Ctrl-C: publish targets, shed the oldest frames under overload."""
    from pipeline.runtime.logs import configure_logs
    from pipeline.runtime.supervisor import Supervisor

    settings = load_config(config, engine=engine, default_endpoint=DEFAULT_ENDPOINT)
    configure_logs(settings.telemetry)
    source = open_source(settings)
    sensor, shape = source.sensor, source.shape
    source.close()
    console = Console()
    end = None
    supervisor = Supervisor(settings, "live", sensor, shape)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda _number, _frame: supervisor.stop())
    where = settings.publish.endpoint or "no endpoint (publish.endpoint is null)"
    status = Status(console, f"publishing {sensor.id} on {where}; Ctrl-C ends it")

    def read_again() -> PipelineConfig:
        return load_config(config, engine=engine, default_endpoint=DEFAULT_ENDPOINT)

    signal.signal(signal.SIGUSR1, lambda _number, _frame: supervisor.reload(read_again))
    with the_only_one(settings.supervisor.name or sensor.id), supervisor, status:
        for message, _ in supervisor.messages():
            status.add(message)
            end = message
    balanced = end is not None and end["schema"] == "irst.eos/1" and adds_up(end)
    print_accounting(console, end if balanced else None, balanced=balanced)
    if not balanced:
        raise RunError("run: the stream did not end with totals that add up")


@contextmanager
def the_only_one(name: str) -> Iterator[None]:
    """Hold a pipeline's name on this machine; raises PipelineError if another holds it.

    The name is an address in the kernel's abstract namespace: whatever ends the process frees it.
    """
    with socket.socket(socket.AF_UNIX) as lock:
        try:
            lock.bind(f"\0irst-{os.getuid()}-{name}")
        except OSError as error:
            raise PipelineError(
                f"a pipeline named `{name}` runs on this machine already; stop it, or give this "
                "one another supervisor.name"
            ) from error
        yield


class Status:
    """The first line, then one a second: what went out, how old it was, what was lost.

    A thread of its own prints it, so that a terminal that is held up holds up no frame.
    """

    def __init__(self, console: Console, first_line: str) -> None:
        self._console, self._first_line = console, first_line
        self._frames, self._targets, self._lost, self._oldest_ns = 0, 0, 0, 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._print, name="status", daemon=True)

    def add(self, message: dict[str, Any]) -> None:
        """Count a message."""
        if message["schema"] == "irst.targets/1":
            self._frames += 1
            self._targets += len(message["targets"]["id"])
            self._oldest_ns = max(self._oldest_ns, message["age_ns"])
        elif message["schema"] == "irst.gap/1":
            self._lost += 1

    def _print(self) -> None:
        self._console.print(self._first_line, highlight=False)
        frames = targets = lost = 0
        while not self._ended.wait(1.0):
            now = self._frames, self._targets, self._lost
            oldest_ns, self._oldest_ns = self._oldest_ns, 0
            self._console.print(
                f"{now[0] - frames:.1f} frames/s, {now[1] - targets} targets/s, "
                f"oldest {oldest_ns / 1e6:.1f} ms, {now[2] - lost} lost",
                highlight=False,
            )
            frames, targets, lost = now

    def __enter__(self) -> "Status":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()


def check(config: ConfigOption = None, engine: EngineOption = None) -> None:
    """Check a configuration without running it, and print the flow it gives."""
    from pipeline.runtime.flow import build_flow
    from pipeline.runtime.topology import flow_types

    settings = load_config(config, engine=engine, default_endpoint=DEFAULT_ENDPOINT)
    source = open_source(settings)
    build_flow(settings, settings.stage_names, source.sensor, source.shape).close()
    source.close()
    notes = check_surroundings(settings, source.sensor.id)
    table = Table(title=f"{settings.source_kind} → {source.sensor}", title_justify="left")
    headings = "node", "stages", "takes", "gives", "×", "queue", "if full", "ms"
    for heading in headings:
        table.add_column(heading)
    for node, types in zip(settings.topology, flow_types(settings.topology), strict=True):
        numbers = str(node.replicas), str(node.queue), node.overflow, f"{node.budget_ms:g}"
        if node.cores is not None:
            notes.append(f"{node.name} runs on cores {', '.join(map(str, node.cores))}")
        table.add_row(node.name, " ".join(node.stages), *types, *numbers)
    Console().print(table)
    published = settings.publish.endpoint or "no endpoint"
    admitted = "clients with keys only" if settings.publish.keys else "this machine only"
    print(f"publishes on {published} ({admitted}); config {settings.digest}")
    for note in notes:
        print(f"note: {note}")
    print("all well")


def check_surroundings(settings: PipelineConfig, sensor_id: str) -> list[str]:
    """Keys, folders, cores and addresses as the run will need them; returns what may be so.

    Raises PipelineError for what cannot work. An address in use is a note: the run that is to be
    replaced may hold it.
    """
    from pipeline.runtime.dead_letters import DeadLetters
    from pipeline.runtime.telemetry import Telemetry
    from pipeline.transport.publish import Publisher
    from pipeline.transport.security import ServerKeys
    from pipeline.transport.sockets import AddressInUse

    publish = settings.publish
    if publish.keys:
        ServerKeys.load(publish.keys)
    DeadLetters(settings.dead_letters, settings.digest)
    available = os.sched_getaffinity(0)
    for node in settings.topology:
        if missing := sorted(set(node.cores or ()) - available):
            raise PipelineError(
                f"topology.{node.name}.cores: there is no core {missing[0]}; "
                f"there are {', '.join(map(str, sorted(available)))}"
            )
    notes: list[str] = []
    for endpoint in filter(None, (publish.endpoint, publish.frames)):
        try:
            Publisher([endpoint], sensor_id, 1, lossless=False).close()
        except AddressInUse as error:
            notes.append(str(error))
    try:
        with Telemetry().served(settings.telemetry.metrics):
            pass
    except AddressInUse as error:
        notes.append(str(error))
    return notes


def keys(
    folder: Annotated[Path, typer.Argument(help="Where the keys go; made if it is not there.")],
    client: Annotated[str, typer.Option(help="Name of the client to let in.")] = "client",
) -> None:
    """Make CURVE keys: for the pipeline, if it has none, and for one client."""
    from pipeline.transport.security import make_keys

    own = make_keys(folder, client)
    print(f"pipeline: publish: {{keys: {folder / 'server'}}}")
    print(f"client:   move {own} there, then pipeline subscribe ENDPOINT --keys {own.name}")


def watch(
    address: Annotated[str, typer.Argument(help="The run's telemetry.metrics.")] = DEFAULT_METRICS,
    count: Annotated[int | None, typer.Option(min=1, help="End after so many looks.")] = None,
    every_s: Annotated[float, typer.Option(min=0.1, help="Seconds from look to look.")] = 1.0,
) -> None:
    """Show a run's figures in the terminal, live."""
    from pipeline.watch import watch as look

    look(address, count, every_s)


def record(
    targets: Annotated[str, typer.Argument(help="The run's publish.endpoint.")],
    frames: Annotated[str, typer.Argument(help="The run's publish.frames.")],
    folder: Annotated[Path, typer.Argument(help="Where recordings go.")],
    max_gb: Annotated[float, typer.Option(min=0.001, help="Size of one recording.")] = 4.0,
    keep: Annotated[
        int | None, typer.Option(min=1, help="Recordings to keep; the oldest go.")
    ] = None,
    keys: Annotated[Path | None, typer.Option(help="This client's folder of keys.")] = None,
) -> None:
    """Record frames and targets of a live run until it ends or Ctrl-C."""
    from pipeline.recorder import record as write

    print(write(targets, frames, folder, round(max_gb * 1e9), keep, keys))


def replay_dead_letter(
    letters: Annotated[list[Path], typer.Argument(help="Files of dead_letters.folder.")],
) -> None:
    """Read malformed messages again with this release, and say what is wrong with each."""
    from pipeline.runtime.dead_letters import read_letter, replay_letter

    for path in letters:
        print(f"{path.name}: {read_letter(path)['cause']}: {replay_letter(path)}")
