"""ZeroMQ and MessagePack: the only package that imports zmq."""
