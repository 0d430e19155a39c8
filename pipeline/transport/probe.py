"""Whether one could listen at an endpoint: tried, without leaving anything behind."""

from collections.abc import Iterator
from contextlib import contextmanager

import zmq

from pipeline.errors import PipelineError
from pipeline.transport.security import ServerKeys
from pipeline.transport.sockets import bind


@contextmanager
def listening(endpoint: str, keys: ServerKeys | None = None) -> Iterator[None]:
    """Hold an endpoint as long as the block lasts; with keys, no stranger gets beyond a handshake.

    Raises AddressInUse if somebody else holds it, PipelineError if nobody can listen there. The
    context is its own, so that the endpoint is free again when the block is left.
    """
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    try:
        socket = context.socket(zmq.PUSH)
        if keys is not None:
            keys.apply(socket)
        hold = bind(socket, endpoint)
    except PipelineError:
        context.destroy(linger=0)
        raise
    with hold:
        try:
            yield
        finally:
            context.destroy(linger=0)
