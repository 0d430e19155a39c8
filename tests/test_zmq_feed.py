"""Frames pushed over ZeroMQ by other programs: what comes through, what is seen to be lost."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgpack
import numpy as np
import pytest
import zmq
from conftest import BIN
from hypothesis import given, settings
from hypothesis import strategies as st
from test_runtime import run_dir as run_dir
from test_runtime import start, totals, wait_for, workers

from pipeline.client import Subscriber
from pipeline.component import component
from pipeline.config import load_config, open_source
from pipeline.errors import PipelineError
from pipeline.messages import BadMessage, Dropped, Frame, Malformed, Pose
from pipeline.numbering import MAX_GAP, Numbering, Position
from pipeline.transport.feed import sent_frame

EXAMPLES = Path(__file__).parents[1] / "examples"
WIDTH, HEIGHT = 16, 12


def header(seq, **changes):
    fields = {
        "schema": "irst.frame/1",
        "seq": seq,
        "t_exposure_ns": 1000 + seq,
        "clock": "utc",
        "dtype": "uint16",
        "shape": [HEIGHT, WIDTH],
    }
    return fields | changes


def message(seq, **changes):
    pixels = np.full((HEIGHT, WIDTH), seq % 1000, "<u2")
    return [msgpack.packb(header(seq, **changes)), pixels.tobytes()]


# --- numbers -------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 40), max_size=30), st.integers(0, 1 << 40))
@settings(max_examples=60, deadline=None)
def test_every_number_is_a_frame_or_a_loss(missing, first):
    numbering, seen, number, own = Numbering(), [], first, []
    for lost in missing:
        step = numbering.take(number)
        assert not step.restarted
        seen += [*step.lost, step.seq]
        own.append(number - first)
        assert step.seq == number - first
        number += 1 + lost
    assert seen == list(range(len(seen)))


@pytest.mark.parametrize("number", [3, 9 + MAX_GAP + 2])
def test_numbers_that_go_back_or_far_ahead_begin_anew(number):
    numbering = Numbering()
    assert [numbering.take(seq).seq for seq in (8, 9)] == [0, 1]
    step = numbering.take(number)
    assert (step.seq, list(step.lost), step.restarted) == (2, [], True)
    assert list(numbering.take(number + 2).lost) == [3]


def test_a_loss_without_number_is_not_counted_twice():
    numbering = Numbering()
    numbering.take(5)
    assert numbering.unnumbered() == 1  # which was number 6, as number 8 shows
    step = numbering.take(8)
    assert (list(step.lost), step.seq) == ([2], 3)


@pytest.mark.parametrize("following", [2, 65537])
def test_numbers_of_a_camera_begin_again_with_one_or_go_on(following):
    numbering = Numbering(last=65535)
    numbering.take(65534)
    step = numbering.take(following)
    assert (list(step.lost), step.restarted) == ([1, 2], False)
    step = numbering.take(following + 1)
    assert (step.seq, list(step.lost), step.restarted) == (4, [], False)
    assert numbering.take(30000).restarted


@pytest.mark.parametrize(
    ("number", "lost", "offset"),
    [(105, [], 105), (106, [], 106), (107, [0], 106), (109, [0, 1, 2], 106)],
)
def test_another_process_goes_on_with_the_numbers(number, lost, offset):
    first, second = Numbering(), Numbering()
    assert first.position is None
    assert (first.take(100).seq, first.take(104).seq) == (0, 4)
    assert first.unnumbered() == 5  # which was number 105, or none of the sender's
    assert first.position == Position(100, 1)
    second.resume(Position(106, 1))  # of which 0 is 6
    assert second.position == Position(106, 1)
    step = second.take(number)
    assert (step.seq, list(step.lost), step.restarted) == (len(lost), lost, False)
    assert second.position == Position(offset, 0)


# --- message -------------------------------------------------------------------------------------


def test_a_frame_with_all_fields():
    pose = {"az_rad": 1.0, "el_rad": 0.1, "roll_rad": -0.2}
    sent = sent_frame(message(7, flags=["shutter"], pose=pose, clock="gps"))
    assert (sent.seq, sent.t_exposure_ns, sent.clock) == (7, 1007, "gps")
    assert (sent.flags, sent.pose) == (("shutter",), Pose(1.0, 0.1, -0.2))
    assert sent.pixels_HW.dtype == np.uint16
    np.testing.assert_array_equal(sent.pixels_HW, np.full((HEIGHT, WIDTH), 7))


@pytest.mark.parametrize(
    ("parts", "seq", "reason"),
    [
        ([b""], None, "1 parts; send two"),
        ([b"\xc1", b""], None, "header is not a MessagePack map"),
        ([msgpack.packb([1]), b""], None, "header is not a map but list"),
        ([msgpack.packb({"seq": 4}), b""], 4, "header: Object missing required field `schema`"),
        (
            [msgpack.packb({"schema": "irst.frame/1"}), b""],
            None,
            "header: Object missing required field `seq`",
        ),
        (
            message(4, schema="irst.frame/2"),
            4,
            "header: Invalid enum value 'irst.frame/2' - at `header.schema`",
        ),
        (
            message(4, dtype="float32"),
            4,
            "header: Invalid enum value 'float32' - at `header.dtype`",
        ),
        (
            message(4, shape=[HEIGHT]),
            4,
            "header: Expected `array` of length >= 2 - at `header.shape`",
        ),
        (message(4, shape=[HEIGHT, 0]), 4, "header: Expected `int` >= 1 - at `header.shape[1]`"),
        (message(4, shape=[HEIGHT, 17]), 4, "17×12 uint16 needs 408 bytes, not 384"),
        (message(4, colour=True), 4, "header: Object contains unknown field `colour`"),
        (
            message(4, t_exposure_ns=1.5),
            4,
            "header: Expected `int`, got `float` - at `header.t_exposure_ns`",
        ),
        (
            message(4, pose={"az_rad": float("nan")}),
            4,
            "header: Expected a finite `float` - at `header.pose.az_rad`",
        ),
        (message(-1), None, "header: Expected `int` >= 0 - at `header.seq`"),
    ],
)
def test_what_is_no_frame_says_why(parts, seq, reason):
    found = sent_frame(parts)
    assert isinstance(found, BadMessage)
    assert found.seq == seq
    assert found.reason.startswith(reason)


@given(st.lists(st.binary(max_size=80), max_size=3))
@settings(max_examples=60, deadline=None)
def test_bytes_that_are_no_frame_never_raise(parts):
    assert isinstance(sent_frame(parts), BadMessage)


# --- source --------------------------------------------------------------------------------------


@pytest.fixture
def feed(tmp_path):
    """The source on a socket of its own, and a sender connected to it."""
    endpoint = f"ipc://{tmp_path}/feed"
    kind = {"kind": "zmq_feed", "endpoint": endpoint, "width": WIDTH, "height": HEIGHT}
    source = open_source(load_config(None, source=kind))
    context = zmq.Context()
    sender = context.socket(zmq.PUSH)
    sender.connect(endpoint)
    yield source, sender
    source.close()
    context.destroy(linger=0)


def test_frames_come_as_they_were_sent_and_losses_between_them(feed):
    source, sender = feed
    frames = source.frames()
    for seq in (50, 51, 54, 0):
        sender.send_multipart(message(seq))
    sender.send_multipart([b"rubbish"])
    sender.send_multipart(message(2, dtype="uint8"))
    sender.send_multipart(message(3))
    found = [next(frames) for _ in range(9)]
    lost = {item.seq: item.reason for item in found if isinstance(item, Dropped)}
    assert lost == {
        2: "feed: missing in the sender's numbers",
        3: "feed: missing in the sender's numbers",
        6: "feed: 1 parts; send two, header and pixels",
        7: "feed: 16×12 uint8 needs 192 bytes, not 384",
    }
    seqs = [item.info.seq if isinstance(item, Frame) else item.seq for item in found]
    assert seqs == list(range(9))
    frames_only = [item for item in found if isinstance(item, Frame)]
    assert [item.pixels_HW[0, 0] for item in frames_only] == [50, 51, 54, 0, 3]
    assert [item.info.flags for item in frames_only] == [(), (), (), ("restarted",), ()]


def test_frames_of_another_size_are_malformed_with_the_reason(feed):
    source, sender = feed
    frames = source.frames()
    pixels = np.zeros((HEIGHT, 20), np.uint16)
    parts = [msgpack.packb(header(0, shape=[HEIGHT, 20])), pixels]
    sender.send_multipart(parts)
    lost = next(frames)
    assert isinstance(lost, Malformed), "so that it is counted, and kept"
    assert (lost.seq, lost.stage) == (0, "source")
    assert lost.reason == "feed: 20×12 uint16, not 16×12 uint16"
    assert list(map(bytes, lost.parts)) == list(map(bytes, parts))


def test_closing_ends_a_feed_that_nobody_sends_to(feed):
    source, _ = feed
    threading.Timer(0.05, source.close).start()
    started = time.monotonic()
    assert list(source.frames()) == []
    assert time.monotonic() - started < 5.0


def test_two_feeds_cannot_listen_at_one_place(feed):
    source, sender = feed
    frames = source.frames()
    sender.send_multipart(message(0))
    next(frames)
    with pytest.raises(PipelineError, match="address already in use"):
        next(source.frames())


@pytest.mark.parametrize("endpoint", ["tcp://0.0.0.0:5557", "tcp://10.0.0.1:5557", "udp://x"])
def test_strangers_cannot_send(endpoint):
    kind = {"kind": "zmq_feed", "endpoint": endpoint, "width": WIDTH, "height": HEIGHT}
    with pytest.raises(PipelineError, match="strangers cannot send"):
        load_config(None, source=kind)


def test_sensor_of_the_feed():
    kind = component("source", "zmq_feed")
    config = kind.Config(endpoint="ipc:///tmp/x", width=16, height=12, dtype="uint8")
    assert kind.build(config, {"id": "mast"}).sensor.full_scale == 255


# --- live ----------------------------------------------------------------------------------------


def live(tmp_path, sender_words, frames):
    """Feed `pipeline run` with a program; returns what a subscriber heard, and the last totals."""
    into, out = f"ipc://{tmp_path}/in", f"ipc://{tmp_path}/out"
    config = tmp_path / "live.yaml"
    config.write_text(
        f"source: {{kind: zmq_feed, endpoint: '{into}', width: 640, height: 512}}\n"
        "sensor: {id: mast, full_scale: 16383, read_noise: 5}\n"
        "unmix: {threads: 1}\n"
        f"publish: {{endpoint: '{out}', wait_for: 1}}\n"
    )
    words = [str(BIN / "pipeline"), "run", "--config", str(config)]
    pipeline = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    subscriber = Subscriber(out)
    heard = []
    try:
        with subprocess.Popen([*sender_words, into, str(frames)]) as sender:
            deadline = time.monotonic() + 60.0
            while sum(m["schema"] in ("irst.targets/1", "irst.gap/1") for m in heard) < frames:
                assert time.monotonic() < deadline, heard[-3:]
                found = subscriber.receive(0.2)
                heard += [found] if found else []
            assert sender.wait(timeout=10.0) == 0
        pipeline.send_signal(signal.SIGINT)
        while heard[-1]["schema"] != "irst.eos/1":
            heard.append(subscriber.receive(10.0))
        assert pipeline.wait(timeout=20.0) == 0, pipeline.stderr.read()
    finally:
        pipeline.kill()
        pipeline.communicate()
        subscriber.close()
    return heard


def push(endpoint, stop):
    """Push frames, 100 a second, that tell their numbers; returns how many."""
    pixels_HW = np.random.default_rng(1).normal(1000.0, 5.0, (128, 160)).astype("<u2")
    with zmq.Context() as context, context.socket(zmq.PUSH) as sender:
        sender.linger, sender.sndtimeo = 1000, 20_000
        sender.connect(endpoint)
        for number in range(100_000):
            fields = header(number, shape=[128, 160], t_exposure_ns=number)
            sender.send_multipart([msgpack.packb(fields), pixels_HW])
            if stop.wait(0.01):
                return number + 1


def test_numbers_go_on_with_the_sender_when_the_front_dies(run_dir):
    into, out = f"ipc://{run_dir}/in", f"ipc://{run_dir}/out"
    process = start(
        run_dir,
        f"source: {{kind: zmq_feed, endpoint: '{into}', width: 160, height: 128}}\n"
        "sensor: {full_scale: 16383, read_noise: 5}\n"
        f"publish: {{endpoint: '{out}'}}\nsupervisor: {{name: {run_dir.name}}}\n",
    )
    stop, heard = threading.Event(), []
    with ThreadPoolExecutor(1) as pool, contextlib.closing(Subscriber(out)) as subscriber:

        def published():
            heard.extend(iter(lambda: subscriber.receive(0.0), None))
            return [message for message in heard if message["schema"] == "irst.targets/1"]

        sent = pool.submit(push, into, stop)
        try:
            for which in (0, -1):  # the front, and the one started after all others
                before = len(published())
                wait_for(lambda: len(published()) > before + 20)  # noqa: B023, at once
                front = workers(process.pid)[which]
                os.kill(front, signal.SIGSTOP)
                time.sleep(0.3)  # frames come to its socket that nobody will read
                os.kill(front, signal.SIGKILL)
            before = published()[-1]["frame_seq"]
            wait_for(lambda: published()[-1]["frame_seq"] > before + 200)
        except BaseException:
            process.kill()
            raise
        finally:
            stop.set()
        last = sent.result() - 1
        wait_for(lambda: published() and any(m.get("frame_seq") == last for m in heard))
        process.send_signal(signal.SIGTERM)
        stdout, stderr = process.communicate(timeout=30)
        wait_for(lambda: published() and heard[-1]["schema"] == "irst.eos/1")
        targets = published()
    dropped = heard[-1]["dropped"]
    assert process.returncode == 0
    assert (totals(stdout)[0], stderr.count("restarting")) == (last + 1, 2)
    assert all(message["frame_seq"] == message["t_exposure_ns"] for message in targets)
    assert not any(message.get("frame_flags") for message in targets)
    assert "feed: missing in the sender's numbers" in {one["reason"] for one in dropped}


def test_the_python_example_feeds_a_live_pipeline(tmp_path):
    heard = live(tmp_path, [sys.executable, str(EXAMPLES / "send_frames.py")], 60)
    end = heard[-1]
    assert end["frames_in"] == 60
    assert end["published"] + sum(lost["frames"] for lost in end["dropped"]) == 60
    published = [m for m in heard if m["schema"] == "irst.targets/1"]
    assert len(published) == end["published"] > 0
    assert {m["sensor_id"] for m in published} == {"mast"}
    assert published[0]["frame_shape"] == [512, 640]
    ages_s = [time.time() - m["t_exposure_ns"] / 1e9 for m in published]
    assert max(ages_s) < 120.0


def test_the_c_example_feeds_a_live_pipeline(tmp_path):
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler: install gcc")
    program = tmp_path / "send_frames"
    flags = ["-O2", "-Wall", "-Wextra", "-Werror"]
    words = [compiler, *flags, str(EXAMPLES / "send_frames.c"), "-o", str(program), "-lzmq"]
    made = subprocess.run(words, capture_output=True, text=True)
    if "zmq.h: No such file" in made.stderr:
        pytest.skip("no headers of libzmq: install libzmq3-dev")
    assert made.returncode == 0, made.stderr
    end = live(tmp_path, [str(program)], 60)[-1]
    assert end["frames_in"] == 60
    assert end["published"] + sum(lost["frames"] for lost in end["dropped"]) == 60
