"""The PNG of one CSIST-100K image: 11 × 11 pixels, 8- or 16-bit grey.

Errors do not name the file; the caller does.
"""

import struct
import zlib
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from pipeline.physics.groups import SIZE_PX
from trainer.errors import TrainerError

FULL_SCALE = {8: 255, 16: 65535}
"""Counts by the PNG's bits, unless told otherwise."""


def bits_of(image: NDArray[Any]) -> int:
    """Bits a pixel of uint8 or uint16 images."""
    return 8 * image.dtype.itemsize


def decode_image(png: bytes) -> NDArray[Any]:
    """(11, 11) uint8 or uint16, in counts; raises TrainerError for any other PNG."""
    if not _is_whole(png):
        raise TrainerError("not a PNG, truncated or damaged; copy it again")
    # The header itself: OpenCV stretches 1 to 4 bits to 8 and turns a palette into colours.
    width, height, bits, colour = struct.unpack_from(">IIBB", png, 16)
    if colour != 0 or bits not in FULL_SCALE:
        kind = f"{bits}-bit {'grey' if colour == 0 else 'colour, palette or alpha'}"
        raise TrainerError(f"must be an 8- or 16-bit grey PNG, got {kind}; convert it")
    if (width, height) != (SIZE_PX, SIZE_PX):
        raise TrainerError(
            f"must be {SIZE_PX}×{SIZE_PX} pixels, got {width}×{height}; crop or remove it"
        )
    image = cv2.imdecode(np.frombuffer(png, np.uint8), cv2.IMREAD_UNCHANGED)
    if image is None or image.shape != (SIZE_PX, SIZE_PX):
        raise TrainerError("cannot be decoded as a grey PNG; write it again")
    return image


def encode_image(image: NDArray[Any]) -> bytes:
    """The PNG of (11, 11) uint8 or uint16."""
    _, png = cv2.imencode(".png", image)
    return png.tobytes()


def _is_whole(png: bytes) -> bool:
    """Whether all chunks are there, up to the end mark, each with the right checksum.

    Checked here because libpng complains on standard error, in words of its own.
    """
    if not png.startswith(b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"):
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
