"""Files of the trade, read frame by frame: one module a format, chosen by the file's suffix."""

import re
from bisect import bisect_right
from collections.abc import Callable
from importlib import import_module
from itertools import accumulate
from pathlib import Path

from pipeline.errors import PipelineError
from pipeline.formats.foreign.footage import Footage

READERS = {
    ".npy": "npy",
    ".png": "images",
    ".tif": "images",
    ".tiff": "images",
    ".fits": "fits",
    ".fit": "fits",
    ".fts": "fits",
    ".ser": "ser",
    ".hdr": "envi",
    ".img": "envi",
    ".dat": "envi",
    ".raw": "envi",
    ".bsq": "envi",
    ".bil": "envi",
    ".bip": "envi",
}


def open_footage(path: Path) -> Footage:
    """Open a file, or a folder of them in the order of their names (2 before 10).

    Raises PipelineError naming a file that is missing, of no known format, or malformed.
    """
    if path.is_dir():
        return _folder(path)
    if not path.is_file():
        raise PipelineError(f"{path}: no such file or folder; check the path")
    return _reader(path)(path)


def _reader(path: Path) -> Callable[[Path], Footage]:
    name = READERS.get(path.suffix.lower())
    if name is None:
        raise PipelineError(
            f"{path}: not a format known here; convert reads {', '.join(sorted(READERS))}, "
            "and folders of such files"
        )
    reader: Callable[[Path], Footage] = import_module(f"pipeline.formats.foreign.{name}").read
    return reader


def _folder(path: Path) -> Footage:
    """All files of the one suffix there is in the folder, one after the other."""
    files = [file for file in path.iterdir() if not file.name.startswith(".") and file.is_file()]
    known = sorted((file for file in files if file.suffix.lower() in READERS), key=_natural)
    suffixes = sorted({file.suffix.lower() for file in known})
    if len(suffixes) != 1:
        found = f"files of {', '.join(suffixes)}" if suffixes else "no image files"
        raise PipelineError(f"{path}: holds {found}; give a folder of one kind of image")
    parts = [_reader(file)(file) for file in known]
    first = parts[0]
    for file, part in zip(known, parts, strict=True):
        if part.shape != first.shape:
            raise PipelineError(
                f"{file}: is {part.shape[1]}×{part.shape[0]}, but {known[0].name} before it "
                f"{first.shape[1]}×{first.shape[0]}; all frames must be of one size"
            )
    begins = [0, *accumulate(part.length for part in parts)]
    stamps = [part.timestamp_ns for part in parts]
    known_stamps = [stamp for part in stamps if part is not None for stamp in part]

    def place(index: int) -> tuple[int, int]:
        part = bisect_right(begins, index) - 1
        return part, index - begins[part]

    return Footage(
        shape=first.shape,
        length=begins[-1],
        full_scale=max(part.full_scale for part in parts),
        read=lambda index: parts[place(index)[0]].read(place(index)[1]),
        timestamp_ns=known_stamps if None not in stamps else None,
        start_ns=first.start_ns,
        name=lambda index: parts[place(index)[0]].name(place(index)[1]),
    )


def _natural(file: Path) -> list[tuple[int, int, str]]:
    """Numbers in names by their value."""
    pieces = re.split(r"(\d+)", file.name)
    return [(1, int(piece), "") if piece.isdigit() else (0, 0, piece) for piece in pieces]
