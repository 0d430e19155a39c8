"""The `trainer` command."""

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from pipeline.command import run_app
from pipeline.formats.writable import check_png, check_writable
from trainer import clutter_commands, data_commands, engine_commands
from trainer.command import NetworkArgument, make_folder, need_torch, progress
from trainer.errors import TrainerError
from trainer.fit_config import BENCHMARK_SEED
from trainer.yolo import commands as yolo_commands

app = typer.Typer(
    help="Make the engines the pipeline runs: draw data, train, evaluate, export.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

app.command()(data_commands.generate)
app.command("import-csist")(data_commands.import_csist)
app.command("export-csist")(data_commands.export_csist)
app.command()(clutter_commands.draw_clutter)
app.command()(clutter_commands.fit_discriminant)
app.command()(yolo_commands.import_detector)
app.command()(engine_commands.export)
app.command("compile")(engine_commands.compile_engine)
app.command()(engine_commands.bench)


def main() -> None:
    """Run the command."""
    run_app(app, "trainer")


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
    need_torch()
    from trainer.distributed import joined
    from trainer.fit import fit as run_fit
    from trainer.fit_config import read_fit_config

    folder = out or Path("runs") / network
    if network == yolo_commands.NAME:
        if dataset is not None or device != "cpu":
            raise TrainerError("fit yolo: draws its frames, on the CPU; no --dataset or --device")
        yolo_commands.fit(config, folder, samples, seed, progress)
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

    if picture is not None:
        check_png(picture)
        need_torch()
    for out in (picture, json_out):
        if out is not None:
            make_folder(out.parent)
            check_writable(out)
    data = read_csist(dataset)
    if engine == MODEL:
        loaded = None
    elif engine is not None:
        loaded = load(engine, data.sensor)
    else:
        need_torch()
        from trainer.trained import load_trained

        loaded = load_trained(str(network), weights, data.sensor)
    title = str(engine) if loaded is None else loaded.manifest.name
    with loaded or nullcontext(), progress(title, len(data)) as show:
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
        make_folder(json_out.parent)
        check_writable(json_out)
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
    need_torch()
    from pipeline.formats.csist import read_csist
    from trainer import benchmark as measuring
    from trainer.benchmark_report import write_report

    systems = measuring.chosen(only)
    make_folder(out)
    images = read_csist(dataset) if dataset else measuring.draw_images(count, seed)
    with progress(f"{len(systems)} systems", len(systems) * len(images)) as show:
        results = measuring.run(images, systems, show)
    print(write_report(results, images, systems, out))
