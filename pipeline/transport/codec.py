"""Messages between nodes as ZeroMQ parts: a MessagePack header, then each array as its own part.

Pixels never pass through MessagePack: an array part is the array's own memory, sent without a
copy and read without one. Decoding is strict: the header must fit the dataclass field by field,
each part must be exactly shape × dtype long, and everything has a limit.
"""

import dataclasses
import math
import types
from functools import cache
from typing import Any, Union, get_args, get_origin, get_type_hints

import msgpack
import numpy as np
from numpy.typing import NDArray

from pipeline import messages
from pipeline.messages import Trace

MAX_HEADER_BYTES = 1 << 20
MAX_ARRAY_BYTES = 1 << 27  # well below what a socket takes in
PIXEL_TYPES = frozenset({"uint8", "uint16", "float32"})
TYPES: dict[str, type[Any]] = {
    kind.__name__: kind
    for kind in (
        messages.Frame,
        messages.Blobs,
        messages.Patches,
        messages.Unmixed,
        messages.TargetReport,
        messages.Objects,
        messages.Dropped,
    )
}


class CodecError(ValueError):
    """Bytes that are not a message of ours; says which field and why."""


def encode(message: Any, trace: Trace, sent_ns: int) -> list[Any]:
    """Header and array parts of a message; arrays are not copied, so do not change them after.

    Raises CodecError on an array larger than MAX_ARRAY_BYTES.
    """
    arrays: list[NDArray[Any]] = []
    header = {
        "type": type(message).__name__,
        "fields": _plain(message, arrays, type(message).__name__),
        "arrays": [],
        "t_ingest_ns": trace.t_ingest_ns,
        "stage_ns": trace.stage_ns,
        "sent_ns": sent_ns,
    }
    header["arrays"] = [[array.dtype.name, list(array.shape)] for array in arrays]
    return [msgpack.packb(header), *arrays]


def _plain(value: Any, arrays: list[NDArray[Any]], where: str) -> Any:
    """A dataclass as nested plain types; each array is left out and appended to `arrays`."""
    if isinstance(value, np.ndarray):
        if value.nbytes > MAX_ARRAY_BYTES:
            raise CodecError(
                f"{where}: {value.nbytes} bytes, at most {MAX_ARRAY_BYTES} can be sent"
            )
        arrays.append(np.ascontiguousarray(value, dtype=value.dtype.newbyteorder("=")))
        return None
    if dataclasses.is_dataclass(value):
        return {
            f.name: _plain(getattr(value, f.name), arrays, f"{where}.{f.name}")
            for f in dataclasses.fields(value)
        }
    return value


def decode(parts: list[Any]) -> tuple[Any, Trace, int]:
    """The message, its trace and when it was sent; raises CodecError on anything malformed.

    Arrays are read-only views of the parts.
    """
    if not parts or memoryview(parts[0]).nbytes > MAX_HEADER_BYTES:
        raise CodecError("header: missing or larger than 1 MiB")
    try:
        header = msgpack.unpackb(
            parts[0], strict_map_key=True, max_array_len=4096, max_map_len=256, max_str_len=4096
        )
    except (ValueError, msgpack.UnpackException) as error:
        raise CodecError(f"header: not MessagePack within limits ({error})") from error
    expected = {"type", "fields", "arrays", "t_ingest_ns", "stage_ns", "sent_ns"}
    if not isinstance(header, dict) or set(header) != expected:
        raise CodecError(f"header: must hold exactly {', '.join(sorted(expected))}")
    kind = TYPES.get(header["type"]) if isinstance(header["type"], str) else None
    if kind is None:
        raise CodecError(f"type: {header['type']!r} is none of {', '.join(TYPES)}")
    arrays = _arrays(header["arrays"], parts[1:])
    message = _build(kind, header["fields"], arrays, header["type"])
    if arrays:
        raise CodecError(f"arrays: {len(arrays)} more than {header['type']} has")
    trace = Trace(
        t_ingest_ns=_value(int, header["t_ingest_ns"], arrays, "t_ingest_ns"),
        stage_ns=_value(dict[str, int], header["stage_ns"], arrays, "stage_ns"),
    )
    return message, trace, _value(int, header["sent_ns"], arrays, "sent_ns")


