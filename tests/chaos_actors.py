"""The processes of a run under faults, each started by `chaos.py` as a program of its own."""

import os
import sys
import time

import faulty_nodes
import msgpack
import zmq

from pipeline.physics.scene import Scene, SceneSettings
from pipeline.transport.publish import SubscriberSocket

SHAPE = 128, 160
FRAMES = 25  # rendered; they come again and again
MOST_OUT = 40
PATIENCE_S = 30.0


def run(config: str) -> None:
    """`pipeline run`, its nodes willing to damage what they answer."""
    from pipeline import cli
    from pipeline.runtime import supervisor

    supervisor.run_node = faulty_nodes.on_demand
    sys.argv = ["pipeline", "run", "--config", config]
    cli.main()


def camera(endpoint: str, rate_hz: str) -> None:
    """Pushes frames; those for which there is no room are left out, but after MOST_OUT it waits.

    So a camera does whose driver has no buffer left.
    """
    height, width = SHAPE
    scene = Scene(SceneSettings(seed=1, width=width, height=height, singles=4, groups=5))
    frames = [scene.frame(index)[0].astype("<u2") for index in range(FRAMES)]
    socket = zmq.Context().socket(zmq.PUSH)
    socket.setsockopt(zmq.SNDHWM, 4)
    socket.connect(endpoint)
    fixed = {"schema": "irst.frame/1", "clock": "utc", "dtype": "uint16", "shape": list(SHAPE)}
    next_s, seq, left_out = time.monotonic(), 0, 0
    while os.getppid() != 1:
        header = msgpack.packb(fixed | {"seq": seq, "t_exposure_ns": time.time_ns()})
        try:
            socket.send_multipart([header, frames[seq % FRAMES]], zmq.NOBLOCK)
            seq, left_out = seq + 1, 0
        except zmq.Again:
            seq, left_out = seq + (left_out < MOST_OUT), left_out + 1
        next_s += 1.0 / float(rate_hz)
        time.sleep(max(0.0, next_s - time.monotonic()))


def deaf(endpoint: str) -> None:
    """Subscribes, reads one frame, and no more until told to; then up to what it has missed."""
    subscriber = SubscriberSocket(endpoint, queue=1)
    first = _number(subscriber)
    print("deaf", flush=True)
    sys.stdin.readline()
    last, missed, until = first, 0, time.monotonic() + PATIENCE_S
    while not missed and time.monotonic() < until:
        number = _number(subscriber)
        assert number > last
        last, missed = number, number - last - 1
    subscriber.close()
    print(missed, flush=True)


def _number(subscriber: SubscriberSocket) -> int:
    """Of the next frame, published or lost."""
    while True:
        part = subscriber.receive(PATIENCE_S)
        assert part is not None
        message = msgpack.unpackb(part)
        if "frame_seq" in message:
            return int(message["frame_seq"])


if __name__ == "__main__":
    {"run": run, "camera": camera, "deaf": deaf}[sys.argv[1]](*sys.argv[2:])
