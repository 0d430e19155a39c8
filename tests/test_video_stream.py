"""Live video: streams over HTTP from a real server, what breaks off, and grey of every layout."""

import threading
import time
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import cv2
import numpy as np
import pytest
from numpy.testing import assert_array_equal
from test_sources import CLIPS, build, write_video

from pipeline.errors import PipelineError, Unavailable
from pipeline.messages import Dropped, Frame
from pipeline.sources.video import grey


class Quiet(SimpleHTTPRequestHandler):
    """Serves files without a word."""

    def log_message(self, *_):
        """Nothing."""


@pytest.fixture
def server(tmp_path):
    """Address of a folder, and the folder."""
    handler = partial(Quiet, directory=str(tmp_path))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as http:
        thread = threading.Thread(target=http.serve_forever, args=(0.05,))
        thread.start()
        yield f"http://127.0.0.1:{http.server_address[1]}", tmp_path
        http.shutdown()
        thread.join()


def test_a_compressed_stream_says_so(server):
    address, folder = server
    (folder / "clip.mp4").write_bytes(CLIPS[0].read_bytes())
    source = build("video_stream", address=f"{address}/clip.mp4", reconnect=False)
    assert (source.shape, source.sensor.full_scale) == ((256, 320), 255)
    frames = list(source.frames())
    assert [frame.info.seq for frame in frames] == list(range(301))
    assert {frame.info.flags for frame in frames} == {("compressed",)}
    assert {frame.info.clock for frame in frames} == {"utc"}
    wanted = [frame.pixels_HW for frame in build("video", path=CLIPS[0]).frames()]
    assert_array_equal([frame.pixels_HW for frame in frames], wanted)


def test_a_stream_that_breaks_off_is_opened_again(server):
    address, folder = server
    pictures = np.random.default_rng(2).integers(0, 256, (5, 48, 64)).astype(np.uint8)
    write_video(folder / "a.avi", "FFV1", pictures)
    source = build("video_stream", address=f"{address}/a.avi")
    frames = source.frames()
    found = [next(frames) for _ in range(12)]
    source.close()
    assert list(frames) == []
    lost = [item for item in found if isinstance(item, Dropped)]
    assert lost == [
        Dropped(5, "source", "video: the stream broke off; waiting for it"),
        Dropped(11, "source", "video: the stream broke off; waiting for it"),
    ]
    shown = [item for item in found if isinstance(item, Frame)]
    assert [frame.info.seq for frame in shown] == [0, 1, 2, 3, 4, 6, 7, 8, 9, 10]
    assert [frame.info.flags for frame in shown] == [()] * 5 + [("restarted",)] + [()] * 4
    assert_array_equal([frame.pixels_HW for frame in shown[:5]], pictures)


class Camera(Quiet):
    """A network camera: JPEGs one after another, 40 of them at 50 a second, then it hangs up."""

    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Type", "multipart/x-mixed-replace; boundary=frame")
        self.end_headers()
        for number in range(40):
            picture = np.full((48, 64), 5 * number, np.uint8)
            jpeg = cv2.imencode(".jpg", picture)[1].tobytes()
            head = f"--frame\r\nContent-Type: image/jpeg\r\nContent-Length: {len(jpeg)}\r\n\r\n"
            self.wfile.write(head.encode() + jpeg + b"\r\n")
            time.sleep(0.02)


def test_a_network_camera_that_hangs_up_is_called_again():
    with ThreadingHTTPServer(("127.0.0.1", 0), Camera) as http:
        thread = threading.Thread(target=http.serve_forever, args=(0.05,))
        thread.start()
        source = build("video_stream", address=f"http://127.0.0.1:{http.server_address[1]}/live")
        frames = source.frames()
        found = [next(frames)]
        while "restarted" not in getattr(found[-1], "info", found[0].info).flags:
            found.append(next(frames))
        source.close()
        list(frames)
        http.shutdown()
        thread.join()
    shown = [item for item in found if isinstance(item, Frame)]
    assert len(shown) >= 38
    levels = [float(frame.pixels_HW.mean()) for frame in shown[:-1]]
    assert levels == sorted(levels)
    assert shown[0].info.flags == ("compressed",)
    assert found[-2] == Dropped(
        len(found) - 2, "source", "video: the stream broke off; waiting for it"
    )


@pytest.mark.parametrize("address", ["http://127.0.0.1:9/none.mp4", "/dev/video-none"])
def test_where_nothing_comes_from_is_named(address, capfd):
    with pytest.raises(Unavailable, match=f"{address}: no video comes from there") as error:
        build("video_stream", address=address, timeout_s=2.0)
    assert "\n" not in str(error.value)
    assert capfd.readouterr().err == ""


def test_frames_too_small_are_named(server):
    address, folder = server
    write_video(folder / "s.avi", "FFV1", [np.zeros((8, 32), np.uint8)] * 3)
    with pytest.raises(PipelineError, match=r"s.avi: frames are 32×8 px, smaller than the 11×11"):
        build("video_stream", address=f"{address}/s.avi")


def test_lossless_files_are_not_marked_compressed(tmp_path):
    pictures = np.random.default_rng(1).integers(0, 65536, (3, 48, 64)).astype(np.uint16)
    path = write_video(tmp_path / "grey16.mkv", "FFV1", pictures, depth=cv2.CV_16U)
    frames = list(build("video", path=path).frames())
    assert {frame.info.flags for frame in frames} == {()}
    assert_array_equal([frame.pixels_HW for frame in frames], pictures)


def test_grey_of_what_cameras_give():
    rng = np.random.default_rng(3)
    y16 = rng.integers(0, 65536, (12, 16)).astype(np.uint16)
    assert grey(y16) is y16  # all 16 bits
    yuyv = rng.integers(0, 256, (12, 16, 2)).astype(np.uint8)
    assert_array_equal(grey(yuyv), yuyv[..., 0])
    one = np.repeat(rng.integers(0, 256, (12, 16, 1)).astype(np.uint8), 3, axis=2)
    assert_array_equal(grey(one), one[..., 0])


CAMERAS = sorted(Path("/dev").glob("video[0-9]*"))


@pytest.mark.skipif(not CAMERAS, reason="no V4L2 camera at this machine")
def test_a_camera_of_the_system_gives_frames():
    source = build("video_stream", address=str(CAMERAS[0]))
    frames = source.frames()
    found = [next(frames) for _ in range(3)]
    source.close()
    assert [frame.info.seq for frame in found] == [0, 1, 2]
