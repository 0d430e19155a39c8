import dataclasses

import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from pipeline.messages import Blobs, Dropped, Frame, FrameInfo, Patches, Tiling, Trace, Unmixed
from pipeline.transport.codec import (
    MAX_ARRAY_BYTES,
    TYPES,
    CodecError,
    decode,
    encode,
    unpack_wire,
)
from pipeline.transport.sockets import MAX_MESSAGE_BYTES

TRACE = Trace(123, {"detect": 45})
INFO = FrameInfo(7, "roof", -5, "utc", (32, 48), ("compressed",), Tiling(11, 16))


def patches(batch: int = 3) -> Patches:
    rng = np.random.default_rng(1)
    return Patches(
        info=INFO,
        counts_BHW=rng.random((batch, 11, 11), dtype=np.float32),
        background_BHW=rng.random((batch, 11, 11), dtype=np.float32),
        usable_BHW=rng.random((batch, 11, 11)) < 0.9,
        origin_px=rng.integers(0, 9, (batch, 2), dtype=np.int32),
        group=np.arange(batch, dtype=np.int32),
        bbox_px=rng.integers(0, 9, (batch, 4), dtype=np.int32),
        snr=rng.random(batch, dtype=np.float32),
        flags=np.zeros(batch, dtype=np.uint16),
    )


def unmixed() -> Unmixed:
    return Unmixed(
        patches=patches(),
        patch=np.array([0, 2], dtype=np.int32),
        xy_px=np.array([[1.5, 2.5], [3.0, 4.0]]),
        intensity=np.array([10.0, 20.0]),
        refined=np.array([True, False]),
        p_exist=np.array([1.0, 0.9]),
        p_count=np.array([1.0, np.nan]),
        cov_px2=np.array([[0.01, 0.0, 0.02], [np.nan] * 3]),
        intensity_sigma=np.array([2.0, np.nan]),
        joint_px2=np.array([[[0.01, 0.0], [0.0, 0.02]], *[[[np.nan] * 2] * 2] * 2]),
        cell_px=1 / 3,
        engine="abc",
        source="net",
    )


def same(left, right) -> bool:
    if isinstance(left, np.ndarray):
        nan = left.dtype.kind == "f"
        return left.dtype == right.dtype and np.array_equal(left, right, equal_nan=nan)
    if dataclasses.is_dataclass(left):
        names = [field.name for field in dataclasses.fields(left)]
        return type(left) is type(right) and all(
            same(getattr(left, name), getattr(right, name)) for name in names
        )
    return type(left) is type(right) and left == right


@pytest.mark.parametrize("message", [patches(), patches(0), unmixed(), Dropped(4, "crop", "why")])
def test_round_trip_keeps_every_value_and_type(message):
    parts = [bytes(part) for part in encode(message, TRACE, sent_ns=99)]
    decoded, trace, sent_ns = decode(parts)
    assert same(decoded, message)
    assert (trace, sent_ns) == (TRACE, 99)


@given(
    hnp.arrays(
        st.sampled_from([np.uint8, np.uint16]), hnp.array_shapes(min_dims=2, max_dims=2, min_side=0)
    )
)
def test_pixels_travel_as_a_part_of_their_own(pixels):
    parts = encode(Frame(INFO, pixels), TRACE, 0)
    assert len(parts) == 2
    assert memoryview(parts[1]).nbytes == pixels.nbytes
    assert len(parts[0]) < 400
    assert same(decode(parts)[0].pixels_HW, pixels)


@given(st.lists(st.binary(max_size=200), max_size=4))
def test_any_bytes_are_a_message_or_a_codec_error(parts):
    with pytest.raises(CodecError):
        decode(parts)


def altered(**changes):
    parts = encode(patches(), TRACE, 0)
    header = msgpack.unpackb(parts[0])
    for path, value in changes.items():
        *keys, last = path.split("__")
        place = header
        for key in keys:
            place = place[int(key) if key.isdigit() else key]
        if isinstance(place, list):
            place[int(last)] = value
        elif value is KeyError:
            del place[last]
        else:
            place[last] = value
    return [msgpack.packb(header), *parts[1:]]


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"type": "Gift"}, "Gift"),
        ({"type": 3}, "type"),
        ({"fields__info__seq": "7"}, "Patches.info.seq"),
        ({"fields__info__seq": KeyError}, "Patches.info"),
        ({"fields__extra": 1}, "Patches"),
        ({"fields__info__shape": [1, 2, 3]}, "Patches.info.shape"),
        ({"fields__info__tiling__size_px": 1.5}, "tiling.size_px"),
        ({"fields__counts_BHW": 3}, "counts_BHW"),
        ({"arrays__0__0": "object"}, "object"),
        ({"arrays__0__0": "float64"}, "small arrays"),
        ({"arrays__0__0": ["float32"]}, "array 0"),
        ({"arrays__0__0": {"float32": 1}}, "array 0"),
        ({"arrays__0__1": [3, 11, 12]}, "small arrays"),
        ({"arrays__0__1": [3, 11, 1200]}, "parts do not match"),
        ({"arrays__0__1": [-3, 11, 11]}, "shape"),
        ({"arrays__0__1": [1 << 24, 1 << 24, 1 << 24, 1 << 24]}, "array 0"),
        ({"arrays": []}, "arrays"),
        ({"stage_ns": {"detect": "slow"}}, "stage_ns"),
        ({"sent_ns": None}, "sent_ns"),
        ({"surprise": 1}, "header"),
    ],
)
def test_what_does_not_fit_is_named(changes, names):
    with pytest.raises(CodecError, match=names):
        decode(altered(**changes))


