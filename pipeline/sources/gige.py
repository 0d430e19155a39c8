"""Frames of a GigE Vision camera, through Aravis in a helper process of the system's Python.

PyGObject is made for the system's Python only, so `gige_helper.py` runs there and hands the frames
over through a pipe. Whatever ends it, the camera's vanishing or its own death, it is started again
until the camera is back.
"""

import io
import json
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path
from threading import Event
from typing import IO, Any, Self

from pydantic import Field

from pipeline import gige_helper
from pipeline.component import Settings, Source, configured_sensor
from pipeline.errors import PipelineError, Unavailable
from pipeline.imaging.pixel_formats import BITS, unpack
from pipeline.messages import Dropped, Frame, FrameInfo
from pipeline.numbering import Numbering
from pipeline.physics.groups import SIZE_PX
from pipeline.physics.sensor import Sensor

LAST_NUMBER = 65535
"""GigE Vision numbers frames with 16 bits, and after the last goes on with 1."""

LENGTHS = struct.Struct("<II")
PIPE_BYTES = 1 << 20
PROBE_S = 30.0
RETRY_S = 0.5


class Gige(Source):
    """Frames as the camera stamps them: the device's clock, plus half of the exposure.

    Numbers missing in the camera's sequence and frames with packets missing become lost frames;
    when the camera vanishes one more does, with the reason, and the first frame after is flagged
    "restarted".
    """

    class Config(Settings):
        """Which camera, and what to set there; what is not given stays as the camera has it."""

        camera: str | None = Field(None, description="address, serial or id; null: the first found")
        pixel_format: str | None = Field(None, description="Mono8 … Mono16, packed or not")
        width: int | None = Field(None, ge=SIZE_PX, le=16384)
        height: int | None = Field(None, ge=SIZE_PX, le=16384)
        x: int = Field(0, ge=0, description="left column of the region, with width or height")
        y: int = Field(0, ge=0)
        frame_rate_hz: float | None = Field(None, gt=0.0)
        exposure_us: float | None = Field(None, gt=0.0)
        gain: float | None = Field(None, description="as the camera counts it, mostly dB")
        packet_size: int | None = Field(None, ge=576, le=16384, description="null: the largest")
        resend: bool = Field(True, description="ask for packets that were lost")
        python: Path = Field(Path("/usr/bin/python3"), description="which has PyGObject and Aravis")

    def __init__(self, config: Config, sensor: dict[str, Any]) -> None:
        self._config = config
        self._closed = Event()
        self._helper: subprocess.Popen[bytes] | None = None
        found = self._probe()
        self._format = self._streams = found["pixel_format"]
        self._exposure_ns = found["exposure_us"] * 1e3
        if self._format not in BITS:
            raise PipelineError(
                f"{self._name}: pixel format {self._format}; set source.pixel_format to one of "
                f"{', '.join(BITS)}"
            )
        own = Sensor(id="gige", full_scale=(1 << BITS[self._format]) - 1)
        self.sensor = configured_sensor(own, sensor, self._name)
        self.shape = (found["height"], found["width"])

    @classmethod
    def build(cls, config: Config, sensor: dict[str, Any]) -> Self:
        """Look for the camera and set it up; raises Unavailable, or PipelineError if it refuses."""
        return cls(config, sensor)

    @property
    def _name(self) -> str:
        return f"camera {self._config.camera or '(first found)'}"

    def _start(self, *, probe: bool) -> subprocess.Popen[bytes]:
        config = self._config
        options = {
            **config.model_dump(include={"camera", "pixel_format", "width", "height", "x", "y"}),
            **config.model_dump(include={"gain", "packet_size", "resend"}),
            "frame_rate": config.frame_rate_hz,
            "exposure_time": config.exposure_us,
            "probe": probe,
        }
        words = [str(config.python), gige_helper.__file__, json.dumps(options)]
        try:
            return subprocess.Popen(
                words,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                pipesize=PIPE_BYTES,
            )
        except OSError as error:
            raise PipelineError(
                f"{config.python}: cannot be run ({error.strerror}); set source.python to the "
                "Python that has PyGObject"
            ) from error

    def _probe(self) -> dict[str, Any]:
        """What the camera says of itself."""
        helper = self._start(probe=True)
        try:
            out, _ = helper.communicate(timeout=PROBE_S)
        except subprocess.TimeoutExpired:
            helper.kill()
            helper.communicate()
            raise Unavailable(f"{self._name}: no answer within {PROBE_S:g} s") from None
        if len(out) < LENGTHS.size:
            raise Unavailable(f"{self._name}: the helper ended ({helper.returncode}) without word")
        event, _ = next(_events(io.BytesIO(out)))
        if event["event"] == "failed":
            kind = PipelineError if event.get("here", True) else Unavailable
            raise kind(f"{self._name}: {event['reason']}")
        return event

    def frames(self) -> Iterator[Frame | Dropped]:
        """What the camera sends, without end."""
        numbering = Numbering(last=LAST_NUMBER)
        away = False
        while not self._closed.is_set():
            reason = "the helper process ended"
            with self._start(probe=False) as self._helper:
                try:
                    for event, payload in _events(self._helper.stdout or io.BytesIO()):
                        if self._closed.is_set():
                            return
                        if event["event"] in ("frame", "lost"):
                            yield from self._numbered(event, payload, numbering)
                            away = False
                        elif event["event"] == "camera":
                            self._streams = event["pixel_format"]
                        else:
                            reason = event["reason"]
                finally:
                    self._helper.kill()
            if self._closed.wait(RETRY_S if away else 0.0):
                return
            if not away:
                yield Dropped(numbering.unnumbered(), "source", f"gige: {reason}; waiting for it")
                numbering.begin_anew()
                away = True

    def _numbered(
        self, event: dict[str, Any], payload: bytes, numbering: Numbering
    ) -> Iterator[Frame | Dropped]:
        """A frame of the camera as one of ours, after the losses before it."""
        step = numbering.take(event["number"])
        for seq in step.lost:
            yield Dropped(seq, "source", "gige: missing in the camera's numbers")
        reason = event.get("reason") or self._misfit(event)
        if reason:
            yield Dropped(step.seq, "source", f"gige: {reason}")
            return
        try:
            pixels_HW = unpack(payload, self._format, self.shape)
        except ValueError as error:
            yield Dropped(step.seq, "source", f"gige: {error}")
            return
        info = FrameInfo(
            seq=step.seq,
            sensor_id=self.sensor.id,
            t_exposure_ns=round(event["t_ns"] + 0.5 * self._exposure_ns),
            clock=event["clock"],
            shape=self.shape,
            flags=numbering.flags(),
        )
        yield Frame(info, pixels_HW)

    def _misfit(self, event: dict[str, Any]) -> str:
        """What the frame is instead of what the camera gave at first; empty if it is that."""
        found = (event["height"], event["width"])
        if found == self.shape and self._streams == self._format:
            return ""
        wanted = f"{self.shape[1]}×{self.shape[0]} {self._format}"
        return f"{found[1]}×{found[0]} {self._streams}, not {wanted} as it began"

    def close(self) -> None:
        """End the helper process, and with it `frames`."""
        self._closed.set()
        if self._helper is not None:
            self._helper.kill()
            self._helper.wait()


def _events(out: IO[bytes]) -> Iterator[tuple[dict[str, Any], bytes]]:
    """What the helper writes, until it ends."""
    while len(lengths := out.read(LENGTHS.size)) == LENGTHS.size:
        length, size = LENGTHS.unpack(lengths)
        event, payload = out.read(length), out.read(size)
        if len(event) < length or len(payload) < size:
            return
        yield json.loads(event), payload
