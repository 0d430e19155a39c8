"""Frames that any program pushes over ZeroMQ, as messages `irst.frame/1` (docs/sources.md)."""

import re
from collections.abc import Iterator
from threading import Event
from typing import Any, Literal, Self

import numpy as np
from pydantic import Field, field_validator

from pipeline.component import FedSettings, FedSource, configured_sensor
from pipeline.messages import BadMessage, Dropped, Frame, FrameInfo, Malformed, SentFrame
from pipeline.numbering import Numbering, Position, Step
from pipeline.pacing import Allowance
from pipeline.physics.groups import SIZE_PX
from pipeline.physics.sensor import Sensor

LOCAL = r"ipc://[^@\0][^\0]*|tcp://(127(\.[0-9]{1,3}){3}|localhost):[0-9]{1,5}"
WAIT_S = 0.1
KEPT_PER_S = 5
"""Messages that are no frames, of which the bytes are kept; whoever sends more has to wait."""
SLOW_S = 0.002


class ZmqFeed(FedSource):
    """Listens at an endpoint on this machine; senders connect and push.

    Numbers missing in the sender's sequence become lost frames, and so does a message that is no
    frame of this feed, with its reason. A flood of such messages is held back where it comes from,
    at the socket, which takes in turn from each sender.
    """

    class Config(FedSettings):
        """Where to listen, and what the frames are."""

        width: int = Field(ge=SIZE_PX, le=16384)
        height: int = Field(ge=SIZE_PX, le=16384)
        dtype: Literal["uint8", "uint16"] = "uint16"

        @field_validator("endpoint")
        @classmethod
        def _local(cls, endpoint: str) -> str:
            if not re.fullmatch(LOCAL, endpoint):
                raise ValueError(
                    "must be ipc://PATH or tcp://127.0.0.1:PORT: strangers cannot send frames"
                )
            return endpoint

    def __init__(self, config: Config, sensor: dict[str, Any]) -> None:
        own = Sensor(id="feed", full_scale=int(np.iinfo(config.dtype).max))
        self.sensor = configured_sensor(own, sensor, "source zmq_feed")
        self.shape = (config.height, config.width)
        self._config = config
        self._closed = Event()
        self._numbering = Numbering()
        self._kept = Allowance(KEPT_PER_S)

    @classmethod
    def build(cls, config: Config, sensor: dict[str, Any]) -> Self:
        """Make the source; it listens when its frames are asked for."""
        return cls(config, sensor)

    def resume(self, position: Position) -> bool:
        """What the sender has sent since, and nobody has received, is missing in its numbers."""
        self._numbering.resume(position)
        return True

    def frames(self) -> Iterator[Frame | Dropped]:
        """What comes, without end; raises PipelineError if nobody can listen at the endpoint."""
        inbox = self.listen(self._config.endpoint)
        try:
            while not self._closed.is_set():
                sent = inbox.receive(WAIT_S)
                if sent is not None:
                    yield from self._numbered(sent)
        finally:
            inbox.close()

    def _numbered(self, sent: SentFrame | BadMessage) -> Iterator[Frame | Dropped]:
        """A frame as one of ours, after the losses before it."""
        if sent.seq is None:
            step = Step(self._numbering.unnumbered(), range(0), restarted=False)
        else:
            step = self._numbering.take(sent.seq)
        self.position = self._numbering.position
        for seq in step.lost:
            yield Dropped(seq, "source", "feed: missing in the sender's numbers")
        if isinstance(sent, BadMessage):
            yield self._malformed(step.seq, sent.reason, sent.parts)
            return
        if misfit := self._misfit(sent):
            yield self._malformed(step.seq, misfit, sent.parts)
            return
        info = FrameInfo(
            seq=step.seq,
            sensor_id=self.sensor.id,
            t_exposure_ns=sent.t_exposure_ns,
            clock=sent.clock,
            shape=self.shape,
            flags=(*sent.flags, *self._numbering.flags()),
            pose=sent.pose,
        )
        yield Frame(info, sent.pixels_HW)

    def _malformed(self, seq: int, fault: str, parts: tuple[Any, ...]) -> Malformed:
        """A message that is no frame here as a loss, with its bytes unless many came of late."""
        kept = self._kept.take()
        if not kept:
            self._closed.wait(SLOW_S)
        return Malformed(seq, "source", f"feed: {fault}", parts if kept else ())

    def _misfit(self, sent: SentFrame) -> str:
        """What a frame is instead of one of this feed; empty if it is one."""
        found, wanted = sent.pixels_HW.dtype.name, self._config.dtype
        if sent.pixels_HW.shape == self.shape and found == wanted:
            return ""
        height, width = sent.pixels_HW.shape
        return f"{width}×{height} {found}, not {self.shape[1]}×{self.shape[0]} {wanted}"

    def close(self) -> None:
        """End `frames` within a tenth of a second."""
        self._closed.set()
