"""The commands that make engines of trained networks, and measure them."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from engines.build import Precision, Target
from trainer.command import NetworkArgument, make_folder, need_torch
from trainer.errors import TrainerError
from trainer.yolo import commands as yolo_commands


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
    need_torch()
    from trainer.export import export as write_engine
    from trainer.fit import CHECKPOINT

    checkpoint = (run or Path("runs") / network) / CHECKPOINT
    make_folder(out)
    if network == yolo_commands.NAME:
        yolo_commands.export(checkpoint, out, name or network)
        return
    manifest, difference = write_engine(network, checkpoint, out, name or network)
    print(
        f"wrote {out / manifest.name}.onnx, .json and .pt: {manifest.parameters} parameters, "
        f"at most {difference:.1e} from torch"
    )


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
    if model.suffix != ".onnx":
        raise TrainerError(
            f"{model}: not an .onnx; give NAME.onnx with its manifest NAME.json beside"
        )
    if not model.is_file():
        raise TrainerError(f"{model}: no such model; `trainer export` writes model and manifest")
    need_torch()
    from trainer.build import Wish
    from trainer.compile import compile_model
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
    need_torch()
    from tempfile import TemporaryDirectory

    from trainer import bench as measuring
    from trainer.bench_report import report

    make_folder(out)
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
