"""The `pipeline` command."""

import contextlib
import json
import signal
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from pipeline.command import Interrupted, finite, run_app
from pipeline.config import load_config, open_source
from pipeline.errors import PipelineError, RunError
from pipeline.evaluation.command import evaluate_detection
from pipeline.evaluation.fusion_command import evaluate_fusion
from pipeline.ingest import calibrate, convert
from pipeline.live import DEFAULT_ENDPOINT, ConfigOption, EngineOption, add_commands
from pipeline.runtime.settings import PublishSettings
from pipeline.summary import Summary, print_summary, score

app = typer.Typer(
    help="Resolve closely-spaced infrared targets in real time.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

MIN_RATE_HZ, MAX_RATE_HZ = 1e-3, 1e6


add_commands(app)
app.command()(evaluate_detection)
app.command()(evaluate_fusion)
app.command()(convert)
app.command()(calibrate)


def main() -> None:
    """Run the command."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, lambda number, _frame: sys.exit(128 + number))
    run_app(app, "pipeline")


@app.command()
def replay(
    recording: Annotated[Path, typer.Argument(help="Recording or CSIST dataset (zarr), or video.")],
    config: ConfigOption = None,
    engine: EngineOption = None,
    out: Annotated[
        Path | None, typer.Option(help="Write each target message as a line of JSON.")
    ] = None,
    in_process: Annotated[
        bool, typer.Option("--in-process", help="A plain loop instead of processes over ZeroMQ.")
    ] = False,
    rate: Annotated[str, typer.Option(help="Frames a second, or `max`.")] = "max",
    publish: Annotated[
        str | None, typer.Option(help=f"Publish to others too, e.g. {DEFAULT_ENDPOINT}.")
    ] = None,
    wait_for: Annotated[
        int | None, typer.Option(min=0, help="Start when so many others have subscribed.")
    ] = None,
) -> None:
    """Replay a recording: every frame, none dropped, and scored if it has truth."""
    from pipeline.runtime import replay as run

    source_settings = {**_file_source(recording), **_rate(rate)}
    given = {"endpoint": publish, "wait_for": wait_for}
    published = {name: value for name, value in given.items() if value is not None}
    settings = load_config(config, source=source_settings, engine=engine, publish=published)
    waits = settings.publish.wait_for and not in_process
    if waits and settings.publish.endpoint is None:
        raise PipelineError("--wait-for: nobody can subscribe without an endpoint; give --publish")
    console = Console()
    with contextlib.ExitStack() as stack:
        source = open_source(settings)
        stack.callback(source.close)
        lines = stack.enter_context(_open_output(out)) if out else None
        summary = Summary()
        if waits:
            _tell_of_waiting(settings.publish)
        messages = (run.in_process if in_process else run.over_zeromq)(settings, source)
        stack.callback(messages.close)  # type: ignore[attr-defined]
        progress = stack.enter_context(_progress())
        task = progress.add_task("replay", total=source.length)
        try:
            for message in messages:
                summary.add(message)
                if message["schema"] == "irst.targets/1":
                    progress.advance(task)
                    if out:
                        _write_line(out, lines, message)
        except (KeyboardInterrupt, SystemExit) as told:
            if summary.frames == 0:
                raise
            raise Interrupted(told, f"after {summary.frames} frames") from None
        truth = source.truth
    print_summary(console, summary, score(summary, truth) if truth is not None else None)
    if not summary.balanced:
        raise RunError("replay: the totals do not add up")
    if summary.dropped:
        raise RunError(f"replay: {len(summary.dropped)} frames could not be processed, see above")


@app.command()
def subscribe(
    endpoint: Annotated[str, typer.Argument(help=f"E.g. {DEFAULT_ENDPOINT}.")],
    as_json: Annotated[
        bool, typer.Option("--json", help="Every message as a line of JSON.")
    ] = False,
    count: Annotated[
        int | None, typer.Option(min=1, help="End after so many target messages.")
    ] = None,
    keys: Annotated[
        Path | None, typer.Option(help="This client's folder, made by `pipeline keys`.")
    ] = None,
) -> None:
    """Print the targets a pipeline publishes, until its stream ends."""
    from pipeline.client import subscribe as subscription
    from pipeline.wire import WIRE_MODELS

    schemas = tuple(WIRE_MODELS) if as_json else ("irst.targets/1",)
    seen = 0
    stream = subscription(endpoint, schemas=schemas, keys=keys)
    with contextlib.closing(stream):
        for message in stream:
            if as_json:
                print(json.dumps(message), flush=True)
            else:
                _print_targets(message)
            seen += message["schema"] == "irst.targets/1"
            if count is not None and seen >= count:
                break


def _print_targets(message: dict[str, Any]) -> None:
    columns = message["targets"]
    age_ms = message["age_ns"] / 1e6
    title = f"frame {message['frame_seq']}  {message['sensor_id']}  age {age_ms:.1f} ms"
    table = Table(title=title, title_justify="left")
    for heading in ("id", "group", "x px", "y px", "± px", "intensity", "±", "p", "flags"):
        table.add_column(heading, justify="right")
    for row in range(len(columns["id"])):
        xx, _, yy = columns["cov_px2"][row]
        table.add_row(
            str(columns["id"][row]),
            str(columns["group"][row]),
            f"{columns['x_px'][row]:.3f}",
            f"{columns['y_px'][row]:.3f}",
            f"{((xx + yy) / 2) ** 0.5:.3f}",
            f"{columns['intensity'][row]:.0f}",
            f"{columns['intensity_sigma'][row]:.0f}",
            f"{columns['p_exist'][row]:.2f}",
            " ".join(columns["flags"][row]),
        )
    Console().print(table)


@app.command()
def bench(
    frames: Annotated[int, typer.Option(min=20, help="Frames of each measurement.")] = 300,
    engine: EngineOption = None,
    live: Annotated[bool, typer.Option("--live", help="Live runs at full load instead.")] = False,
    fusion: Annotated[
        bool,
        typer.Option("--fusion", help="Live runs with a detector beside the flow and without."),
    ] = False,
    detector: Annotated[str, typer.Option(help="For --fusion; `recognise.engine`.")] = "yolo",
    seconds: Annotated[
        float, typer.Option(min=1.0, callback=finite, help="Of each live run.")
    ] = 60.0,
    soak: Annotated[
        float, typer.Option(min=0.0, callback=finite, help="Seconds of a soak, e.g. 600.")
    ] = 0.0,
) -> None:
    """Measure each stage and hop on this machine, or whole live runs, beside the budgets."""
    from pipeline.bench import run_bench
    from pipeline.bench_fusion import run_fusion_bench
    from pipeline.bench_live import run_live_bench

    if fusion:
        run_fusion_bench(frames, engine, seconds, detector)
    elif live:
        run_live_bench(frames, engine, seconds, soak)
    else:
        run_bench(frames, engine)


@app.command()
def show(
    targets: Annotated[Path, typer.Argument(help="What replay wrote with --out.")],
    count: Annotated[int, typer.Option(min=1, help="How many frames.")] = 5,
) -> None:
    """Print target messages from a file as tables."""
    from pipeline.picture import read_messages

    for message in list(read_messages(targets).values())[:count]:
        _print_targets(message)


@app.command()
def picture(
    recording: Annotated[Path, typer.Argument(help="The recording that was replayed.")],
    targets: Annotated[Path, typer.Argument(help="What replay wrote with --out.")],
    out: Annotated[Path, typer.Argument(help="PNG to write.")],
    frame: Annotated[int | None, typer.Option(help="Its number; without, one with groups.")] = None,
    config: ConfigOption = None,
) -> None:
    """Draw a frame with its groups, and one group enlarged with true and estimated positions."""
    from pipeline.picture import draw

    source = open_source(load_config(config, source=_file_source(recording)))
    try:
        number = draw(source, targets, out, frame)
    finally:
        source.close()
    print(f"wrote {out}: frame {number}")


def _file_source(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise PipelineError(f"{path}: no such file; give a zarr recording, a dataset or a video")
    return {"kind": "zarr_recording" if path.is_dir() else "video", "path": str(path)}


def _rate(rate: str) -> dict[str, Any]:
    if rate == "max":
        return {}
    with contextlib.suppress(ValueError):
        if MIN_RATE_HZ <= float(rate) <= MAX_RATE_HZ:
            return {"rate_hz": float(rate)}
    raise PipelineError(
        f"--rate must be max or frames a second from {MIN_RATE_HZ:g} to {MAX_RATE_HZ:g}, got {rate}"
    )


def _tell_of_waiting(publish: PublishSettings) -> None:
    who = f"{publish.wait_for} subscriber{'s' * (publish.wait_for > 1)}"
    print(f"waiting for {who} at {publish.endpoint}", file=sys.stderr, flush=True)


def _open_output(path: Path) -> Any:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return path.open("w", encoding="utf-8")
    except OSError as error:
        raise PipelineError(f"{path}: cannot write there ({error.strerror})") from error


def _write_line(path: Path, lines: Any, message: dict[str, Any]) -> None:
    try:
        lines.write(json.dumps(message) + "\n")
    except OSError as error:
        raise RunError(f"{path}: cannot be written ({error.strerror})") from error


def _progress() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    console = Console(stderr=True)
    return Progress(
        *columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal
    )
