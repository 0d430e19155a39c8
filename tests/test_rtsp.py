"""Video over RTSP from a real server, GStreamer's: lossy, killed, silent, and not there at all."""

import signal
import socket
import subprocess
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from numpy.testing import assert_array_equal
from test_sources import CLIPS, build, write_video

from pipeline.errors import Unavailable
from pipeline.messages import Dropped, Frame

PYTHON = "/usr/bin/python3"
GSTREAMER = (
    "import gi; gi.require_version('GstRtspServer', '1.0'); from gi.repository import Gst; "
    "Gst.init(None); assert Gst.ElementFactory.find('rtph264pay')"
)
pytestmark = pytest.mark.skipif(
    not Path(PYTHON).exists()
    or subprocess.run([PYTHON, "-c", GSTREAMER], capture_output=True).returncode != 0,
    reason="no RTSP server: apt-get install gir1.2-gst-rtsp-server-1.0 gstreamer1.0-plugins-good "
    "python3-gi",
)
H264 = f"filesrc location={CLIPS[0].absolute()} ! qtdemux ! rtph264pay name=pay0"
GAP = "video: the stream broke off; waiting for it"


@contextmanager
def served(*streams, port=0):
    """A server of these paths and what GStreamer streams there; its process and address."""
    program = Path(__file__).with_name("rtsp_server.py")
    words = [PYTHON, str(program), str(port), *streams]
    server = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        yield server, f"rtsp://127.0.0.1:{int(server.stdout.readline())}"
    finally:
        server.kill()
        server.communicate()


@pytest.fixture
def jpegs(tmp_path):
    """A stream of JPEGs, 20 s of 50 Hz, ever brighter for four seconds and then again."""
    ramp = [np.full((48, 64), 1 + number % 200, np.uint8) for number in range(1000)]
    path = write_video(tmp_path / "ramp.avi", "MJPG", ramp, rate_hz=50.0)
    # Coded anew: RTP has no place for the Huffman tables that FFmpeg makes for each picture.
    return f"filesrc location={path} ! avidemux ! jpegdec ! jpegenc ! rtpjpegpay name=pay0"


def test_h264_is_what_the_file_holds_and_marked_compressed():
    with served("/clip", H264) as (_, address):
        source = build("video_stream", address=f"{address}/clip")
        found = list(islice(source.frames(), 5))
        source.close()
    assert [frame.info.seq for frame in found] == list(range(5))
    assert {(frame.info.flags, frame.info.clock) for frame in found} == {(("compressed",), "utc")}
    wanted = islice(build("video", path=CLIPS[0]).frames(), 5)
    assert_array_equal([f.pixels_HW for f in found], [frame.pixels_HW for frame in wanted])


@pytest.mark.parametrize("ends", ["killed", "silent"])
def test_a_server_that_is_gone_is_a_gap_and_its_return_is_seen(jpegs, ends):
    with served("/live", jpegs) as (server, address):
        port = int(address.rsplit(":", 1)[1])
        source = build("video_stream", address=f"{address}/live", timeout_s=5.0)
        frames = source.frames()
        found = list(islice(frames, 5))
        if ends == "killed":
            server.kill()
            server.wait()
        else:
            server.send_signal(signal.SIGSTOP)
        while isinstance(found[-1], Frame):
            found.append(next(frames))
        server.kill()
        server.wait()
        with served("/live", jpegs, port=port):
            found += list(islice(frames, 5))
            source.close()
            list(frames)
    lost = [item for item in found if isinstance(item, Dropped)]
    assert lost == [Dropped(len(found) - 6, "source", GAP)]
    numbers = [item.seq if isinstance(item, Dropped) else item.info.seq for item in found]
    assert numbers == list(range(len(found)))
    shown = [item for item in found if isinstance(item, Frame)]
    flags = [frame.info.flags for frame in shown]
    assert flags[-5:] == [("compressed", "restarted")] + [("compressed",)] * 4
    assert set(flags[:-5]) == {("compressed",)}
    levels = [float(frame.pixels_HW.mean()) for frame in shown[-5:]]
    assert levels == sorted(levels) and levels[0] < 20.0


def test_a_wrong_address_is_one_line(capfd):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        nobody = f"rtsp://127.0.0.1:{unused.getsockname()[1]}/clip"
        with served("/clip", H264) as (_, address):
            for wrong in (f"{address}/other", nobody):
                with pytest.raises(Unavailable, match=f"^{wrong}: no video comes") as error:
                    build("video_stream", address=wrong)
                assert "\n" not in str(error.value)
    assert capfd.readouterr().err == ""
