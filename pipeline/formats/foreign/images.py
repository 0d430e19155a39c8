"""PNG and TIFF, one page or many, grey with 8 or 16 bits; no timestamps finer than a second."""

import mmap
import struct
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from pipeline.errors import PipelineError
from pipeline.formats.foreign.footage import Footage, check_dtype, counts, largest
from pipeline.formats.png import decode

cv2.utils.logging.setLogLevel(
    cv2.utils.logging.LOG_LEVEL_SILENT
)  # errors are told in our own words

MAX_PAGES = 1 << 20
LAYOUTS = {42: (4, "H", 12, "I"), 43: (8, "Q", 20, "Q")}
"""TIFF and BigTIFF: where the first directory's offset is, count, entry's bytes, offset."""


def read(path: Path) -> Footage:
    """Open an image file; raises PipelineError if its first page cannot be decoded or is colour."""
    pages = 1 if path.suffix.lower() == ".png" else _pages(path)

    def name(index: int) -> str:
        return f"{path}: page {index}" if pages > 1 else str(path)

    first_HW = _page(path, 0, name(0))
    height, width = first_HW.shape

    def page(index: int) -> NDArray[Any]:
        pixels_HW = _page(path, index, name(index))
        if pixels_HW.shape != first_HW.shape:
            raise PipelineError(
                f"{name(index)}: is {pixels_HW.shape[1]}×{pixels_HW.shape[0]}, but the first page "
                f"{width}×{height}; all frames must be of one size"
            )
        return pixels_HW

    return Footage((height, width), pages, largest(first_HW.dtype), page, name)


def _pages(path: Path) -> int:
    """Images of a TIFF, by the chain of its directories, which OpenCV follows only while it can."""
    if path.stat().st_size < 8:
        raise PipelineError(f"{path}: not a TIFF file; convert or copy it again")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        order = ">" if data[:2] == b"MM" else "<"
        (kind,) = struct.unpack_from(f"{order}H", data, 2)
        if data[:2] not in (b"II", b"MM") or kind not in LAYOUTS:
            raise PipelineError(f"{path}: not a TIFF file; convert or copy it again")
        place, count, entry, offset = LAYOUTS[kind]
        pages = 0
        try:
            (at,) = struct.unpack_from(order + offset, data, place)
            while at and pages < MAX_PAGES:
                (entries,) = struct.unpack_from(order + count, data, at)
                end = at + struct.calcsize(count) + entries * entry
                (at,) = struct.unpack_from(order + offset, data, end)
                pages += 1
        except struct.error:
            at = -1
    if at or not pages:
        raise PipelineError(
            f"{path}: its directory ends after {pages} pages; the file is damaged or cut short"
        )
    return pages


def _page(path: Path, index: int, where: str) -> NDArray[Any]:
    try:
        if path.suffix.lower() == ".png":
            image = decode(path.read_bytes())
        else:
            done, pages = cv2.imreadmulti(str(path), index, 1, flags=cv2.IMREAD_UNCHANGED)
            image = pages[0] if done and len(pages) else None
    except (cv2.error, OSError):
        image = None
    if image is None:
        raise PipelineError(f"{where}: cannot be decoded; the file is damaged or cut short")
    if image.ndim != 2:
        raise PipelineError(f"{where}: is colour; frames must be grey, with 8 or 16 bits")
    check_dtype(path, image.dtype)
    return counts(np.asarray(image), where)
