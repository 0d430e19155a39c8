from typing import get_args, get_type_hints

import msgpack
import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from pipeline.messages import (
    Blobs,
    Dropped,
    Frame,
    FrameInfo,
    Message,
    Patches,
    Tiling,
    Trace,
    Unmixed,
)
from pipeline.transport.codec import (
    MAX_ARRAY_BYTES,
    CodecError,
    Header,
    decode,
    encode,
    unpack_wire,
)
from pipeline.transport.sockets import MAX_MESSAGE_BYTES

TRACE = Trace(123, {"detect": 45})
INFO = FrameInfo(7, "roof", -5, "utc", (32, 48), ("compressed",), Tiling(11, 16))


NO_BLOBS = {
    "xy_px": np.zeros((0, 2)),
    "bbox_px": np.zeros((0, 4), np.int32),
    "snr": np.ones(3, np.float32),
    "flags": np.ones(3, np.uint16),
}


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
    if isinstance(left, Message):
        return type(left) is type(right) and all(
            same(getattr(left, name), getattr(right, name)) for name in left.__struct_fields__
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
def test_pixels_keep_their_type_and_shape(pixels):
    parts = encode(Frame(INFO, pixels), TRACE, 0)
    assert same(decode(parts)[0].pixels_HW, pixels)


def test_pixels_travel_as_a_part_of_their_own():
    header, pixels = encode(Frame(INFO, np.zeros((512, 640), np.uint16)), TRACE, 0)
    assert memoryview(pixels).nbytes == 655_360
    assert len(header) < 400


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
        ({"message__type": "Gift"}, r"Gift.*header\.message\.type"),
        ({"message__type": 3}, r"header\.message\.type"),
        ({"message__info__seq": "7"}, r"header\.message\.info\.seq"),
        ({"message__info__seq": KeyError}, "seq"),
        ({"message__info__seq": True}, r"header\.message\.info\.seq"),
        ({"message__extra": 1}, "extra"),
        ({"message__info__shape": [1, 2, 3]}, r"info\.shape"),
        ({"message__info__sensor_id": "x" * 4097}, r"info\.sensor_id"),
        ({"message__info__tiling__size_px": 1.5}, r"tiling\.size_px"),
        ({"message__counts_BHW": 3}, "counts_BHW"),
        ({"message__counts_BHW__0": "object"}, r"object.*counts_BHW"),
        ({"message__counts_BHW__0": "float64"}, "dtype must be float32, got float64.*counts_BHW"),
        ({"message__counts_BHW__0": ["float32"]}, "counts_BHW"),
        (
            {"message__counts_BHW__1": [3, 11, 12]},
            r"\[3, 11, 12\] needs 1584 bytes, there are 1452",
        ),
        ({"message__counts_BHW__1": [-3, 11, 11]}, "counts_BHW"),
        ({"message__counts_BHW__1": [3, 11, 11, 1, 1]}, "counts_BHW"),
        ({"message__counts_BHW__1": [1 << 24] * 4}, "at most 134217728 are allowed.*counts_BHW"),
        ({"message__counts_BHW__2": b""}, "needs 1452 bytes, there are 0"),
        ({"message__counts_BHW__2": "AAAA"}, "counts_BHW"),
        ({"message__counts_BHW__2": 0}, "its part is missing.*counts_BHW"),
        ({"trace__stage_ns": {"detect": "slow"}}, r"trace\.stage_ns"),
        ({"sent_ns": None}, "sent_ns"),
        ({"surprise": 1}, "surprise"),
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


KINDS = get_args(get_type_hints(Header)["message"])
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
    assert type(message) in KINDS
    assert msgpack.unpackb(encode(message, trace, sent_ns)[0]).keys() == header.keys()


@pytest.mark.parametrize("order", ["<", ">"])
def test_values_survive_whatever_the_order_of_their_bytes(order):
    pixels = np.array([[1, 256], [0x0102, 65535]])
    parts = encode(Frame(INFO, pixels.astype(f"{order}u2")), TRACE, 0)
    assert decode(parts)[0].pixels_HW.tolist() == pixels.tolist()


def test_an_array_too_large_to_be_received_is_not_sent():
    assert 2 * MAX_ARRAY_BYTES <= MAX_MESSAGE_BYTES
    pixels = np.broadcast_to(np.uint8(0), (2, MAX_ARRAY_BYTES // 2 + 1))  # takes no memory
    with pytest.raises(CodecError, match="Frame: an array of 134217730 bytes, at most 134217728"):
        encode(Frame(INFO, pixels), TRACE, 0)


def test_numbers_of_numpy_are_sent_as_pythons_and_what_messagepack_has_not_is_refused():
    message = msgspec.structs.replace(unmixed(), cell_px=np.float64(0.25))
    decoded = decode(encode(message, TRACE, 0))[0]
    assert (type(decoded.cell_px), decoded.cell_px) == (float, 0.25)
    with pytest.raises(CodecError, match=r"Unmixed: .* cannot be sent"):
        encode(msgspec.structs.replace(unmixed(), engine=object()), TRACE, 0)


def test_what_is_said_of_an_error_is_short_and_can_be_printed():
    with pytest.raises(CodecError) as error:
        decode(altered(message__type="A\n\x1b[31m" + "x" * 500_000))
    assert len(str(error.value)) < 300
    assert str(error.value).isprintable()
    assert str(error.value).endswith("at `header.message.type`")


def test_array_of_another_type_than_declared_is_refused():
    message = msgspec.structs.replace(patches(), snr=np.zeros(3, dtype=np.float64))
    with pytest.raises(
        CodecError, match=r"dtype must be float32, got float64 - at `header\.message\.snr`"
    ):
        decode(encode(message, TRACE, 0))


def test_a_part_belongs_to_one_array():
    wide = np.zeros((300, 300), np.uint16)
    parts = encode(Blobs(INFO, wide, wide > 0, **NO_BLOBS), TRACE, 0)
    assert len(parts) == 3
    with pytest.raises(CodecError, match="1 parts more"):
        decode([*parts, b"x"])
    with pytest.raises(CodecError, match=r"its part is missing.*usable_HW"):
        decode(parts[:-1])
    header = msgpack.unpackb(parts[0])
    header["message"]["usable_HW"][2] = 0
    with pytest.raises(CodecError, match=r"its part is missing.*usable_HW"):
        decode([msgpack.packb(header), *parts[1:]])


@given(st.lists(st.sampled_from([0, 1, 7, 8, 300, 600_000]), min_size=2, max_size=2))
def test_large_arrays_travel_alone_and_small_ones_in_the_header(sizes):
    counts, usable = (np.arange(size, dtype=np.uint16).reshape(1, -1) for size in sizes)
    blobs = Blobs(INFO, counts, usable > 0, **NO_BLOBS)
    parts = [bytes(part) for part in encode(blobs, TRACE, 0)]
    assert len(parts) == 1 + sum(size == 600_000 for size in sizes)
    decoded = decode(parts)[0]
    assert same(decoded, blobs)
    for array in (decoded.pixels_HW, decoded.usable_HW, decoded.snr):
        assert array.flags.aligned and not array.flags.writeable
    if len(parts) > 1:
        with pytest.raises(CodecError, match=r"needs (6|12)00000 bytes"):
            decode([*parts[:-1], parts[-1][:-1]])


@pytest.mark.parametrize("part", [b"", b"\xc1", msgpack.packb([1]), msgpack.packb({1: 2})])
def test_wire_messages_must_be_maps_with_names(part):
    with pytest.raises(CodecError):
        unpack_wire(part)
