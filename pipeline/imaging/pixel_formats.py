"""Pixel formats of cameras into counts: the grey ones of GenICam's Pixel Format Naming Convention.

Mono10 … Mono16 take two bytes a pixel, little-endian. Mono10p, Mono12p, Mono14p are one stream of
bits, lowest first. Mono10Packed and Mono12Packed are GigE Vision's own: two pixels in three bytes,
the high eight bits of each in the outer ones.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

BITS = {
    "Mono8": 8,
    "Mono10": 10,
    "Mono12": 12,
    "Mono14": 14,
    "Mono16": 16,
    "Mono10Packed": 10,
    "Mono12Packed": 12,
    "Mono10p": 10,
    "Mono12p": 12,
    "Mono14p": 14,
}

GROUPS = {10: (4, 5), 12: (2, 3), 14: (4, 7)}  # pixels and bytes that a stream of bits repeats in


def unpack(payload: Any, pixel_format: str, shape: tuple[int, int]) -> NDArray[Any]:
    """Counts (H, W), uint8 or uint16; raises ValueError on bytes too few or an unknown format."""
    if pixel_format not in BITS:
        raise ValueError(f"pixel format {pixel_format} is none of {', '.join(BITS)}")
    number = shape[0] * shape[1]
    data = np.frombuffer(payload, np.uint8)
    wanted = payload_bytes(pixel_format, number)
    if len(data) < wanted:
        raise ValueError(f"{len(data)} bytes are too few, {pixel_format} needs {wanted}")
    data = data[:wanted]
    if pixel_format == "Mono8":
        return data.reshape(shape)
    if pixel_format.endswith("Packed"):
        return _outer(data, BITS[pixel_format], number).reshape(shape)
    if pixel_format.endswith("p"):
        return _stream(data, BITS[pixel_format], number).reshape(shape)
    return data.view("<u2").astype(np.uint16, copy=False).reshape(shape)


def payload_bytes(pixel_format: str, number: int) -> int:
    """Bytes that so many pixels take."""
    bits = BITS[pixel_format]
    if pixel_format.endswith("Packed"):
        return (3 * number + 1) // 2
    if pixel_format.endswith("p"):
        return (bits * number + 7) // 8
    return number * (1 if bits == 8 else 2)


def _groups(data: NDArray[np.uint8], length: int, spare: int = 0) -> NDArray[np.uint16]:
    """Bytes as (groups, length + spare), with zeros where there are none."""
    groups = -(-len(data) // length)
    padded = np.zeros((groups, length + spare), np.uint16)
    whole = np.zeros(groups * length, np.uint8)
    whole[: len(data)] = data
    padded[:, :length] = whole.reshape(groups, length)
    return padded


def _outer(data: NDArray[np.uint8], bits: int, number: int) -> NDArray[np.uint16]:
    """GigE Vision's packing: high bits, both pixels' low bits, high bits."""
    low = bits - 8
    first, both, second = _groups(data, 3).T
    mask = (1 << low) - 1
    pixels = np.stack([first << low | both & mask, second << low | both >> 4 & mask], axis=1)
    return pixels.ravel()[:number]


def _stream(data: NDArray[np.uint8], bits: int, number: int) -> NDArray[np.uint16]:
    """A stream of bits, lowest first."""
    pixels, length = GROUPS[bits]
    grouped = _groups(data, length, spare=2).astype(np.uint32)
    result = np.empty((len(grouped), pixels), np.uint16)
    for pixel in range(pixels):
        at, shift = divmod(pixel * bits, 8)
        three = grouped[:, at] | grouped[:, at + 1] << 8 | grouped[:, at + 2] << 16
        result[:, pixel] = three >> shift & ((1 << bits) - 1)
    return result.ravel()[:number]
