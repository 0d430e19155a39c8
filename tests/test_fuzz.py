"""Any bytes at the doors: an answer or one named error; no crash, no hang, no growth.

FUZZ_EXAMPLES=100000 pytest tests/test_fuzz.py --timeout 0 -o faulthandler_timeout=0
is the long run.
"""

import contextlib
import ctypes
import functools
import gc
import json
import os
import shutil
import time
from pathlib import Path

import cv2
import msgpack
import numpy as np
import pytest
from conftest import write_scene
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from test_codec import INFO, KINDS, PLAIN, SENT, TRACE, places
from test_convert import stack_of, write_cube, write_envi, write_npy, write_pages, write_ser

from engines.errors import EngineError
from engines.loader import MODELS
from engines.manifest import read_manifest
from pipeline.config import load_config, open_source
from pipeline.errors import PipelineError, RunError
from pipeline.formats.calibration import Calibration, read_calibration, write_calibration
from pipeline.formats.csist import read_csist, write_csist
from pipeline.formats.foreign import open_footage
from pipeline.formats.live_recording import LiveRecordingWriter
from pipeline.formats.recording import open_recording
from pipeline.messages import BadMessage, Frame, SentFrame
from pipeline.physics.groups import PROFILES
from pipeline.physics.sensor import Sensor
from pipeline.picture import read_messages
from pipeline.runtime import replay
from pipeline.runtime.dead_letters import DeadLetters, replay_letter
from pipeline.runtime.settings import DeadLetterSettings
from pipeline.sensing import load_bad_pixels
from pipeline.sources.video import Video
from pipeline.transport.codec import CodecError, decode, encode, unpack_wire
from pipeline.transport.feed import sent_frame
from pipeline.transport.hub import FROM_NODE, Word, read_word
from pipeline.transport.security import ClientKeys, make_keys
from pipeline.wire import check_wire
from trainer.csist_annotation import format_annotation, parse_annotation
from trainer.csist_image import decode_image, encode_image
from trainer.errors import TrainerError
from trainer.trained import WEIGHTS, load_weights

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "100"))
GROWTH_BYTES = 20 << 20
"""What the second half of the examples may leave; by then hypothesis has all it keeps itself."""
PEAK_BYTES = 100 << 20
"""What may be in use for a moment."""
HANG_S = 2.0
ROUND = 2000
"""Examples hypothesis makes in one go: it remembers each, a hundred thousand are over 100 MB."""
CHANGES = st.lists(
    st.tuples(
        st.sampled_from(["set", "insert", "delete", "cut", "double"]),
        st.floats(0.0, 1.0),
        st.binary(min_size=1, max_size=6),
    ),
    min_size=1,
    max_size=4,
)


def changed(data: bytes, changes) -> bytes:
    """The bytes after changes at places given as shares of their length."""
    for kind, share, new in changes:
        place = round(share * len(data))
        if kind == "set":
            data = data[:place] + new + data[place + len(new) :]
        elif kind == "insert":
            data = data[:place] + new + data[place:]
        elif kind == "delete":
            data = data[:place] + data[place + len(new) :]
        elif kind == "cut":
            data = data[:place]
        else:
            data = data + data[place:]
    return data


def fuzz(test, *inputs):
    """Run a test on EXAMPLES inputs, the same ones every time; none may take HANG_S of a core."""

    @functools.wraps(test)
    def timed(*values, **named):
        began_s = time.process_time()
        test(*values, **named)
        assert time.process_time() - began_s < HANG_S

    half, before = EXAMPLES // 2, 0
    for number, (done, end) in enumerate([*_rounds(0, half), *_rounds(half, EXAMPLES)]):
        if done == half:
            before = _resident_bytes()
        once = settings(
            max_examples=end - done,
            deadline=None,
            database=None,
            suppress_health_check=[HealthCheck.too_slow, HealthCheck.nested_given],
        )(given(*inputs)(timed))
        seed(number)(once)()
    peak = _status_bytes("VmHWM") - before
    grown = _resident_bytes() - before
    print(f"{EXAMPLES} examples: {grown / 1e6:.1f} MB kept, {peak / 1e6:.1f} MB at the most")
    assert grown < GROWTH_BYTES, f"{grown >> 20} MB"
    assert peak < PEAK_BYTES, f"{peak >> 20} MB"


def _rounds(first: int, end: int) -> list[tuple[int, int]]:
    return [(done, min(done + ROUND, end)) for done in range(first, end, ROUND)]


