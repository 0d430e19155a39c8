"""The PNG of one CSIST-100K image: 11 × 11 pixels, 8- or 16-bit grey.

Errors do not name the file; the caller does.
"""

from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from pipeline.formats.png import read_header
from pipeline.physics.groups import SIZE_PX
from trainer.errors import TrainerError

FULL_SCALE = {8: 255, 16: 65535}
"""Counts by the PNG's bits, unless told otherwise."""


def bits_of(image: NDArray[Any]) -> int:
    """Bits a pixel of uint8 or uint16 images."""
    return 8 * image.dtype.itemsize


def decode_image(png: bytes) -> NDArray[Any]:
    """(11, 11) uint8 or uint16, in counts; raises TrainerError for any other PNG."""
    if (header := read_header(png)) is None:
        raise TrainerError("not a PNG, truncated or damaged; copy it again")
    width, height, bits, colour = header
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