def places(node, path=()):
    """Paths of all leaves."""
    items = node.items() if isinstance(node, dict) else enumerate(node)
    for key, value in items:
        if isinstance(value, dict | list) and value:
            yield from places(value, (*path, key))
        else:
            yield (*path, key)


SENT = [encode(message, TRACE, 99) for message in (patches(), unmixed(), Dropped(4, "crop", "why"))]
PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(1 << 63), (1 << 64) - 1)
    | st.floats()
    | st.text(max_size=8)
    | st.binary(max_size=8)
    | st.builds(msgpack.ExtType, st.integers(0, 127), st.binary(max_size=8))
    | st.sampled_from(["float32", "uint8", "Frame", "Unmixed"]),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(max_size=4) | st.integers(0, 9), inner, max_size=4)
    ),
    max_leaves=8,
)


@settings(max_examples=400)
@given(st.data(), st.sampled_from(SENT), PLAIN)
def test_a_header_with_any_value_anywhere_is_a_message_or_a_codec_error(data, parts, value):
    header = msgpack.unpackb(parts[0])
    *keys, last = data.draw(st.sampled_from(list(places(header))))
    place = header
    for key in keys:
        place = place[key]
    place[last] = value
    try:
        message, trace, sent_ns = decode([msgpack.packb(header), *parts[1:]])
    except CodecError:
        return
    assert type(message) in TYPES.values()
    assert msgpack.unpackb(encode(message, trace, sent_ns)[0]).keys() == header.keys()


@pytest.mark.parametrize("order", ["<", ">"])
def test_values_survive_whatever_the_order_of_their_bytes(order):
    pixels = np.array([[1, 256], [0x0102, 65535]])
    parts = encode(Frame(INFO, pixels.astype(f"{order}u2")), TRACE, 0)
    assert decode(parts)[0].pixels_HW.tolist() == pixels.tolist()


def test_an_array_too_large_to_be_received_is_not_sent():
    assert 2 * MAX_ARRAY_BYTES <= MAX_MESSAGE_BYTES
    pixels = np.broadcast_to(np.uint8(0), (2, MAX_ARRAY_BYTES // 2 + 1))  # takes no memory
    with pytest.raises(CodecError, match=r"Frame\.pixels_HW: 134217730 bytes, at most 134217728"):
        encode(Frame(INFO, pixels), TRACE, 0)


def test_array_of_another_type_than_declared_is_refused():
    message = dataclasses.replace(patches(), snr=np.zeros(3, dtype=np.float64))
    with pytest.raises(CodecError, match="snr: dtype must be float32"):
        decode(encode(message, TRACE, 0))


def test_left_over_arrays_are_refused():
    parts = encode(patches(), TRACE, 0)
    header = msgpack.unpackb(parts[0])
    header["arrays"].append(["uint8", [1]])
    aligned = parts[1] + bytes(-len(parts[1]) % 8)
    with pytest.raises(CodecError, match="more than Patches has"):
        decode([msgpack.packb(header), aligned + b"x"])


@given(st.lists(st.sampled_from([0, 1, 7, 8, 300, 600_000]), min_size=2, max_size=2))
def test_large_arrays_travel_alone_and_small_ones_together(sizes):
    counts, usable = (np.arange(size, dtype=np.uint16).reshape(1, -1) for size in sizes)
    blobs = Blobs(
        info=INFO,
        pixels_HW=counts,
        usable_HW=usable > 0,
        xy_px=np.zeros((0, 2)),
        bbox_px=np.zeros((0, 4), np.int32),
        snr=np.ones(3, np.float32),
        flags=np.ones(3, np.uint16),
    )
    parts = [bytes(part) for part in encode(blobs, TRACE, 0)]
    assert len(parts) == 2 + sum(size == 600_000 for size in sizes)
    decoded = decode(parts)[0]
    assert same(decoded, blobs)
    assert decoded.snr.flags.aligned and not decoded.snr.flags.writeable
    with pytest.raises(CodecError, match="small arrays: need"):
        decode([parts[0], parts[1] + b"x", *parts[2:]])
    if len(parts) > 2:
        with pytest.raises(CodecError, match=r"needs (6|12)00000 bytes"):
            decode([*parts[:-1], parts[-1][:-1]])


@pytest.mark.parametrize("part", [b"", b"\xc1", msgpack.packb([1]), msgpack.packb({1: 2})])
def test_wire_messages_must_be_maps_with_names(part):
    with pytest.raises(CodecError):
        unpack_wire(part)
