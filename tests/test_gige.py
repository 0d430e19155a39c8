"""GigE Vision against Aravis's fake camera on loopback, and the unpacking of pixel formats."""

import os
import shutil
import signal
import subprocess
import threading
import time
from contextlib import contextmanager

import numpy as np
import pytest
from conftest import BIN
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_array_equal

from pipeline.client import Subscriber
from pipeline.component import component
from pipeline.errors import PipelineError, Unavailable
from pipeline.imaging.pixel_formats import BITS, payload_bytes, unpack
from pipeline.messages import Dropped, Frame

# --- pixel formats -------------------------------------------------------------------------------


def packed(counts, pixel_format):
    """The format's description, bit by bit."""
    bits = BITS[pixel_format]
    if pixel_format == "Mono8":
        return counts.astype(np.uint8).tobytes()
    if pixel_format.endswith("p"):
        stream = "".join(f"{count:0{bits}b}"[::-1] for count in counts.tolist())
        stream += "0" * (-len(stream) % 8)
        return bytes(int(stream[k : k + 8][::-1], 2) for k in range(0, len(stream), 8))
    if pixel_format.endswith("Packed"):
        low = bits - 8
        data = bytearray()
        for first, second in zip(counts[::2].tolist(), counts[1::2].tolist(), strict=True):
            lows = (first & (1 << low) - 1) | (second & (1 << low) - 1) << 4
            data += bytes([first >> low, lows, second >> low])
        return bytes(data)
    return counts.astype("<u2").tobytes()


@given(data=st.data(), pixel_format=st.sampled_from(list(BITS)))
@settings(max_examples=120, deadline=None)
def test_every_format_unpacks_to_its_counts(data, pixel_format):
    height = data.draw(st.integers(1, 5))
    width = data.draw(st.integers(1, 8)) * (2 if pixel_format.endswith("Packed") else 1)
    highest = (1 << BITS[pixel_format]) - 1
    values = st.lists(st.integers(0, highest), min_size=height * width, max_size=height * width)
    counts = np.array(data.draw(values), np.uint16)
    payload = packed(counts, pixel_format)
    assert len(payload) == payload_bytes(pixel_format, counts.size)
    found = unpack(payload + b"\xff\xff", pixel_format, (height, width))  # and what may follow
    assert found.dtype == (np.uint8 if pixel_format == "Mono8" else np.uint16)
    assert_array_equal(found, counts.reshape(height, width))


def test_the_packings_of_the_standards():
    # GigE Vision: 0xABC and 0x123 share the middle byte; PFNC's p: one little-endian number.
    assert unpack(bytes([0xAB, 0x3C, 0x12]), "Mono12Packed", (1, 2)).tolist() == [[0xABC, 0x123]]
    assert unpack(bytes([0xBC, 0x3A, 0x12]), "Mono12p", (1, 2)).tolist() == [[0xABC, 0x123]]
    assert unpack(bytes([0xFF, 0x21, 0x00]), "Mono10Packed", (1, 2)).tolist() == [[0x3FD, 0x002]]


@pytest.mark.parametrize(
    ("payload", "pixel_format", "message"),
    [
        (b"\0" * 23, "Mono12p", "23 bytes are too few, Mono12p needs 24"),
        (b"", "RGB8", "is none of"),
    ],
)
def test_what_cannot_be_unpacked_says_why(payload, pixel_format, message):
    with pytest.raises(ValueError, match=message):
        unpack(payload, pixel_format, (4, 4))


# --- without a camera ----------------------------------------------------------------------------

ADDRESS = "127.0.0.1"
FAKE = shutil.which("arv-fake-gv-camera-0.8")
ARAVIS = ["/usr/bin/python3", "-c", "import gi; gi.require_version('Aravis', '0.8')"]


def build(**config):
    source = component("source", "gige")
    defaults = {"camera": ADDRESS, "pixel_format": "Mono16", "frame_rate_hz": 100.0}
    return source.build(source.Config(**{**defaults, **config}), {})


