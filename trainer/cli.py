"""The `trainer` command."""

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from engines.build import Precision, Target
from pipeline.command import run_app
from trainer import clutter_commands
from trainer.errors import TrainerError
from trainer.fit_config import BENCHMARK_SEED
from trainer.yolo import commands as yolo_commands

app = typer.Typer(
    help="Make the engines the pipeline runs: draw data, train, evaluate, export.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

NetworkArgument = Annotated[
    str,
    typer.Argument(metavar="NETWORK", help="A file of trainer/networks; yolo: of whole frames."),
]


app.command()(clutter_commands.draw_clutter)
app.command()(clutter_commands.fit_discriminant)
app.command()(yolo_commands.import_detector)


def main() -> None:
    """Run the command."""
    run_app(app, "trainer")


@app.command()
def generate(
    out: Annotated[
        Path, typer.Argument(metavar="OUT.zarr", help="Zarr group to write; must not exist.")
    ],
    profile: Annotated[str, typer.Option(help="csist-100k, interior, field, scene or clutter.")],
    count: Annotated[int, typer.Option(min=1, help="Patches; for a scene, frames.")],
    seed: Annotated[int, typer.Option(min=0, help="The same seed draws the same data.")] = 0,
    backgrounds: Annotated[
        str | None, typer.Option(help="Of clutter, with commas: clouds,sea,…; without, all.")
    ] = None,
) -> None:
    """Draw a dataset of patches, or a recording of a scene, with its truth.

    A scene has bad pixels; they are marked in a PNG beside the recording.
    """
    from trainer import generate as drawing

    with _progress(f"{profile}, seed {seed}", count) as show:
        drawing.generate(profile, count, seed, out, show, yolo_commands.names(backgrounds))
    print(f"wrote {out}")
    if profile == drawing.SCENE:
        print(f"wrote {drawing.bad_pixels_path(out)}")


@app.command("import-csist")
def import_csist(
    folder: Annotated[
        Path,
        typer.Argument(metavar="DIR", help="CSIST-100K (train/, val/, test/), or a split of it."),
    ],
    out: Annotated[
        Path, typer.Argument(metavar="OUT.zarr", help="Zarr group to write; must not exist.")
    ],
    split: Annotated[
        str | None,
        typer.Option(help="train, val or test; without, DIR itself or the only one in it."),
    ] = None,
    profile: Annotated[str, typer.Option(help="Name to keep with the data.")] = "imported",
    full_scale: Annotated[
        int | None,
        typer.Option(min=1, max=65535, help="Counts; without, 255 or 65535 by the PNG's bits."),
    ] = None,
    read_noise: Annotated[float, typer.Option(min=0.0, help="Counts rms.")] = 0.0,
    gain: Annotated[
        float, typer.Option(help="Electrons per count; infinite without shot noise.")
    ] = math.inf,
    background: Annotated[float, typer.Option(min=0.0, help="Counts.")] = 0.0,
) -> None:
    """Turn the original CSIST-100K files (PNG + XML) into a dataset.

    The options after --split are what the files do not say.
    """
    from pipeline.formats.csist import save_csist
    from trainer import csist_files

    csist_files.refuse_existing(out)
    unwritten = csist_files.Unwritten(profile, full_scale, read_noise, gain, background)
    source = csist_files.split_folder(folder, split)
    pairs = csist_files.find_pairs(source)
    with _progress(str(source), len(pairs)) as show:
        dataset = csist_files.read_pairs(pairs, unwritten, show)
    save_csist(out, dataset)
    print(f"wrote {out}: {len(dataset)} images")


@app.command("export-csist")
def export_csist(
    dataset: Annotated[Path, typer.Argument(metavar="D.zarr", help="CSIST dataset (zarr).")],
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="Folder of the splits; the split must not exist.")
    ],
    split: Annotated[str, typer.Option(help="train, val or test.")] = "test",
) -> None:
    """Write a dataset in the layout of the original CSIST-100K files (PNG + XML)."""
    from pipeline.formats.csist import read_csist
    from trainer import csist_files

    data = read_csist(dataset)
    with _progress(f"{folder / split}", len(data)) as show:
        written = csist_files.write_files(folder, split, data, show)
    print(f"wrote {written}: {len(data)} images")
    options = csist_files.Unwritten.of(data).options()
    if options:
        print(f"the files hold no sensor, profile or seed; import them again with {options}")


