"""Messages between nodes as ZeroMQ parts: a MessagePack header, all small arrays, each large one.

Pixels never pass through MessagePack: a large array's part is its own memory, sent without a copy
and read without one. The small ones go together, since what a part costs, not its bytes, is what
they take. Decoding is strict: the header must fit the dataclass field by field, each part must be
exactly as long as shapes × dtypes say, and everything has a limit.
"""

import dataclasses
import types
from collections.abc import Callable
from functools import cache, partial
from typing import Any, Union, get_args, get_origin, get_type_hints

import msgpack
import numpy as np
from numpy.typing import NDArray

from pipeline import messages
from pipeline.messages import Trace

OWN_PART_BYTES = 1 << 16
"""An array of so many bytes is large."""
MAX_AXES, MAX_LENGTH = 4, 1 << 24
ALIGNED_BYTES = 8  # where a small array begins among the others
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
    """Header and array parts of a message; do not change its arrays after.

    Raises CodecError on an array larger than MAX_ARRAY_BYTES.
    """
    arrays: list[NDArray[Any]] = []
    kind = type(message).__name__
    try:
        fields = _plain(message, arrays)
    except Misfit as misfit:
        raise CodecError(f"{kind}{misfit}") from misfit
    header = {
        "type": kind,
        "fields": fields,
        "arrays": [],
        "t_ingest_ns": trace.t_ingest_ns,
        "stage_ns": trace.stage_ns,
        "sent_ns": sent_ns,
    }
    header["arrays"] = [[_name(array.dtype), list(array.shape)] for array in arrays]
    parts: list[Any] = [msgpack.packb(header)]
    if small := [array for array in arrays if array.nbytes < OWN_PART_BYTES]:
        *before, last = (array.tobytes() for array in small)
        parts.append(
            b"".join([*(data + bytes(-len(data) % ALIGNED_BYTES) for data in before), last])
        )
    return parts + [array for array in arrays if array.nbytes >= OWN_PART_BYTES]


def _plain(value: Any, arrays: list[NDArray[Any]]) -> Any:
    """A dataclass as nested plain types; each array is left out and appended to `arrays`."""
    if isinstance(value, np.ndarray):
        if value.nbytes > MAX_ARRAY_BYTES:
            raise Misfit(f": {value.nbytes} bytes, at most {MAX_ARRAY_BYTES} can be sent")
        native = value.dtype if value.dtype.isnative else value.dtype.newbyteorder("=")
        arrays.append(np.ascontiguousarray(value, dtype=native))
        return None
    names = getattr(value, "__dataclass_fields__", None)
    if names is None:
        return value
    plain = {}
    for name in names:
        try:
            plain[name] = _plain(getattr(value, name), arrays)
        except Misfit as misfit:
            raise misfit.inside(f".{name}") from None
    return plain


@cache
def _name(dtype: np.dtype[Any]) -> str:
    return dtype.name