def _arrays(described: Any, parts: list[Any]) -> list[NDArray[Any]]:
    """Array views of the parts, in reverse so that they can be popped in order."""
    if not isinstance(described, list) or len(described) != len(parts):
        raise CodecError(f"arrays: {len(parts)} parts do not match their description")
    arrays = []
    for number, (entry, part) in enumerate(zip(described, parts, strict=True)):
        where = f"array {number}"
        if not (isinstance(entry, list) and len(entry) == 2 and isinstance(entry[1], list)):
            raise CodecError(f"{where}: must be described by [dtype, shape]")
        name, shape = entry
        if not isinstance(name, str) or name not in _DTYPES:
            raise CodecError(f"{where}: dtype {name!r} is not allowed")
        if len(shape) > 4 or not all(type(n) is int and 0 <= n <= 1 << 24 for n in shape):
            raise CodecError(f"{where}: shape {shape!r} is not allowed")
        dtype = _DTYPES[name]
        size = math.prod(shape) * dtype.itemsize
        found = memoryview(part).nbytes
        if size > MAX_ARRAY_BYTES or size != found:
            raise CodecError(f"{where}: {name} {shape} needs {size} bytes, the part has {found}")
        arrays.append(np.frombuffer(part, dtype=dtype).reshape(shape))
    return arrays[::-1]


_DTYPES = {
    name: np.dtype(name)
    for name in ("bool", "uint8", "uint16", "int32", "int64", "float32", "float64")
}


@cache
def _hints(kind: Any) -> dict[str, Any]:
    return get_type_hints(kind)


def _build(kind: Any, fields: Any, arrays: list[NDArray[Any]], where: str) -> Any:
    hints = _hints(kind)
    if not isinstance(fields, dict) or set(fields) != set(hints):
        raise CodecError(f"{where}: must hold exactly {', '.join(hints)}")
    return kind(
        **{
            name: _value(hint, fields[name], arrays, f"{where}.{name}")
            for name, hint in hints.items()
        }
    )


def _value(hint: Any, value: Any, arrays: list[NDArray[Any]], where: str) -> Any:
    """`value` as the type the dataclass declares; CodecError if it is of another."""
    origin = get_origin(hint)
    if origin is np.ndarray:
        return _array_of(hint, value, arrays, where)
    if dataclasses.is_dataclass(hint):
        return _build(hint, value, arrays, where)
    if origin in (Union, types.UnionType):
        inner = next(arg for arg in get_args(hint) if arg is not type(None))
        return None if value is None else _value(inner, value, arrays, where)
    if origin is tuple and isinstance(value, list):
        kinds = get_args(hint)
        if kinds[-1] is Ellipsis:
            kinds = (kinds[0],) * len(value)
        if len(kinds) == len(value):
            return tuple(
                _value(kind, item, arrays, where) for kind, item in zip(kinds, value, strict=True)
            )
    elif origin is dict and isinstance(value, dict):
        _, kind = get_args(hint)
        if all(isinstance(key, str) for key in value):
            return {key: _value(kind, item, arrays, where) for key, item in value.items()}
    elif type(value) is hint:
        return value
    raise CodecError(f"{where}: {value!r:.80} is not {hint}")


def _array_of(hint: Any, value: Any, arrays: list[NDArray[Any]], where: str) -> NDArray[Any]:
    if value is not None or not arrays:
        raise CodecError(f"{where}: its array part is missing")
    array = arrays.pop()
    (wanted,) = get_args(get_args(hint)[1]) or (Any,)
    allowed = PIXEL_TYPES if wanted is Any else {np.dtype(wanted).name}
    if array.dtype.name not in allowed:
        raise CodecError(
            f"{where}: dtype must be {' or '.join(sorted(allowed))}, got {array.dtype}"
        )
    return array


def pack_wire(message: dict[str, Any]) -> bytes:
    """A message for subscribers as MessagePack."""
    packed: bytes = msgpack.packb(message)
    return packed


def unpack_wire(part: Any) -> dict[str, Any]:
    """A subscriber's message as a map; raises CodecError if it is none."""
    try:
        message = msgpack.unpackb(part, strict_map_key=True, max_map_len=256, max_str_len=4096)
    except (ValueError, msgpack.UnpackException) as error:
        raise CodecError(f"not a MessagePack map within limits ({error})") from error
    if not isinstance(message, dict):
        raise CodecError(f"not a map but {type(message).__name__}")
    return message
