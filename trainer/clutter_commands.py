"""The commands about detection over clutter."""

from pathlib import Path
from typing import Annotated

import typer

from trainer.command import progress

SeedOption = Annotated[int, typer.Option(min=0, help="The same seed draws the same pictures.")]


def draw_clutter(
    out: Annotated[
        Path, typer.Argument(metavar="DIR", help="Folder to make images/ and masks/ in.")
    ],
    count: Annotated[int, typer.Option(min=1, help="Pictures.")] = 100,
    seed: SeedOption = 0,
) -> None:
    """Draw pictures of synthetic clutter with small targets, and their masks."""
    from trainer.clutter import write_pictures

    with progress(f"clutter, seed {seed}", count) as show:
        write_pictures(out, count, seed, show)
    print(f"wrote {out / 'images'} and {out / 'masks'}")


def fit_discriminant(
    out: Annotated[Path, typer.Argument(metavar="OUT.json", help="Weights and calibration.")],
    count: Annotated[
        int, typer.Option(min=10, help="Pictures to fit; as many to calibrate.")
    ] = 2000,
    seed: SeedOption = 1,
) -> None:
    """Fit what the detector `local_contrast` tells targets from clutter by."""
    from trainer.discriminant import fit_discriminant as fit

    for name, value in fit(out, count, seed).items():
        print(f"{name}: {value:.3f}")
    print(f"wrote {out}")
