"""Frames from a video file: whatever OpenCV decodes, in grey.

Compressed, gain-controlled video is good for detection over real clutter, soak and demo; not for
sub-pixel or radiometric claims. So its frames carry the flag "compressed"; those of a lossless
codec do not.
"""

import math
import os
from collections.abc import Iterator
from pathlib import Path
from threading import Event
from typing import Any, Self

import cv2
import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from pipeline.component import Settings, Source, configured_sensor
from pipeline.errors import PipelineError
from pipeline.formats.pictures import SUFFIXES
from pipeline.messages import Frame, FrameInfo
from pipeline.pacing import Pace
from pipeline.physics.groups import SIZE_PX
from pipeline.physics.sensor import Sensor

os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")  # errors are told in our own words
cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)

SIGMA_PX = 0.75
"""Median of Gaussian fits, integrated over pixels, to the airliner of tests/data in 301 frames of
real thermal video: 0.76 px (0.62–0.89 in 85 % of them). Nearer targets are larger than points."""

READ_NOISE = 1.5
"""Grey levels rms about the local mean of the same clip's sky: 1.6 over cloud. A clear sky shows
0.4, but there the compression has wiped out what the sensor had."""

SIGMA_ERROR = 0.15
"""Of those fits, relative to their median: half the range that holds 85 % of them."""

DEFAULT_FRAME_RATE_HZ = 30.0
SHORTFALL = 0.01
"""Containers may state the number of frames from duration × rate: off by one, or by 1 %."""

COPY_OR_CONVERT = "copy it again if it is cut short or damaged, or else convert it, e.g. to H.264"

LOSSLESS = {"FFV1", "HFYU", "FFVH", "Y800", "GREY", "Y16 ", "Y1\x00\x10", "ULY0", "ULRG"}
"""Four-letter codes of codecs that keep every count, and of none."""

_GREY_16 = int.from_bytes(b"Y1\x00\x10", "little")  # FFmpeg's tag of 16-bit little-endian grey


def video_sensor(frame_HW: NDArray[Any]) -> Sensor:
    """What is assumed of a camera that only its video is known of."""
    return Sensor(
        id="video",
        sigma_px=SIGMA_PX,
        full_scale=int(np.iinfo(frame_HW.dtype).max),
        read_noise=READ_NOISE,
        sigma_error=SIGMA_ERROR,
    )


class Video(Source):
    """Plays a video file; `length` is what the file says of itself, None when it loops.

    Colour becomes 8-bit grey; 16-bit grey is kept. Timestamps are the frame number over the frame
    rate (30/s where the file states none).
    """

    class Config(Settings):
        """Which file, how fast, how often."""

        path: Path
        rate_hz: float | None = Field(
            None, gt=0.0, description="frames/s; null: as fast as they are taken"
        )
        loop: bool = Field(False, description="begin again at the end, without end")

    def __init__(self, config: Config, sensor: dict[str, Any]) -> None:
        self._config = config
        self._closed = Event()
        capture = self._open()
        first_HW = read_grey(capture)
        self._flags = () if codec(capture) in LOSSLESS else ("compressed",)
        stated = capture.get(cv2.CAP_PROP_FRAME_COUNT)
        rate_hz = capture.get(cv2.CAP_PROP_FPS)
        capture.release()
        if first_HW is None:
            raise PipelineError(f"{config.path}: no frame of it can be decoded; {COPY_OR_CONVERT}")
        height, width = first_HW.shape
        if min(height, width) < SIZE_PX:
            raise PipelineError(
                f"{config.path}: frames are {width}×{height} px, smaller than the "
                f"{SIZE_PX}×{SIZE_PX} window targets are unmixed in; use a larger video"
            )
        self.sensor = configured_sensor(video_sensor(first_HW), sensor, str(config.path))
        self.shape = (height, width)
        self._stated = int(stated) if stated > 0 else None
        self.length = None if config.loop else self._stated
        known = math.isfinite(rate_hz) and rate_hz > 0.0
        self._frame_rate_hz = rate_hz if known else DEFAULT_FRAME_RATE_HZ

    @classmethod
    def build(cls, config: Config, sensor: dict[str, Any]) -> Self:
        """Open the file; raises PipelineError if it is missing, no video, or too small."""
        return cls(config, sensor)

    def frames(self) -> Iterator[Frame]:
        """The frames in order; raises PipelineError if decoding ends before the stated end."""
        pace = Pace(self._config.rate_hz, self._closed)
        seq = 0
        while True:
            for pixels_HW in self._decode():
                pace.wait(seq)
                if self._closed.is_set():
                    return
                yield Frame(self._info(seq), pixels_HW)
                seq += 1
            if not self._config.loop:
                return

    def _decode(self) -> Iterator[NDArray[Any]]:
        """All frames of the file, once."""
        capture = self._open()
        number = 0
        try:
            while (pixels_HW := read_grey(capture)) is not None:
                yield pixels_HW
                number += 1
        finally:
            capture.release()
        missing = (self._stated or 0) - number
        if missing > max(1.0, SHORTFALL * number):
            raise PipelineError(
                f"{self._config.path}: decoding ended after {number} of {self._stated} frames; "
                "the file is cut short or damaged, copy or convert it again"
            )

    def _open(self) -> cv2.VideoCapture:
        path = self._config.path
        if not path.is_file():
            raise PipelineError(f"{path}: no such file; check the path")
        if path.suffix.lower() in SUFFIXES:
            raise PipelineError(
                f"{path}: a picture; `pipeline convert` makes a recording of it (of JPEG and "
                "BMP, saved as PNG)"
            )
        capture = cv2.VideoCapture(str(path))
        if not capture.isOpened():
            raise PipelineError(f"{path}: not a video OpenCV can read; {COPY_OR_CONVERT}")
        if int(capture.get(cv2.CAP_PROP_CODEC_PIXEL_FORMAT)) == _GREY_16:
            capture.set(cv2.CAP_PROP_CONVERT_RGB, 0)
        return capture

    def _info(self, seq: int) -> FrameInfo:
        return FrameInfo(
            seq=seq,
            sensor_id=self.sensor.id,
            t_exposure_ns=round(seq * 1e9 / self._frame_rate_hz),
            clock="video",
            shape=self.shape,
            flags=self._flags,
        )

    def close(self) -> None:
        """End `frames` at its next frame."""
        self._closed.set()


def codec(capture: cv2.VideoCapture) -> str:
    """The four letters that stand for how the video is coded, as capitals."""
    letters = int(capture.get(cv2.CAP_PROP_FOURCC)).to_bytes(4, "little")
    return letters.decode("latin-1").upper()


def read_grey(capture: cv2.VideoCapture) -> NDArray[Any] | None:
    """The next frame in grey (H, W), or None at the end."""
    read, pixels = capture.read()
    return grey(pixels) if read else None


def grey(pixels: NDArray[Any]) -> NDArray[Any]:
    """Grey (H, W) of what OpenCV gives: grey already, raw YUYV (H, W, 2), or BGR (H, W, 3)."""
    if pixels.ndim == 2:
        return pixels
    if pixels.shape[2] == 2:
        return np.ascontiguousarray(pixels[..., 0])
    return np.asarray(cv2.cvtColor(pixels, cv2.COLOR_BGR2GRAY))
