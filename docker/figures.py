"""Carries a run's figures from the loopback they are served on to the container's own address.

For the container `metrics` of compose.metrics.yaml, which shares its network with the pipeline:
GET /metrics is asked of the run and handed on; there is nothing else to be had here.
"""

import sys
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Figures(BaseHTTPRequestHandler):
    """Answers one page."""

    source = "http://127.0.0.1:9464/metrics"
    timeout = 10

    def do_GET(self) -> None:
        """The run's page, or why there is none."""
        if self.path != "/metrics":
            self.send_error(404)
            return
        try:
            with urllib.request.urlopen(self.source, timeout=5) as answer:
                page, kind = answer.read(), answer.headers["Content-Type"]
        except OSError:
            self.send_error(502, "the run does not answer")
            return
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(page)))
        self.end_headers()
        self.wfile.write(page)

    def log_message(self, *_: object) -> None:
        """Nothing: Prometheus asks for ever."""


if __name__ == "__main__":
    address, port = sys.argv[1].rsplit(":", 1)
    Figures.source = sys.argv[2]
    ThreadingHTTPServer((address, int(port)), Figures).serve_forever()
