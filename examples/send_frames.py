"""Send frames to a pipeline without installing it: pyzmq, msgpack and numpy are enough.

python examples/send_frames.py tcp://127.0.0.1:5557 1000
"""

import sys
import time

import msgpack
import numpy as np
import zmq

header = {"schema": "irst.frame/1", "clock": "utc", "dtype": "uint16", "shape": [512, 640]}
with zmq.Context() as context, context.socket(zmq.PUSH) as socket:  # left when all is sent
    socket.connect(sys.argv[1])
    for seq in range(int(sys.argv[2])):
        pixels_HW = np.random.default_rng(seq).normal(1000.0, 5.0, (512, 640)).astype("<u2")
        stamp = {"seq": seq, "t_exposure_ns": time.time_ns()}
        socket.send_multipart([msgpack.packb(header | stamp), pixels_HW])
        time.sleep(0.01)
