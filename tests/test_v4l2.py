"""Cameras of the system: OpenCV's own V4L2 code against a camera in user space, preloaded.

No kernel module is needed, and none of OpenCV or of the source is replaced: `fake_v4l2.c` answers
the calls to the kernel that are meant for /dev/video-fake. It is no proof that a real driver does.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(
    shutil.which("cc") is None or not Path("/usr/include/linux/videodev2.h").exists(),
    reason="no C compiler with the kernel's headers: apt-get install gcc libc6-dev",
)
PROGRAM = """
import json, sys, time
from itertools import islice
from pipeline.component import component
from pipeline.errors import PipelineError
from pipeline.messages import Frame
kind = component("source", "video_stream")
config = kind.Config(address="/dev/video-fake", timeout_s=1, **json.loads(sys.argv[1]))
began_s = time.monotonic()
try:
    source = kind.build(config, {})
except PipelineError as error:
    print(json.dumps([str(error), time.monotonic() - began_s]))
    sys.exit()
for item in islice(source.frames(), int(sys.argv[2])):
    if isinstance(item, Frame):
        pixels = item.pixels_HW
        print(json.dumps([item.info.seq, item.info.flags, str(pixels.dtype), pixels.tolist()]))
    else:
        print(json.dumps([item.seq, item.reason]))
"""


@pytest.fixture(scope="module")
def fake(tmp_path_factory) -> Path:
    """The camera, compiled."""
    library = tmp_path_factory.mktemp("v4l2") / "fake.so"
    program = Path(__file__).with_name("fake_v4l2.c")
    subprocess.run(["cc", "-shared", "-fPIC", "-o", str(library), str(program)], check=True)
    return library


def seen(fake, camera, frames=3, **config):
    """What comes of a camera: its frames and losses, or why there are none, and the seconds."""
    words = [sys.executable, "-c", PROGRAM, json.dumps(config), str(frames)]
    environment = {**os.environ, "LD_PRELOAD": str(fake), "FAKE_V4L2": camera}
    result = subprocess.run(
        words, env=environment, capture_output=True, text=True, timeout=60, check=True
    )
    assert result.stderr == ""
    return [json.loads(line) for line in result.stdout.splitlines()]


@pytest.mark.parametrize("camera", ["y16", "both"])
def test_all_sixteen_bits_of_y16_come_through(fake, camera):
    found = seen(fake, camera, width=64, height=48, frame_rate_hz=200)
    assert [frame[:3] for frame in found] == [[seq, [], "uint16"] for seq in range(3)]
    begin = found[0][3][0][0]
    for number, (*_, rows) in enumerate(found):
        counts = [count for row in rows for count in row]
        assert counts == [(begin + 1021 * number + pixel) % 65536 for pixel in range(64 * 48)]
    assert begin % 1021 == 0 and max(map(max, found[-1][3])) > 255


def test_a_camera_without_y16_gives_eight_bits(fake):
    found = seen(fake, "yuyv")
    assert [frame[:3] for frame in found] == [[seq, [], "uint8"] for seq in range(3)]
    assert found[0][3][0][:100] == sorted(found[0][3][0][:100])
    assert (len(found[0][3]), len(found[0][3][0])) == (48, 64)


def test_a_camera_that_is_unplugged_is_a_gap_and_its_return_is_seen(fake):
    found = seen(fake, "unplugged", frames=8)
    gap = next(number for number, item in enumerate(found) if isinstance(item[1], str))
    assert found[gap] == [gap, "video: the stream broke off; waiting for it"]
    frames = found[:gap] + found[gap + 1 :]
    flags = [frame[1] for frame in frames]
    assert gap > 0 and flags == [[]] * gap + [["restarted"]] + [[]] * (7 - gap - 1)
    assert [item[0] for item in found] == list(range(8))


@pytest.mark.parametrize(
    ("camera", "config", "said"),
    [
        ("busy", {}, "no video comes from there; it is no camera, or another program has it, "),
        ("silent", {}, "no video comes from there; no frame in 1 s, "),
        ("y16", {"width": 640, "height": 512}, "the camera gives 64×48 px; set source.width "),
        ("y16", {"width": 32}, "the camera gives 64×48 px; set source.width "),
    ],
)
def test_what_is_wrong_with_a_camera_is_one_line(fake, camera, config, said):
    ((line, seconds),) = seen(fake, camera, **config)
    assert seconds < 6.0, "timeout_s is 1, OpenCV's own 10"
    assert line.startswith(f"/dev/video-fake: {said}") and "\n" not in line
