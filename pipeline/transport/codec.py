"""Messages between nodes as ZeroMQ parts: a MessagePack header, and each large array.

Pixels never pass through MessagePack: a large array's part is its own memory, sent without a copy
and read without one. A small one stands in the header, since what a part costs, not its bytes, is
what it takes. Decoding is strict: the header must be what messages.py declares, field by field, the
bytes of an array exactly as many as its shape and type say, and everything has a limit.
"""

import math
from functools import cache, partial
from typing import Annotated, Any, Literal, get_args

import msgpack
import msgspec
import numpy as np
from msgspec import Meta, Struct
from numpy.typing import NDArray

from pipeline.messages import (
    Blobs,
    Dropped,
    Frame,
    Objects,
    Patches,
    TargetReport,
    Trace,
    Unmixed,
    misfit,
)

OWN_PART_BYTES = 1 << 15
"""An array of so many bytes is large."""
MAX_HEADER_BYTES = 1 << 20
MAX_ARRAY_BYTES = 1 << 27  # well below what a socket takes in
PIXEL_TYPES = frozenset({"uint8", "uint16", "float32"})

ElementType = Literal["bool", "uint8", "uint16", "int32", "int64", "float32", "float64"]
Length = Annotated[int, Meta(ge=0, le=1 << 24)]
Shape = Annotated[tuple[Length, ...], Meta(max_length=4)]
_DTYPES = {name: np.dtype(name) for name in get_args(ElementType)}


class Array(Struct, array_like=True, forbid_unknown_fields=True):
    """What stands for an array in the header; of a large one, its number in place of its values."""

    dtype: ElementType
    shape: Shape
    values: bytes | int


class Header(Struct, forbid_unknown_fields=True):
    """The first part of a message."""

    message: Frame | Blobs | Patches | Unmixed | TargetReport | Objects | Dropped
    trace: Trace
    sent_ns: int


class CodecError(ValueError):
    """Bytes that are not a message of ours; says which field and why."""


def encode(message: Any, trace: Trace, sent_ns: int) -> list[Any]:
    """Header and large arrays of a message; do not change these after.

    Raises CodecError on an array larger than MAX_ARRAY_BYTES, and on what MessagePack has not.
    """
    large: list[NDArray[Any]] = []
    header = Header(message, trace, sent_ns)
    try:
        return [msgspec.msgpack.encode(header, enc_hook=partial(_described, large)), *large]
    except (ValueError, TypeError, RecursionError) as error:
        raise CodecError(f"{type(message).__name__}: {error}") from error


def _described(large: list[NDArray[Any]], value: Any) -> Any:
    """An array for the header, appended to `large` if it is; or a number of NumPy's as Python's."""
    if isinstance(value, np.generic):
        return value.item()
    if not isinstance(value, np.ndarray):
        raise TypeError(f"{value!r:.80} cannot be sent")
    if value.nbytes > MAX_ARRAY_BYTES:
        raise ValueError(f"an array of {value.nbytes} bytes, at most {MAX_ARRAY_BYTES} can be sent")
    native = value.dtype if value.dtype.isnative else value.dtype.newbyteorder("=")
    if value.nbytes < OWN_PART_BYTES:
        values = value.astype(native, copy=False).tobytes()
        return Array(_name(native), value.shape, values)
    large.append(np.ascontiguousarray(value, dtype=native))
    return Array(_name(native), value.shape, len(large) - 1)


@cache
def _name(dtype: np.dtype[Any]) -> Any:
    return dtype.name


def decode(parts: list[Any]) -> tuple[Any, Trace, int]:
    """The message, its trace and when it was sent; raises CodecError on anything malformed.

    Arrays are read-only, the large ones views of their parts.
    """
    if not parts or memoryview(parts[0]).nbytes > MAX_HEADER_BYTES:
        raise CodecError("header: missing or larger than 1 MiB")
    large = dict(enumerate(parts[1:]))
    try:
        header = msgspec.msgpack.decode(parts[0], type=Header, dec_hook=partial(_array_of, large))
    except (ValueError, RecursionError) as error:
        raise CodecError(misfit("header", error)) from error
    if large:
        raise CodecError(f"header: {len(large)} parts more than it speaks of")
    return header.message, header.trace, header.sent_ns


def _array_of(large: dict[int, Any], hint: Any, value: Any) -> NDArray[Any]:
    """The array that was described so, of the type declared; a large one belongs to one field."""
    try:
        described = msgspec.convert(value, Array, builtin_types=(bytes,))
    except msgspec.ValidationError as error:
        raise ValueError(misfit("array", error)) from error
    name, shape, values = described.dtype, described.shape, described.values
    dtype = _DTYPES[name]
    if name not in (allowed := _allowed(hint)):
        raise ValueError(f"dtype must be {' or '.join(sorted(allowed))}, got {name}")
    if (nbytes := math.prod(shape, start=dtype.itemsize)) > MAX_ARRAY_BYTES:
        raise ValueError(f"{nbytes} bytes, at most {MAX_ARRAY_BYTES} are allowed")
    if isinstance(values, int) and (values := large.pop(values, None)) is None:
        raise ValueError("its part is missing")
    if (found := memoryview(values).nbytes) != nbytes:
        raise ValueError(f"{name} {list(shape)} needs {nbytes} bytes, there are {found}")
    array: NDArray[Any] = np.ndarray(shape, dtype, values)
    array.flags.writeable = False
    return array


@cache
def _allowed(hint: Any) -> frozenset[str]:
    """Element types of what is declared as an array."""
    (wanted,) = get_args(get_args(hint)[1]) or (Any,)
    return PIXEL_TYPES if wanted is Any else frozenset({np.dtype(wanted).name})


def pack_wire(message: dict[str, Any]) -> bytes:
    """A message for subscribers as MessagePack."""
    return msgspec.msgpack.encode(message)


def unpack_wire(part: Any) -> dict[str, Any]:
    """A subscriber's message as a map; raises CodecError if it is none."""
    try:
        message = msgpack.unpackb(part, strict_map_key=True, max_map_len=256, max_str_len=4096)
    except (ValueError, msgpack.UnpackException) as error:
        raise CodecError(f"not a MessagePack map within limits ({error})") from error
    if not isinstance(message, dict):
        raise CodecError(f"not a map but {type(message).__name__}")
    return message
