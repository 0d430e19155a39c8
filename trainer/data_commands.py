"""The commands that make and convert data."""

import math
from pathlib import Path
from typing import Annotated

import typer

from trainer.command import progress
from trainer.yolo import commands as yolo_commands


def generate(
    out: Annotated[
        Path, typer.Argument(metavar="OUT.zarr", help="Zarr group to write; must not exist.")
    ],
    profile: Annotated[
        str, typer.Option(help="csist-100k, interior, field, sensors, scene or clutter.")
    ],
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

    with progress(f"{profile}, seed {seed}", count) as show:
        drawing.generate(profile, count, seed, out, show, yolo_commands.names(backgrounds))
    print(f"wrote {out}")
    if profile == drawing.SCENE:
        print(f"wrote {drawing.bad_pixels_path(out)}")


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
    with progress(str(source), len(pairs)) as show:
        dataset = csist_files.read_pairs(pairs, unwritten, show)
    save_csist(out, dataset)
    print(f"wrote {out}: {len(dataset)} images")


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
    with progress(f"{folder / split}", len(data)) as show:
        written = csist_files.write_files(folder, split, data, show)
    print(f"wrote {written}: {len(data)} images")
    options = csist_files.Unwritten.of(data).options()
    if options:
        print(f"the files hold no sensor, profile or seed; import them again with {options}")
