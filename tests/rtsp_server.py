"""A real RTSP server, GStreamer's, for the tests: PORT and, for each PATH, what is streamed there.

/usr/bin/python3 tests/rtsp_server.py PORT /PATH 'gst-launch words ! rtph264pay name=pay0' …

Port 0 is any free one; the port is printed once the server listens, on this machine only.
"""

import sys

import gi

gi.require_version("Gst", "1.0")
gi.require_version("GstRtspServer", "1.0")
from gi.repository import GLib, Gst, GstRtspServer  # noqa: E402

Gst.init(None)
server = GstRtspServer.RTSPServer()
server.set_address("127.0.0.1")
server.set_service(sys.argv[1])
for path, words in zip(sys.argv[2::2], sys.argv[3::2], strict=True):
    factory = GstRtspServer.RTSPMediaFactory()
    factory.set_launch(f"( {words} )")
    server.get_mount_points().add_factory(path, factory)
if server.attach(None) == 0:
    sys.exit(f"port {sys.argv[1]} is in use")
print(server.get_bound_port(), flush=True)
GLib.MainLoop().run()
