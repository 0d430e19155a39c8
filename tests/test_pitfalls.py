"""What bites ZeroMQ pipelines, against real processes and sockets: forks, giants, the deaf."""

import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import faulty_nodes
import pytest
import zmq
from test_runtime import run_dir as run_dir
from test_runtime import start, totals
from test_telemetry import free_port
from test_transport import DEADLINE_S, word
from test_transport import endpoint as endpoint
from test_transport import keep as keep
from test_zmq_feed import feed as feed
from test_zmq_feed import message

from pipeline.client import Subscriber
from pipeline.config import load_config, open_source
from pipeline.messages import Frame
from pipeline.runtime.supervisor import Supervisor
from pipeline.transport import feed as feed_transport
from pipeline.transport import sockets
from pipeline.transport.feed import FeedSocket
from pipeline.transport.hub import HubSocket, NodeSocket, Word
from pipeline.transport.sockets import MAX_MESSAGE_BYTES
from pipeline.watch import read_figures

pytestmark = pytest.mark.patient

ACTORS = Path(__file__).with_name("chaos_actors.py")
SMALLER = 1 << 20


def test_nodes_are_spawned_and_share_nothing_with_their_parent(scene_recording, monkeypatch):
    monkeypatch.setattr(faulty_nodes, "INHERITED", True)
    monkeypatch.setattr("pipeline.runtime.supervisor.run_node", faulty_nodes.spawned)
    config = load_config(None, source={"kind": "zarr_recording", "path": str(scene_recording)})
    source = open_source(config)
    with Supervisor(config, "replay", source.sensor, source.shape) as supervisor:
        schemas = [message["schema"] for message in supervisor.messages()]
    source.close()
    assert schemas.count("irst.targets/1") == 12


def test_a_giant_from_a_node_is_refused_and_holds_up_no_other(endpoint, keep, monkeypatch):
    monkeypatch.setattr(sockets, "MAX_MESSAGE_BYTES", SMALLER)
    hub = keep(HubSocket(endpoint))
    giant, other = (keep(NodeSocket(endpoint, name)) for name in (b"unmix.0", b"unmix.1"))
    for node in (giant, other):
        node.send(Word("ready"))
    assert {word(hub)[0] for _ in range(2)} == {b"unmix.0", b"unmix.1"}
    giant.send(Word("result", 1), [bytes(SMALLER), bytes(SMALLER + 1)])
    for seq in range(100):
        other.send(Word("result", seq), [b"x"])
        assert word(hub) == (b"unmix.1", Word("result", seq), [b"x"])
    giant.send(Word("result", 2), [bytes(SMALLER)])
    assert word(hub)[:2] == (b"unmix.0", Word("result", 2)), "it has come back by itself"


def test_a_giant_over_the_feed_is_refused_and_holds_up_no_other_sender(feed, monkeypatch):
    monkeypatch.setattr(feed_transport, "MAX_MESSAGE_BYTES", SMALLER)
    source, other = feed
    frames = source.frames()
    with zmq.Context() as context, context.socket(zmq.PUSH) as giant:
        giant.connect(other.last_endpoint)
        other.send_multipart(message(0))
        assert next(frames).info.seq == 0
        giant.send_multipart([message(1)[0], bytes(SMALLER + 1)])
        for seq in range(1, 100):
            other.send_multipart(message(seq))
            frame = next(frames)
            assert isinstance(frame, Frame)
            assert (frame.info.seq, frame.pixels_HW[0, 0]) == (seq, seq)
        giant.send_multipart(message(100))
        assert next(frames).info.seq == 100, "it has come back by itself"


@pytest.mark.parametrize("make", [HubSocket, FeedSocket])
def test_messages_have_a_limit(make, endpoint, keep):
    assert keep(make(endpoint))._socket.getsockopt(zmq.MAXMSGSIZE) == MAX_MESSAGE_BYTES == 1 << 28


RUN = """
source: {{kind: synthetic, rate_hz: 25, width: 160, height: 128, singles: 4, groups: 5}}
publish: {{endpoint: "ipc://{folder}/out", wait_for: 1, queue: 20}}
supervisor: {{name: {folder.name}}}
telemetry: {{metrics: "{metrics}"}}
"""


def ages_ms(subscriber, frames):
    """Of so many frames; only an overloaded machine may lose some meanwhile."""
    ages, lost = [], []
    until = time.monotonic() + DEADLINE_S + frames / 10
    while len(ages) < frames:
        assert time.monotonic() < until
        heard = subscriber.receive(1.0) or {"schema": ""}
        ages += [heard["age_ns"] / 1e6] if heard["schema"] == "irst.targets/1" else []
        lost += [heard["stage"]] if heard["schema"] == "irst.gap/1" else []
    assert "subscriber" not in lost
    assert len(lost) <= frames // 10
    return ages


def test_a_subscriber_that_stops_reading_costs_nobody_else_anything(run_dir, request):
    metrics = f"127.0.0.1:{free_port()}"
    process = start(run_dir, RUN.format(folder=run_dir, metrics=metrics))
    request.addfinalizer(process.kill)
    good = Subscriber(f"ipc://{run_dir}/out")
    before = ages_ms(good, 30)
    assert read_figures(metrics).get("irst_subscriber_overflows_total") == 0
    words = [sys.executable, str(ACTORS), "deaf", f"ipc://{run_dir}/out"]
    with subprocess.Popen(words, stdin=-1, stdout=-1, text=True) as deaf:
        assert deaf.stdout.readline() == "deaf\n"
        while not read_figures(metrics).get("irst_subscriber_overflows_total"):
            ages_ms(good, 10)
        meanwhile = ages_ms(good, 75)
        figures = read_figures(metrics)
        overflows = figures.get("irst_subscriber_overflows_total")
        assert figures.get("irst_subscribers_behind") == 1
        said, _ = deaf.communicate("\n", timeout=DEADLINE_S)
    assert int(said) >= 75, "from when it was full it had nothing"
    assert overflows >= 75
    assert median(meanwhile) < max(100, 3 * median(before))
    assert max(meanwhile) < max(500, 3 * max(before)), "it waits for nobody"
    ages_ms(good, 25)
    process.send_signal(15)
    while (end := good.receive(DEADLINE_S))["schema"] != "irst.eos/1":
        assert end.get("stage") != "subscriber"
    good.close()
    stdout, stderr = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 0, stderr
    frames_in, published, dropped = totals(stdout)
    assert frames_in == published + dropped
    assert (frames_in, published) == (end["frames_in"], end["published"])
    assert "is behind and loses messages" in stderr
    assert "has caught up" in stderr or "is gone" in stderr
