"""PNG, before it is decoded: whole, and of no more pixels than its bytes can hold.

libpng complains on standard error in words of its own, and OpenCV sets aside what a damaged length
or size asks for, gigabytes perhaps.
"""

import struct
import zlib
from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

BEGINNING = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"
DEFLATED = 1032
"""Bytes that one byte of a compressed image can stand for, at most."""


class Header(NamedTuple):
    """Of an image, as OpenCV does not tell it: it stretches 1 to 4 bits and resolves palettes."""

    width: int
    height: int
    bits: int  # a sample
    colour: int  # 0: grey


def read_header(png: bytes) -> Header | None:
    """The header of a PNG; None if it is not a whole one."""
    if not _is_whole(png):
        return None
    header = Header(*struct.unpack_from(">IIBB", png, 16))
    possible = header.width * header.height * header.bits <= 8 * DEFLATED * len(png)
    return header if possible else None


def decode(png: bytes) -> NDArray[Any] | None:
    """The image as it is stored, (H, W) if it is grey; None if it is not a whole PNG."""
    if read_header(png) is None:
        return None
    try:
        return cv2.imdecode(np.frombuffer(png, np.uint8), cv2.IMREAD_UNCHANGED)
    except cv2.error:
        return None


def _is_whole(png: bytes) -> bool:
    """Whether all chunks are there, up to the end mark, each with the right checksum."""
    if not png.startswith(BEGINNING):
        return False
    start = 8
    while start + 12 <= len(png):
        length, kind = struct.unpack_from(">I4s", png, start)
        end = start + 12 + length
        if png[end - 4 : end] != struct.pack(">I", zlib.crc32(png[start + 4 : end - 4])):
            return False
        if kind == b"IEND":
            return True
        start = end
    return False
