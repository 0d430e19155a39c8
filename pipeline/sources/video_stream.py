"""Frames of a live video: a stream by its address, or a camera of the system (V4L2).

A camera that gives 16-bit grey (Y16) is taken at that; what is coded with losses, by the sender or
in the camera, carries the flag "compressed", as files do.
"""

import math
import os
import time
from collections.abc import Callable, Iterator
from threading import Event
from typing import Any, Self

import cv2
from pydantic import Field

from pipeline.component import Settings, Source, configured_sensor
from pipeline.errors import PipelineError, Unavailable
from pipeline.messages import Dropped, Frame, FrameInfo
from pipeline.numbering import RESTARTED
from pipeline.physics.groups import SIZE_PX
from pipeline.sources.video import LOSSLESS, codec, read_grey, video_sensor

Y16 = cv2.VideoWriter.fourcc(*"Y16 ")
RAW = LOSSLESS | {"YUYV", "UYVY", "NV12", "YU12", "BGR3", "RGB3"}
RETRY_S = 0.5


class VideoStream(Source):
    """Stamped with the time of day when they arrive, as video tells no other.

    When the stream breaks off, one frame is lost with the reason and it is opened again until it
    is back; the first frame then is flagged "restarted".
    """

    class Config(Settings):
        """Where it comes from, and what to ask a camera for."""

        address: str = Field(
            min_length=1, description="rtsp://…, http://…, udp://…, or a camera: /dev/video0"
        )
        width: int | None = Field(None, ge=SIZE_PX, le=16384, description="of a camera")
        height: int | None = Field(None, ge=SIZE_PX, le=16384)
        frame_rate_hz: float | None = Field(None, gt=0.0)
        timeout_s: float = Field(
            5.0, gt=0.0, le=600.0, description="of silence; of a camera, whole s"
        )
        reconnect: bool = Field(True, description="false: the end of the stream ends the run")

    def __init__(
        self, config: Config, sensor: dict[str, Any], utc_ns: Callable[[], int] = time.time_ns
    ) -> None:
        self._config, self._utc_ns = config, utc_ns
        self._closed = Event()
        self._is_camera = config.address.startswith("/dev/")
        capture = self._open()
        first_HW = None if capture is None else read_grey(capture)
        if capture is None or first_HW is None:
            raise Unavailable(
                f"{config.address}: no video comes from there; {self._remedy(capture is not None)}"
            )
        self._flags = () if codec(capture) in RAW else ("compressed",)
        capture.release()
        height, width = first_HW.shape
        if min(height, width) < SIZE_PX:
            raise PipelineError(
                f"{config.address}: frames are {width}×{height} px, smaller than the "
                f"{SIZE_PX}×{SIZE_PX} window targets are unmixed in"
            )
        if self._is_camera and (config.width or width, config.height or height) != (width, height):
            raise PipelineError(
                f"{config.address}: the camera gives {width}×{height} px; "
                "set source.width and source.height to that, or to another size it has"
            )
        self.sensor = configured_sensor(video_sensor(first_HW), sensor, config.address)
        self.shape = (height, width)

    @classmethod
    def build(cls, config: Config, sensor: dict[str, Any]) -> Self:
        """Open the stream and look at a frame; raises Unavailable if none comes."""
        return cls(config, sensor)

    def _remedy(self, opened: bool) -> str:
        """What to do when no frame has come."""
        if not self._is_camera:
            return "check the address and the sender"
        try:
            os.close(os.open(self._config.address, os.O_RDWR | os.O_NONBLOCK))
        except OSError as error:
            return f"it cannot be opened ({error.strerror}), check the name and who may use it"
        if opened:
            return f"no frame in {self._config.timeout_s:g} s, plug the camera in again"
        return "it is no camera, or another program has it, end that one"

    def _open(self) -> cv2.VideoCapture | None:
        address, timeout_ms = self._config.address, round(1000 * self._config.timeout_s)
        if not self._is_camera:
            limits = [cv2.CAP_PROP_OPEN_TIMEOUT_MSEC, timeout_ms]
            limits += [cv2.CAP_PROP_READ_TIMEOUT_MSEC, timeout_ms]
            capture = cv2.VideoCapture(address, cv2.CAP_FFMPEG, limits)
        else:
            os.environ["OPENCV_VIDEOIO_V4L_SELECT_TIMEOUT"] = str(math.ceil(timeout_ms / 1000))
            capture = cv2.VideoCapture(address, cv2.CAP_V4L2)
            self._ask(capture)
        return capture if capture.isOpened() else None

    def _ask(self, camera: cv2.VideoCapture) -> None:
        """Set up a camera: 16-bit grey where the driver has it, else as OpenCV converts it."""
        config = self._config
        wanted = {
            cv2.CAP_PROP_FOURCC: Y16,
            cv2.CAP_PROP_FRAME_WIDTH: config.width,
            cv2.CAP_PROP_FRAME_HEIGHT: config.height,
            cv2.CAP_PROP_FPS: config.frame_rate_hz,
        }
        for name, value in wanted.items():
            if value is not None:
                camera.set(name, value)
        if int(camera.get(cv2.CAP_PROP_FOURCC)) == Y16:
            camera.set(cv2.CAP_PROP_CONVERT_RGB, 0)

    def frames(self) -> Iterator[Frame | Dropped]:
        """What comes, without end unless `reconnect` is off."""
        seq, flags = 0, self._flags
        while not self._closed.is_set():
            capture = self._open()
            before = seq
            while capture is not None and (pixels_HW := read_grey(capture)) is not None:
                if self._closed.is_set():
                    break
                if pixels_HW.shape != self.shape:
                    reason = f"{pixels_HW.shape[1]}×{pixels_HW.shape[0]}, not as it began"
                    yield Dropped(seq, "source", f"video: {reason}")
                else:
                    yield Frame(self._info(seq, flags), pixels_HW)
                    flags = self._flags
                seq += 1
            if capture is not None:
                capture.release()
            if not self._config.reconnect:
                return
            if seq > before and not self._closed.is_set():
                yield Dropped(seq, "source", "video: the stream broke off; waiting for it")
                seq, flags = seq + 1, (*self._flags, RESTARTED)
            self._closed.wait(RETRY_S)

    def _info(self, seq: int, flags: tuple[str, ...]) -> FrameInfo:
        return FrameInfo(seq, self.sensor.id, self._utc_ns(), "utc", self.shape, flags)

    def close(self) -> None:
        """End `frames` at its next frame, or when the stream's silence does."""
        self._closed.set()
