"""CUDA without TensorRT: buffers, streams and graphs for whatever computes on a GPU."""
