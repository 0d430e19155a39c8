"""The commands of a live run: `run`, `check`, `keys`, `watch`, `record`, `replay-dead-letter`."""

import contextlib
import logging
import signal
import threading
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from pipeline.command import finite, on_end
from pipeline.config import PipelineConfig, load_config, open_source
from pipeline.errors import RunError, printable
from pipeline.summary import accounting_line, adds_up, print_accounting

log = logging.getLogger(__name__)

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
    from pipeline.runtime.surroundings import check_surroundings, the_only_one

    def read() -> PipelineConfig:
        return load_config(config, engine=engine, default_endpoint=DEFAULT_ENDPOINT)

    settings = read()
    configure_logs(settings.telemetry)
    console = _Terminal()
    end = None
    with the_only_one(settings.name):
        source = open_source(settings)
        sensor, shape = source.sensor, source.shape
        source.close()
        if in_use := check_surroundings(settings):
            raise in_use[0]
        supervisor = Supervisor(settings, "live", sensor, shape)
        on_end(supervisor.stop)
        signal.signal(signal.SIGUSR1, lambda _number, _frame: supervisor.reload(read))
        where = settings.publish.endpoint or "no endpoint (publish.endpoint is null)"
        status = Status(console, f"publishing {sensor.id} on {where}; Ctrl-C ends it")
        with supervisor, status:
            for message in supervisor.messages():
                status.add(message)
                end = message
                if end["schema"] == "irst.eos/1":
                    totals = {key: end[key] for key in ("frames_in", "published", "dropped")}
                    log.info("%s", accounting_line(end, adds_up(end)), extra={"fields": totals})
    balanced = end is not None and end["schema"] == "irst.eos/1" and adds_up(end)
    with contextlib.suppress(OSError):  # the terminal may be gone
        print_accounting(console, end if balanced else None, balanced=balanced)
    if not balanced:
        raise RunError("run: the stream did not end with totals that add up")


class _Terminal(Console):
    def on_broken_pipe(self) -> None:
        """Nobody reads on: no more is printed, and the run goes on."""
        with contextlib.suppress(SystemExit):
            super().on_broken_pipe()


class Status:
    """The first line, then, on a terminal, one a second: what went out, how old, what was lost.

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
        with contextlib.suppress(OSError):  # the terminal may go
            self._console.print(self._first_line, highlight=False, soft_wrap=True)
            if self._console.is_terminal:
                self._follow()

    def _follow(self) -> None:
        frames = targets = lost = 0
        while not self._ended.wait(1.0):
            now = self._frames, self._targets, self._lost
            oldest_ns, self._oldest_ns = self._oldest_ns, 0
            self._console.print(
                f"{now[0] - frames:.1f} frames/s, {now[1] - targets} targets/s, "
                f"oldest {oldest_ns / 1e6:.1f} ms, {now[2] - lost} lost",
                highlight=False,
                soft_wrap=True,
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
    from pipeline.runtime.surroundings import check_surroundings, is_running
    from pipeline.runtime.topology import flow_types

    settings = load_config(config, engine=engine, default_endpoint=DEFAULT_ENDPOINT)
    source = open_source(settings)
    source.close()
    in_use = check_surroundings(settings)
    notes = list(map(str, in_use))
    if is_running(settings.name):
        notes.insert(0, f"a pipeline named `{settings.name}` runs; this one must wait for its end")
    elif in_use:
        raise in_use[0]
    build_flow(settings, settings.stage_names, source.sensor, source.shape).close()
    console = Console()
    console.print(f"{settings.source_kind} → {source.sensor}", soft_wrap=True, markup=False)
    table = Table()
    headings = "node", "stages", "takes", "gives", "×", "queue", "if full", "ms"
    for heading in headings:
        table.add_column(heading, overflow="fold")
    for node, types in zip(settings.topology, flow_types(settings.topology), strict=True):
        numbers = str(node.replicas), str(node.queue), node.overflow, f"{node.budget_ms:g}"
        if node.cores is not None:
            notes.append(f"{node.name} runs on cores {', '.join(map(str, node.cores))}")
        table.add_row(node.name, " ".join(node.stages), *types, *numbers)
    console.print(table)
    published = settings.publish.endpoint or "no endpoint"
    admitted = "clients with keys only" if settings.publish.keys else "this machine only"
    print(f"publishes on {published} ({admitted}); config {settings.digest}")
    for note in notes:
        print(f"note: {note}")
    print("all well")


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
    every_s: Annotated[
        float, typer.Option(min=0.1, callback=finite, help="Seconds from look to look.")
    ] = 1.0,
) -> None:
    """Show a run's figures in the terminal, live."""
    from pipeline.watch import watch as look

    look(address, count, every_s)


def record(
    targets: Annotated[str, typer.Argument(help="The run's publish.endpoint.")],
    frames: Annotated[str, typer.Argument(help="The run's publish.frames.")],
    folder: Annotated[Path, typer.Argument(help="Where recordings go.")],
    max_gb: Annotated[
        float, typer.Option(min=0.001, callback=finite, help="Size of one recording.")
    ] = 4.0,
    keep: Annotated[
        int | None, typer.Option(min=1, help="Recordings to keep; the oldest go.")
    ] = None,
    keys: Annotated[Path | None, typer.Option(help="This client's folder of keys.")] = None,
) -> None:
    """Record frames and targets of a live run until it ends or Ctrl-C."""
    from pipeline.recorder import record as write

    stop = threading.Event()
    on_end(stop.set)
    print(write(targets, frames, folder, round(max_gb * 1e9), keep, keys, stop.is_set))


def replay_dead_letter(
    letters: Annotated[list[Path], typer.Argument(help="Files of dead_letters.folder.")],
) -> None:
    """Read malformed messages again with this release, and say what is wrong with each."""
    from pipeline.runtime.dead_letters import read_letter, replay_letter

    for path in letters:
        print(printable(f"{path.name}: {read_letter(path)['cause']}: {replay_letter(path)}"))
