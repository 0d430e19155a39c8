"""Subscribe to a pipeline without installing it: pyzmq and msgpack are enough.

python examples/subscribe.py tcp://127.0.0.1:5556
"""

import argparse

import msgpack
import zmq

parser = argparse.ArgumentParser(description="Print the targets a pipeline publishes.")
parser.add_argument("endpoint", help="its publish.endpoint, e.g. tcp://127.0.0.1:5556")
endpoint = parser.parse_args().endpoint
socket = zmq.Context().socket(zmq.SUB)
try:
    socket.connect(endpoint)
except zmq.ZMQError as error:
    parser.error(f"{endpoint}: {error}")
socket.setsockopt(zmq.SUBSCRIBE, b"targets.")
while True:
    topic, body = socket.recv_multipart()
    message = msgpack.unpackb(body)
    if message["schema"] == "irst.eos/1":
        break
    if message["schema"] == "irst.targets/1":
        targets = message["targets"]
        for x_px, y_px, intensity in zip(
            targets["x_px"], targets["y_px"], targets["intensity"], strict=True
        ):
            print(message["frame_seq"], f"{x_px:.3f} {y_px:.3f} {intensity:.0f}")
