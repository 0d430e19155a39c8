"""Send frames to a pipeline without installing it: pyzmq, msgpack and numpy are enough.

python examples/send_frames.py tcp://127.0.0.1:5557 1000
"""

import argparse
import time

import msgpack
import numpy as np
import zmq

parser = argparse.ArgumentParser(description="Send frames of noise, 100 a second.")
parser.add_argument("endpoint", help="the pipeline's source.endpoint, e.g. tcp://127.0.0.1:5557")
parser.add_argument("frames", type=int, help="how many")
given = parser.parse_args()
header = {"schema": "irst.frame/1", "clock": "utc", "dtype": "uint16", "shape": [512, 640]}
with zmq.Context() as context, context.socket(zmq.PUSH) as socket:  # left when all is sent
    try:
        socket.connect(given.endpoint)
    except zmq.ZMQError as error:
        parser.error(f"{given.endpoint}: {error}")
    for seq in range(given.frames):
        pixels_HW = np.random.default_rng(seq).normal(1000.0, 5.0, (512, 640)).astype("<u2")
        stamp = {"seq": seq, "t_exposure_ns": time.time_ns()}
        socket.send_multipart([msgpack.packb(header | stamp), pixels_HW])
        time.sleep(0.01)
