"""The page Prometheus reads, which nobody who reads it badly can make the run suffer for.

The newest connections are answered; one more than MAX_OPEN ends the oldest, so that who holds
connections open takes neither files from the run nor the page from others.
"""

import logging
import socket
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from socketserver import ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import CollectorRegistry, make_wsgi_app
from prometheus_client.exposition import choose_encoder

MAX_OPEN = 32
PATIENCE_S = 10.0
log = logging.getLogger(__name__)


class _Handler(WSGIRequestHandler):
    timeout = PATIENCE_S

    def log_message(self, *_: Any) -> None:
        """Nothing: to be read is what the page is for."""


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, *arguments: Any) -> None:
        self._open: dict[socket.socket, None] = {}  # oldest first
        self._lock = threading.Lock()
        super().__init__(*arguments)

    def process_request(self, request: Any, client_address: Any) -> None:
        with self._lock:
            if len(self._open) >= MAX_OPEN:
                oldest = next(iter(self._open))
                del self._open[oldest]
                with suppress(OSError):  # it has gone by itself
                    oldest.shutdown(socket.SHUT_RDWR)
            self._open[request] = None
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        with self._lock:
            self._open.pop(request, None)
        super().shutdown_request(request)

    def handle_error(self, *_: Any) -> None:
        """A client that goes before it has its answer is its own affair."""
        log.debug("a client of the metrics page", exc_info=True)


@contextmanager
def metrics_page(address: str, port: int, registry: CollectorRegistry) -> Iterator[None]:
    """Answer there as long as the block lasts; raises OSError if that cannot be."""
    app = _tolerant(make_wsgi_app(registry))
    with make_server(address, port, app, _Server, _Handler) as server:
        thread = threading.Thread(target=server.serve_forever, name="metrics", daemon=True)
        thread.start()
        try:
            yield
        finally:
            server.shutdown()
            thread.join()


def _tolerant(app: Callable[..., Iterable[bytes]]) -> Callable[..., Iterable[bytes]]:
    """The application, which gives a client whose wish is no format the plain one."""

    def answer(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        try:
            choose_encoder(environ.get("HTTP_ACCEPT", ""))
        except (TypeError, ValueError):
            del environ["HTTP_ACCEPT"]
        return app(environ, start_response)

    return answer