def test_a_python_that_is_not_there_is_named():
    with pytest.raises(PipelineError, match=r"/no/python: cannot be run .*; set source.python"):
        build(python="/no/python")


def test_a_python_without_aravis_says_what_to_install():
    with pytest.raises(
        PipelineError, match=r"no Aravis for Python .*; install Debian's gir1.2-ara"
    ):
        build(python=BIN / "python")


# --- fake camera ---------------------------------------------------------------------------------

needs_camera = pytest.mark.skipif(
    FAKE is None or subprocess.run(ARAVIS, capture_output=True).returncode != 0,
    reason="no fake camera: apt-get install aravis-tools gir1.2-aravis-0.8 python3-gi",
)


@contextmanager
def fake_camera(*options):
    words = [FAKE, "-i", ADDRESS, "-s", "TEST", *options]
    camera = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        time.sleep(1.0)
        assert camera.poll() is None, "the fake camera did not start: is its port in use?"
        yield camera
    finally:
        camera.kill()
        camera.wait()


def take(source, seconds, until=None):
    """What comes in that time, or until something does."""
    found = []
    timer = threading.Timer(seconds, source.close)
    timer.start()
    for item in source.frames():
        found.append(item)
        if until is not None and until(item):
            break
    timer.cancel()
    return found


def numbers(items):
    return [item.info.seq if isinstance(item, Frame) else item.seq for item in items]


@needs_camera
def test_frames_are_all_there_across_the_end_of_the_cameras_numbers():
    with fake_camera():  # which begins at 65300, so that its 16 bits run out in the test
        source = build(width=640, height=512, exposure_us=4000.0)
        assert (source.shape, source.sensor.full_scale) == ((512, 640), 65535)
        found = take(source, 30.0, until=lambda item: numbers([item])[0] >= 260)
        source.close()
    assert numbers(found) == list(range(261))
    reasons = {item.reason for item in found if isinstance(item, Dropped)}
    assert not [reason for reason in reasons if "waiting" in reason]  # a busy machine may lose some
    frames = [item for item in found if isinstance(item, Frame)]
    assert len(frames) > 100
    assert all(frame.info.flags == () for frame in frames)
    assert {frame.pixels_HW.dtype for frame in frames} == {np.dtype(np.uint16)}
    stamps_s = np.array([frame.info.t_exposure_ns for frame in frames]) / 1e9
    assert (np.diff(stamps_s) > 0.0).all()
    assert abs(stamps_s[-1] - time.time()) < 60.0  # the fake camera's clock is the host's
    assert frames[0].info.clock == "camera"


@needs_camera
def test_eight_bits_and_a_region():
    with fake_camera():
        source = build(pixel_format="Mono8", width=64, height=32, x=16, y=8)
        assert (source.shape, source.sensor.full_scale) == ((32, 64), 255)
        (frame,) = take(source, 20.0, until=lambda item: True)
        source.close()
    assert frame.pixels_HW.dtype == np.uint8
    assert frame.pixels_HW.shape == (32, 64)


@needs_camera
def test_lost_packets_are_lost_frames():
    with fake_camera("-r", "20"):
        source = build(width=640, height=512, resend=False)
        found = take(source, 20.0, until=lambda item: numbers([item])[0] >= 60)
        source.close()
    assert numbers(found)[:60] == list(range(60))
    reasons = {item.reason for item in found if isinstance(item, Dropped)}
    assert "gige: missing-packets" in reasons


@needs_camera
def test_a_helper_that_dies_is_started_again():
    with fake_camera():
        source = build(width=64, height=32)
        frames = source.frames()
        found = [next(frames) for _ in range(5)]
        os.kill(source._helper.pid, signal.SIGKILL)
        while not (isinstance(found[-1], Frame) and found[-1].info.flags):
            found.append(next(frames))
        source.close()
        list(frames)
    assert numbers(found) == list(range(len(found)))
    reasons = [item.reason for item in found if isinstance(item, Dropped)]
    assert "gige: the helper process ended; waiting for it" in reasons