@app.command()
def fit(
    network: NetworkArgument,
    config: Annotated[
        Path | None, typer.Option(help="YAML fields of the run; without, the defaults.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the run; without, runs/NETWORK.")
    ] = None,
    dataset: Annotated[
        Path | None, typer.Option(help="CSIST dataset (zarr) to train on; without, drawn data.")
    ] = None,
    samples: Annotated[int | None, typer.Option(min=1, help="Patches to train on in all.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Of weights and data.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
) -> None:
    """Train a network on data drawn as it trains, or on a dataset.

    The folder keeps checkpoint.pt, log.jsonl, loss.png and a file for TensorBoard. Interrupted,
    the same command goes on. Over several processes: torchrun --nproc-per-node N -m trainer fit …
    """
    _need_torch()
    from trainer.distributed import joined
    from trainer.fit import fit as run_fit
    from trainer.fit_config import read_fit_config

    folder = out or Path("runs") / network
    if network == yolo_commands.NAME:
        if dataset is not None or device != "cpu":
            raise TrainerError("fit yolo: draws its frames, on the CPU; no --dataset or --device")
        yolo_commands.fit(config, folder, samples, seed, _progress)
        return
    with joined(device) as team:
        fixed = str(dataset) if dataset else None
        run = read_fit_config(config, network, dataset=fixed, samples=samples, seed=seed)
        record = run_fit(run, folder, team)
    if record is not None:
        print(
            f"{folder}: {record['samples']} samples, loss {record['loss']:.2e}, "
            f"CSO-mAP {record['cso_map']:.4f}; next: trainer export {network} --run {folder}"
        )


@app.command()
def evaluate(
    dataset: Annotated[Path, typer.Option(help="CSIST dataset (zarr) to score on.")],
    network: Annotated[
        str | None, typer.Option(help="A file of trainer/networks, run in torch.")
    ] = None,
    weights: Annotated[
        Path | None, typer.Option(help="NAME.pt of `trainer export`; without, the shipped one.")
    ] = None,
    engine: Annotated[
        str | None,
        typer.Option(help="default, a shipped engine, a path of a .json or .onnx, or model: none."),
    ] = None,
    refine: Annotated[bool, typer.Option(help="Refine positions off the grid.")] = False,
    priors: Annotated[
        bool, typer.Option(help="Refine with the benchmark's own rules: intensities, separation.")
    ] = False,
    picture: Annotated[
        Path | None, typer.Option(help="Draw reliability and errors beside their bound: a PNG.")
    ] = None,
    json_out: Annotated[
        Path | None, typer.Option("--json", help="Write the figures here as JSON.")
    ] = None,
) -> None:
    """Score a network or an engine: CSO-mAP, counts, positions against the Cramér-Rao bound."""
    if (network is None) == (engine is None):
        raise TrainerError("evaluate: give either --network NAME or --engine NAME")
    if weights is not None and network is None:
        raise TrainerError("--weights: belongs to a network; give --network NAME with it")
    from pipeline.physics.model_only import MODEL

    if priors and not refine and engine != MODEL:
        raise TrainerError("--priors: are for the fit; give --refine with it")
    from engines.loader import load
    from pipeline.formats.csist import read_csist
    from trainer import evaluate as scoring

    for out in (picture, json_out):
        if out is not None:
            _make_folder(out.parent)
    if picture is not None:
        _need_torch()
    data = read_csist(dataset)
    if engine == MODEL:
        loaded = None
    elif engine is not None:
        loaded = load(engine, data.sensor)
    else:
        _need_torch()
        from trainer.trained import load_trained

        loaded = load_trained(str(network), weights, data.sensor)
    title = str(engine) if loaded is None else loaded.manifest.name
    with loaded or nullcontext(), _progress(title, len(data)) as show:
        figures = scoring.evaluate(
            data, loaded, show, refined=refine, priors=priors, picture=picture
        )
    scoring.print_figures(figures, Console())
    if json_out is not None:
        json_out.write_text(json.dumps(figures, indent=2, allow_nan=False) + "\n")


@app.command()
def robustness(
    engine: Annotated[str, typer.Option(help="A shipped engine or a path.")] = "default",
    count: Annotated[int, typer.Option(min=1, help="Patches of each case.")] = 2000,
    seed: Annotated[int, typer.Option(min=0, help="Of the patches.")] = 1,
    json_out: Annotated[
        Path | None, typer.Option("--json", help="Write the rows here too.")
    ] = None,
) -> None:
    """What comes out of hard cases: crowds, borders, saturation, bad pixels, extended objects."""
    from engines.loader import load
    from trainer import robustness as hard

    if json_out is not None:
        _make_folder(json_out.parent)
    with load(engine, hard.SENSOR) as loaded:
        rows = hard.robustness(loaded, count, seed)
    hard.print_robustness(rows, Console())
    if json_out is not None:
        json_out.write_text(json.dumps(rows, indent=2, allow_nan=False) + "\n")


@app.command()
def benchmark(
    out: Annotated[Path, typer.Option(help="Folder for the table, its figures and pictures.")],
    dataset: Annotated[
        Path | None, typer.Option(help="CSIST dataset (zarr); without, drawn from --seed.")
    ] = None,
    count: Annotated[int, typer.Option(min=1, help="Images to draw.")] = 10_000,
    seed: Annotated[int, typer.Option(min=0, help="Of the images.")] = BENCHMARK_SEED,
    only: Annotated[
        list[str] | None, typer.Option(help="Title of a system; may be repeated. Without, all.")
    ] = None,
) -> None:
    """Score all systems of the literature, with their shipped weights, on the same images.

    Writes benchmark.md, benchmark.json, benchmark.png (bars) and maps.png.
    """
    _need_torch()
    from pipeline.formats.csist import read_csist
    from trainer import benchmark as measuring
    from trainer.benchmark_report import write_report

    systems = measuring.chosen(only)
    _make_folder(out)
    images = read_csist(dataset) if dataset else measuring.draw_images(count, seed)
    with _progress(f"{len(systems)} systems", len(systems) * len(images)) as show:
        results = measuring.run(images, systems, show)
    print(write_report(results, images, systems, out))


@app.command()
def export(
    network: NetworkArgument,
    run: Annotated[
        Path | None, typer.Option(help="Folder of the run; without, runs/NETWORK.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder to write to.")] = Path(),
    name: Annotated[str | None, typer.Option(help="Of the engine; without, the network's.")] = None,
) -> None:
    """Turn a trained run into an engine: NAME.onnx, its manifest NAME.json, its weights NAME.pt.

    The engine is compared with torch first; one that differs is not written.
    """
    _need_torch()
    from trainer.export import export as write_engine
    from trainer.fit import CHECKPOINT

    checkpoint = (run or Path("runs") / network) / CHECKPOINT
    _make_folder(out)
    if network == yolo_commands.NAME:
        yolo_commands.export(checkpoint, out, name or network)
        return
    manifest, difference = write_engine(network, checkpoint, out, name or network)
    print(
        f"wrote {out / manifest.name}.onnx, .json and .pt: {manifest.parameters} parameters, "
        f"at most {difference:.1e} from torch"
    )


@app.command("compile")
def compile_engine(
    model: Annotated[Path, typer.Argument(metavar="MODEL.onnx", help="With its manifest beside.")],
    target: Annotated[Target, typer.Option(help="What is to run it.")],
    out: Annotated[
        Path | None, typer.Option(help="Folder to write to; without, the model's own.")
    ] = None,
    precision: Annotated[
        Precision | None, typer.Option(help="Without, the fastest that is good enough.")
    ] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Of the CPU; without, what is fastest.")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, max=4096, help="Patches to tune it for.")] = 16,
    max_batch: Annotated[int, typer.Option(min=1, max=4096, help="Patches at a time.")] = 64,
    optimisation_level: Annotated[
        int, typer.Option(min=0, max=5, help="Of TensorRT's builder.")
    ] = 3,
) -> None:
    """Build an engine for a target: NAME.TARGET.json and its model file.

    It is compared with torch in f32 on held-out patches first, maps and CSO-mAP, and not written
    if it is worse than allowed.
    """
    _need_torch()
    from trainer.compile import Wish, compile_model
    from trainer.compile_report import print_candidates
    from trainer.yolo.compiled import compile_detector, is_detector

    wish = Wish(target, precision, threads, min(batch, max_batch), max_batch, optimisation_level)
    console = Console(stderr=True)
    if is_detector(model):
        made = compile_detector(model, wish, out or model.parent, console.print)
        print(f"wrote {(out or model.parent) / made.name}.json and its model")
        return
    chosen, candidates = compile_model(
        model, wish, out or model.parent, lambda line: console.print(line, highlight=False)
    )
    print_candidates(candidates, chosen, Console())
    print(f"wrote {(out or model.parent) / chosen.name}.json and its model")


@app.command()
def bench(
    out: Annotated[Path, typer.Option(help="Folder for bench.json and bench.png.")] = Path(
        "out/bench"
    ),
    engine: Annotated[
        list[str] | None, typer.Option(help="A shipped engine; may be repeated.")
    ] = None,
    network: Annotated[
        list[str] | None,
        typer.Option(help="A file of trainer/networks at its full size; may be repeated."),
    ] = None,
    batch: Annotated[
        list[int] | None,
        typer.Option(min=1, max=4096, help="Patches at a time; may be repeated."),
    ] = None,
    seconds: Annotated[float, typer.Option(min=0.01, help="Of each measurement.")] = 1.0,
) -> None:
    """Patches/s and latency on each backend and precision here, beside plain PyTorch.

    Without --engine and --network: DISTA-Net at full size and the default engine.
    """
    _need_torch()
    from tempfile import TemporaryDirectory

    from trainer import bench as measuring
    from trainer.bench_report import report

    _make_folder(out)
    console = Console(stderr=True)
    engines, networks = engine or [], network or []
    if not engines and not networks:
        engines, networks = ["off_grid_any"], ["dista_net"]
    with TemporaryDirectory(prefix="irst-") as folder:
        subjects = [
            *(measuring.untrained(name, Path(folder)) for name in networks),
            *(measuring.shipped(name) for name in engines),
        ]
        rows = measuring.bench(
            subjects,
            sorted(batch or measuring.BATCHES),
            seconds,
            lambda line: console.print(line, highlight=False),
        )
    report(rows, out, Console())


def _need_torch() -> None:
    missing = [
        name
        for name in ("torch", "onnx", "onnxscript", "matplotlib", "tensorboardX")
        if not _found(name)
    ]
    if missing:
        raise TrainerError(
            f'needs {", ".join(missing)}, not installed: pip install "irst-pipeline[train]"'
        )


def _found(library: str) -> bool:
    return find_spec(library) is not None


def _make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TrainerError(f"{path}: cannot write there ({error.strerror})") from error


@contextmanager
def _progress(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar on standard error that appears with the first step, so not before an error."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    bar = Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True))
    task = bar.add_task(what, total=total)

    def show(done: int) -> None:
        bar.start()
        bar.update(task, completed=done)

    try:
        yield show
    finally:
        if bar.live.is_started:
            bar.stop()
