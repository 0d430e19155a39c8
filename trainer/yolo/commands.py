"""The commands about detectors of frames."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Annotated

import typer

from trainer.errors import TrainerError

NAME = "yolo"
Progress = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]


def names(text: str | None) -> tuple[str, ...] | None:
    """Of a list with commas; None if nothing was given."""
    return tuple(name.strip() for name in text.split(",") if name.strip()) if text else None


def import_detector(
    model: Annotated[Path, typer.Argument(metavar="MODEL.onnx", help="A YOLO, exported.")],
    classes: Annotated[str, typer.Option(help="All its classes in order, with commas.")],
    point_sources: Annotated[str, typer.Option(help="Those of them that are targets.")],
    out: Annotated[Path, typer.Option(help="Folder for model and manifest.")] = Path(),
    box: Annotated[str, typer.Option(help="A raw column begins with: cxcywh or xyxy.")] = "cxcywh",
    stretch: Annotated[
        str, typer.Option(help="Of counts: percentile, noise or full_scale.")
    ] = "percentile",
    resize: Annotated[
        bool, typer.Option(help="Scale frames to the input; without, pixel by pixel in tiles.")
    ] = True,
    margin_px: Annotated[float, typer.Option(help="Of its boxes round a target.")] = 0.0,
    min_score: Annotated[float, typer.Option(help="Boxes below are not looked at.")] = 0.1,
    calibrate: Annotated[
        int, typer.Option(min=0, help="Drawn frames to calibrate scores on; 0: believe them.")
    ] = 0,
) -> None:
    """Write the manifest of an ONNX of YOLOv8/9/11 layout, so that `recognise` can run it."""
    from pydantic import ValidationError

    from engines.errors import first_fault
    from trainer.yolo.imported import import_detector as bring_in

    fields = {
        "point_sources": names(point_sources) or (),
        "box": box,
        "stretch": stretch,
        "resize": resize,
        "margin_px": margin_px,
        "min_score": min_score,
    }
    try:
        manifest = bring_in(model, out, names(classes) or (), calibrate, **fields)
    except ValidationError as error:
        raise TrainerError(f"import-detector: {first_fault(error)}") from error
    worth = "believed" if manifest.ece is None else f"calibration error {manifest.ece:.3f}"
    print(f"wrote {out / model.with_suffix('.json').name}: {manifest.output}, scores {worth}")


def fit(
    config: Path | None, folder: Path, samples: int | None, seed: int | None, progress: Progress
) -> None:
    """`trainer fit yolo`."""
    from trainer.yolo.fit import fit_yolo, read_yolo_fit

    run = read_yolo_fit(config, samples=samples, seed=seed)
    with progress("yolo", run.steps) as show:
        record = fit_yolo(run, folder, show)
    print(
        f"{folder}: {record['samples']} frames, loss {record['loss']:.3f}; "
        f"next: trainer export yolo --run {folder}"
    )


def export(checkpoint: Path, out: Path, name: str) -> None:
    """`trainer export yolo`."""
    from trainer.yolo.export import CALIBRATION_FRAMES, export_yolo

    manifest, difference = export_yolo(checkpoint, out, name, CALIBRATION_FRAMES)
    print(
        f"wrote {out / name}.onnx and .json: {manifest.parameters} parameters, at most "
        f"{difference:.1e} from torch, calibration error {manifest.ece:.3f}"
    )