@needs_camera
def test_a_camera_that_comes_back_with_other_settings_is_not_misread():
    with fake_camera() as camera:
        source = build(pixel_format=None, frame_rate_hz=None)  # as the camera has it: Mono8
        assert source.sensor.full_scale == 255
        frames = source.frames()
        found = [next(frames)]
        os.kill(source._helper.pid, signal.SIGKILL)
        camera.kill()
        camera.wait()
    with fake_camera():
        build(pixel_format="Mono16")  # someone else sets it
        while not (isinstance(found[-1], Dropped) and "as it began" in found[-1].reason):
            found.append(next(frames))
        source.close()
        list(frames)
    assert "Mono16, not 512×512 Mono8 as it began" in found[-1].reason


@needs_camera
@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"camera": "127.0.0.9"}, "camera 127.0.0.9: "),
        ({"exposure_us": 1e12}, "exposure_time must be from .* to .*, got 1e.12"),
        ({"frame_rate_hz": 1e9}, "frame_rate must be from"),
        ({"gain": 1e6}, "gain must be from 0 to 10, got 1e.06"),
        ({"pixel_format": "Mono99"}, "camera 127.0.0.1: .*Mono99"),
        ({"pixel_format": "RGB8"}, "pixel format RGB8; set source.pixel_format to one of Mono8"),
    ],
)
def test_what_the_camera_refuses_is_one_line(config, message):
    with fake_camera(), pytest.raises(PipelineError, match=message) as error:
        build(**config)
    assert "\n" not in str(error.value)
    away = config.get("camera") is not None
    assert isinstance(error.value, Unavailable) == away, "to try again helps against that only"


@needs_camera
def test_a_camera_in_a_live_pipeline_is_unplugged_and_plugged_in_again(tmp_path):
    config = tmp_path / "live.yaml"
    config.write_text(
        f"source: {{kind: gige, camera: {ADDRESS}, pixel_format: Mono16, width: 640, height: 512,"
        " frame_rate_hz: 20, exposure_us: 4000}\n"
        "sensor: {id: cam, read_noise: 50}\n"
        "unmix: {threads: 1}\n"
        f"publish: {{endpoint: 'ipc://{tmp_path}/out', wait_for: 1}}\n"
    )
    words = [str(BIN / "pipeline"), "run", "--config", str(config)]
    heard = []
    with fake_camera() as camera:
        pipeline = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        subscriber = Subscriber(f"ipc://{tmp_path}/out")

        def listen(enough):
            deadline = time.monotonic() + 60.0
            while not enough(heard):
                assert time.monotonic() < deadline, heard[-2:]
                message = subscriber.receive(0.2)
                heard.extend([message] if message else [])

        try:
            listen(lambda m: sum(one["schema"] == "irst.targets/1" for one in m) >= 20)
            camera.kill()
            listen(lambda m: "waiting for it" in m[-1].get("reason", ""))
            with fake_camera():
                listen(lambda m: "restarted" in m[-1].get("frame_flags", []))
                pipeline.send_signal(signal.SIGINT)
                listen(lambda m: m[-1]["schema"] == "irst.eos/1")
                assert pipeline.wait(timeout=20.0) == 0, pipeline.stderr.read()
        finally:
            pipeline.kill()
            pipeline.communicate()
            subscriber.close()
    seqs = [message["frame_seq"] for message in heard if "frame_seq" in message]
    assert seqs == list(range(len(seqs)))  # every number is a frame or a gap, in order
    gaps = [message["reason"] for message in heard if message["schema"] == "irst.gap/1"]
    assert gaps.count("gige: the camera no longer answers; waiting for it") == 1
    assert sum("restarted" in message.get("frame_flags", []) for message in heard) == 1
    end = heard[-1]
    assert end["frames_in"] == end["published"] + sum(d["frames"] for d in end["dropped"])