def decode(parts: list[Any]) -> tuple[Any, Trace, int]:
    """The message, its trace and when it was sent; raises CodecError on anything malformed.

    Arrays are read-only, the large ones views of their parts.
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
    kind: Any = TYPES.get(header["type"]) if isinstance(header["type"], str) else None
    if kind is None:
        raise CodecError(f"type: {header['type']!r} is none of {', '.join(TYPES)}")
    arrays = _arrays(header["arrays"], parts[1:])
    message = _read(kind, header["fields"], arrays, header["type"])
    if arrays:
        raise CodecError(f"arrays: {len(arrays)} more than {header['type']} has")
    trace = Trace(
        t_ingest_ns=_read(int, header["t_ingest_ns"], [], "t_ingest_ns"),
        stage_ns=_read(dict[str, int], header["stage_ns"], [], "stage_ns"),
    )
    return message, trace, _read(int, header["sent_ns"], [], "sent_ns")


def _read(hint: Any, value: Any, arrays: list[NDArray[Any]], where: str) -> Any:
    try:
        return _reader(hint)(value, arrays)
    except Misfit as misfit:
        raise CodecError(where + str(misfit)) from misfit


def _arrays(described: Any, parts: list[Any]) -> list[NDArray[Any]]:
    """The arrays in the parts, read-only, in reverse so that they can be popped in order."""
    if not isinstance(described, list):
        raise CodecError("arrays: not described by a list")
    wanted = [_described(entry, number) for number, entry in enumerate(described)]
    small = [nbytes for _, _, nbytes in wanted if nbytes < OWN_PART_BYTES]
    if len(parts) != bool(small) + len(wanted) - len(small):
        raise CodecError(f"arrays: {len(parts)} parts do not match their description")
    large = iter(parts)
    # A copy of one's own, since what comes off a socket begins at any address.
    together = np.array(np.frombuffer(next(large), np.uint8)) if small else np.empty(0, np.uint8)
    together.flags.writeable = False
    needed = sum(nbytes + -nbytes % ALIGNED_BYTES for nbytes in small[:-1]) + sum(small[-1:])
    if len(together) != needed:
        raise CodecError(f"small arrays: need {needed} bytes, the part has {len(together)}")
    arrays, begin = [], 0
    for number, (dtype, shape, nbytes) in enumerate(wanted):
        if nbytes < OWN_PART_BYTES:
            arrays.append(np.ndarray(shape, dtype, together, begin))
            begin += nbytes + -nbytes % ALIGNED_BYTES
            continue
        data = next(large)
        if (found := memoryview(data).nbytes) != nbytes:
            raise CodecError(
                f"array {number}: {dtype} {list(shape)} needs {nbytes} bytes, the part has {found}"
            )
        arrays.append(np.frombuffer(data, dtype).reshape(shape))
    return arrays[::-1]


def _described(entry: Any, number: int) -> tuple[np.dtype[Any], list[int], int]:
    """Type, shape and bytes of an array as the header has them."""
    if not (isinstance(entry, list) and len(entry) == 2 and isinstance(entry[1], list)):
        raise CodecError(f"array {number}: must be described by [dtype, shape]")
    name, shape = entry
    dtype = _DTYPES.get(name) if isinstance(name, str) else None
    if dtype is None:
        raise CodecError(f"array {number}: dtype {name!r} is not allowed")
    nbytes = dtype.itemsize
    for length in shape:
        if type(length) is not int or not 0 <= length <= MAX_LENGTH:
            raise CodecError(f"array {number}: shape {shape!r} is not allowed")
        nbytes *= length
    if len(shape) > MAX_AXES:
        raise CodecError(f"array {number}: shape {shape!r} is not allowed")
    if nbytes > MAX_ARRAY_BYTES:
        raise CodecError(f"array {number}: {nbytes} bytes, at most {MAX_ARRAY_BYTES} are allowed")
    return dtype, shape, nbytes


_DTYPES = {
    name: np.dtype(name)
    for name in ("bool", "uint8", "uint16", "int32", "int64", "float32", "float64")
}


class Misfit(ValueError):
    """A value that is not what its field declares; as text where in the message, and why."""

    def inside(self, place: str) -> "Misfit":
        """The same, of a larger part of the message."""
        return Misfit(f"{place}{self}")


Reader = Callable[[Any, list[NDArray[Any]]], Any]
"""(value in the header, arrays left) → value; raises Misfit."""


@cache
def _reader(hint: Any) -> Reader:
    """What reads values of the type a dataclass declares."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin is np.ndarray:
        (wanted,) = get_args(inner[1]) or (Any,)
        names = PIXEL_TYPES if wanted is Any else {np.dtype(wanted).name}
        return partial(_array_of, {_DTYPES[name] for name in names})
    if dataclasses.is_dataclass(hint):
        fields = {name: _reader(of) for name, of in get_type_hints(hint).items()}
        return partial(_build, hint, fields)
    if origin in (Union, types.UnionType):
        return partial(_optional, _reader(next(arg for arg in inner if arg is not type(None))))
    if origin is tuple:
        repeated = inner[-1] is Ellipsis
        return partial(_tuple, hint, [_reader(of) for of in inner if of is not Ellipsis], repeated)
    if origin is dict:
        return partial(_dict, hint, _reader(inner[1]))
    return partial(_plainly, hint)


def _build(kind: Any, readers: dict[str, Reader], fields: Any, arrays: list[NDArray[Any]]) -> Any:
    if not isinstance(fields, dict) or fields.keys() != readers.keys():
        raise Misfit(f": must hold exactly {', '.join(readers)}")
    values = {}
    for name, read in readers.items():
        try:
            values[name] = read(fields[name], arrays)
        except Misfit as misfit:
            raise misfit.inside(f".{name}") from None
    return kind(**values)


def _optional(read: Reader, value: Any, arrays: list[NDArray[Any]]) -> Any:
    return None if value is None else read(value, arrays)


def _tuple(
    hint: Any, readers: list[Reader], repeated: bool, value: Any, arrays: list[NDArray[Any]]
) -> Any:
    if not isinstance(value, list) or not (repeated or len(readers) == len(value)):
        raise _misfit(hint, value)
    readers = readers * len(value) if repeated else readers
    return tuple(read(item, arrays) for read, item in zip(readers, value, strict=True))


def _dict(hint: Any, read: Reader, value: Any, arrays: list[NDArray[Any]]) -> Any:
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise _misfit(hint, value)
    return {key: read(item, arrays) for key, item in value.items()}


def _plainly(hint: Any, value: Any, arrays: list[NDArray[Any]]) -> Any:  # noqa: ARG001
    if type(value) is not hint:
        raise _misfit(hint, value)
    return value


def _misfit(hint: Any, value: Any) -> Misfit:
    return Misfit(f": {value!r:.80} is not {hint}")


def _array_of(allowed: set[np.dtype[Any]], value: Any, arrays: list[NDArray[Any]]) -> NDArray[Any]:
    if value is not None or not arrays:
        raise Misfit(": its array part is missing")
    array = arrays.pop()
    if array.dtype not in allowed:
        names = " or ".join(sorted(map(str, allowed)))
        raise Misfit(f": dtype must be {names}, got {array.dtype}")
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