def _resident_bytes() -> int:
    """What this process keeps; from here on its peak is counted anew."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    resident = _status_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    return resident


def _status_bytes(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(name))


MESSAGES = [*SENT, encode(Frame(INFO, np.zeros((32, 48), np.uint16)), TRACE, 99)]


def test_messages_between_nodes():
    def decodes(sent, which, changes):
        parts = [bytes(part) for part in sent]
        which %= len(parts)
        parts[which] = changed(parts[which], changes)
        try:
            message, trace, sent_ns = decode(parts)
        except CodecError:
            return
        assert isinstance(trace.t_ingest_ns, int) and isinstance(sent_ns, int)
        assert type(message) in KINDS

    fuzz(decodes, st.sampled_from(MESSAGES), st.integers(0, 9), CHANGES)


HEADER = {
    "schema": "irst.frame/1",
    "seq": 7,
    "t_exposure_ns": 1_700_000_000_000_000_000,
    "clock": "utc",
    "dtype": "uint16",
    "shape": [12, 16],
    "flags": ["shutter"],
    "pose": {"az_rad": 1.0, "el_rad": 0.1, "roll_rad": -0.2},
}
FRAME = [msgpack.packb(HEADER), bytes(12 * 16 * 2)]


def is_frame_or_says_why(parts):
    sent = sent_frame(parts)
    if isinstance(sent, SentFrame):
        assert sent.pixels_HW.nbytes == len(parts[1])
        assert not sent.pixels_HW.flags.writeable
    else:
        assert isinstance(sent, BadMessage)
        assert 0 < len(sent.reason) < 1000


def test_frames_from_outside():
    def decodes(which, number, changes):
        parts = [*FRAME, b"more"]
        parts[which] = changed(parts[which], changes)
        is_frame_or_says_why(parts[:number])

    fuzz(decodes, st.integers(0, 1), st.sampled_from([2, 2, 2, 0, 1, 3]), CHANGES)


def test_frames_from_outside_with_any_value_anywhere():
    paths = list(places(HEADER))

    def decodes(path, value):
        header = msgpack.unpackb(FRAME[0])
        *keys, last = path
        place = header
        for key in keys:
            place = place[key]
        place[last] = value
        is_frame_or_says_why([msgpack.packb(header), FRAME[1]])

    fuzz(decodes, st.sampled_from(paths), PLAIN)


def test_words_of_nodes():
    words = [Word("result", 7, t_ns=5).pack(), Word("lost", 1, 9, 0, "a", "b").pack()]

    def reads(word, changes):
        try:
            assert read_word(changed(word, changes), FROM_NODE).kind in FROM_NODE
        except CodecError:
            return

    fuzz(reads, st.sampled_from(words), CHANGES)


GAP = {
    "schema": "irst.gap/1",
    "sensor_id": "roof",
    "frame_seq": 3,
    "stage": "crop",
    "reason": "odd",
}


def test_messages_to_subscribers(files):
    lines = (files / "targets.jsonl").read_text().splitlines()
    packed = [msgpack.packb(message) for message in (GAP, *map(json.loads, lines))]

    def checks(message, changes):
        try:
            check_wire(unpack_wire(changed(message, changes)))
        except (CodecError, ValueError):
            return

    fuzz(checks, st.sampled_from(packed), CHANGES)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A good file of every kind that is read, and how."""
    folder = tmp_path_factory.mktemp("fuzz")
    write_scene(folder / "scene.zarr", 2, width=48, height=32, singles=1, groups=0, horizon=1.0)
    write_csist(folder / "csist.zarr", PROFILES["csist-100k"], 4, 1)
    (folder / "config.yaml").write_text(
        "source: {kind: synthetic, rate_hz: 10}\ntopology: {unmix: {replicas: 2, queue: 3}}\n"
        "publish: {endpoint: 'tcp://127.0.0.1:5556', queue: 7}\n"
    )
    for suffix in (".json", ".onnx"):
        shutil.copy(MODELS / f"dista_net_field{suffix}", folder)
    letters = DeadLetters(DeadLetterSettings(folder=folder / "letters"), "cafe")
    for parts in SENT:
        letters.keep(parts, "odd")
    letters.keep([Word("result", 7).pack()], "odd", "word")
    letters.keep(FRAME, "odd", "frame")
    write_unfinished(folder / "unfinished.zarr")
    write_targets(folder / "targets.jsonl", folder / "scene.zarr")
    make_keys(folder / "keys", "tracker")
    shape = (11, 11)
    flat = [np.ones(shape, np.float32), np.zeros(shape, np.float32), np.zeros(shape, np.bool_)]
    write_calibration(folder / "calibration.zarr", Calibration(*flat, full_scale=4095))
    stack = stack_of(2)
    for write in (write_npy, write_pages, write_cube, write_ser, write_envi):
        write(folder, stack)
    (folder / "a.png").write_bytes(encode_image(stack[0]))
    write_video(folder / "a.avi")
    image = stack_of(1, shape)[0]
    image[0, 0] = 0  # as a map of bad pixels: one is good
    for name in ("csist.png", "bad.png"):
        (folder / name).write_bytes(encode_image(image))
    targets = np.array([[4.25, 5.5, 230.0], [5.0, 5.5, 240.0]], np.float32)
    (folder / "CSO1.xml").write_text(format_annotation(1, 0.5, targets))
    shutil.copy(WEIGHTS / "focus.pt", folder)
    for pattern, read in READERS.items():  # what is imported for the first file is no growth
        top = pattern.split("/**")[0]
        read(next(iter(sorted(folder.glob(top)))))
    return folder


