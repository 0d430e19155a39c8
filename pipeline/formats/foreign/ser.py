"""SER, the planetary imagers' format (version 3): a header, raw frames, a trailer of timestamps.

The header's flag for the byte order is written by most programs against the description: 0 for
little-endian. It is read so, unless only the other order keeps to the header's pixel depth.
"""

import struct
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import PipelineError
from pipeline.formats.foreign.footage import Footage, stacked

HEADER = struct.Struct("<14s7i40s40s40s2q")
MAGIC = b"LUCAM-RECORDER"
MONO = 0
TICKS_TO_1970 = 621_355_968_000_000_000  # of 100 ns, from year 1


def read(path: Path) -> Footage:
    """Map the file; raises PipelineError if it is malformed, cut short, or in colour."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(HEADER.size)
    if len(head) < HEADER.size or not head.startswith(MAGIC):
        raise PipelineError(f"{path}: not a SER file; it must begin with {MAGIC.decode()}")
    _, _, colour, flag, width, height, depth, number, *_ = HEADER.unpack(head)
    if colour != MONO:
        raise PipelineError(f"{path}: colour id {colour}; frames must be grey (0)")
    if not (1 <= depth <= 16 and width > 0 and height > 0 and number > 0):
        raise PipelineError(
            f"{path}: {number} frames of {width}×{height} with {depth} bits; the header is damaged"
        )
    order = "<" if flag == 0 else ">"
    dtype = np.dtype(np.uint8) if depth <= 8 else np.dtype(f"{order}u2")
    frames_end = HEADER.size + number * width * height * dtype.itemsize
    trailer = size - frames_end
    if trailer not in (0, 8 * number):
        raise PipelineError(
            f"{path}: {number} frames of {width}×{height} need {frames_end} bytes, and "
            f"{8 * number} for timestamps, but the file has {size}; copy it again"
        )
    stack: NDArray[Any] = np.memmap(path, dtype, "r", HEADER.size, (number, height, width))
    full_scale = (1 << depth) - 1
    if dtype.itemsize == 2 and stack[0].max() > full_scale >= stack[0].byteswap().max():
        stack = stack.view(dtype.newbyteorder("S"))
    if trailer == 0:
        return stacked(path, stack, full_scale)
    ticks = np.memmap(path, "<i8", "r", frames_end, (number,))
    stamps_ns = [(int(tick) - TICKS_TO_1970) * 100 for tick in ticks]
    return stacked(path, stack, full_scale, timestamp_ns=stamps_ns)