def read_recording(path: Path) -> None:
    recording = open_recording(path)
    for index in range(len(recording)):
        recording.frame(index)


def write_unfinished(path: Path) -> None:
    """A recording that is being written, or whose writer was killed."""
    writer = LiveRecordingWriter(path, (12, 16), Sensor(id="roof", full_scale=4095))
    for index in range(3):
        writer.append(np.full((12, 16), index, np.uint16), 1000 + index)


def write_targets(path: Path, recording: Path) -> None:
    """What `replay --out` writes."""
    config = load_config(None, source={"kind": "zarr_recording", "path": str(recording)})
    with contextlib.closing(open_source(config)) as source, path.open("w") as file:
        for message in replay.in_process(config, source):
            file.write(json.dumps(message) + "\n")


def read_footage(path: Path) -> None:
    footage = open_footage(path)
    for index in range(footage.length):
        footage.read(index)


def write_video(path: Path) -> None:
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), 25.0, (32, 24))
    for pixels in stack_of(3, (24, 32), np.uint8):
        writer.write(cv2.cvtColor(pixels, cv2.COLOR_GRAY2BGR))
    writer.release()


def read_video(path: Path) -> None:
    for _frame in Video(Video.Config(path=path), {}).frames():
        pass


READERS = {
    "scene.zarr/**/*": read_recording,
    "csist.zarr/**/*": read_csist,
    "config.yaml": load_config,
    "dista_net_field.json": read_manifest,
    "letters/*": replay_letter,
    "unfinished.zarr/**/*": read_recording,
    "bad.png": lambda path: load_bad_pixels(path, (11, 11)),
    "targets.jsonl": read_messages,
    "keys/tracker/client.key_secret": lambda path: ClientKeys.load(path.parent),
    "calibration.zarr/**/*": read_calibration,
    "a.npy": read_footage,
    "a.png": read_footage,
    "a.tiff": read_footage,
    "a.fits": read_footage,
    "a.ser": read_footage,
    "a.[hi]*": read_footage,  # ENVI's header and data
    "a.avi": read_video,
    "csist.png": lambda path: decode_image(path.read_bytes()),
    "CSO1.xml": lambda path: parse_annotation(path.read_bytes()),
    "focus.pt": load_weights,
}


@pytest.mark.parametrize("pattern", READERS)
def test_files(files, pattern):
    read, top = READERS[pattern], pattern.split("/**")[0]
    paths = sorted(path for path in files.glob(pattern) if path.is_file())
    whole = {path: path.read_bytes() for path in paths}

    def reads(path, changes):
        path.write_bytes(changed(whole[path], changes))
        try:
            with contextlib.suppress(PipelineError, RunError, EngineError, TrainerError):
                read(files / top if "**" in pattern else path)
        finally:
            path.write_bytes(whole[path])

    assert paths
    fuzz(reads, st.sampled_from(paths), CHANGES)


def test_a_number_too_large_for_its_type_is_named(files):
    path = files / "unfinished.zarr/timestamp_ns/zarr.json"
    whole = path.read_text()
    fields = json.loads(whole)
    try:
        path.write_text(json.dumps(fields | {"fill_value": -(1 << 80)}))
        with pytest.raises(PipelineError, match="`timestamp_ns` cannot be read"):
            read_recording(files / "unfinished.zarr")
    finally:
        path.write_text(whole)


def test_changes_change():
    assert changed(b"abcdef", [("set", 0.5, b"X")]) == b"abcXef"
    assert changed(b"abcdef", [("cut", 0.5, b"X"), ("double", 0.0, b"X")]) == b"abcabc"
