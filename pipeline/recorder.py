"""`pipeline record`: frames and targets of a live run as recordings, beside the flow.

The recorder is a process of its own that subscribes: if it is slow it misses frames, and says how
many; the run never waits. A recording NAME.zarr has its target messages, a line of JSON each, in
NAME.targets.jsonl; a target message belongs to the frame of the same `t_exposure_ns`.
"""

import contextlib
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.client import Silence, Subscriber
from pipeline.errors import RunError
from pipeline.formats import recording_folder
from pipeline.formats.live_recording import LiveRecordingWriter
from pipeline.formats.recording_folder import TargetLines
from pipeline.messages import Frame
from pipeline.physics.sensor import Sensor
from pipeline.runtime.surroundings import try_writing
from pipeline.transport.codec import CodecError
from pipeline.transport.frames import FrameSubscriber
from pipeline.transport.security import ClientKeys

NICENESS = 10
WAIT_S = 0.05
LAST_FRAMES_S = 0.5
REST_S = 1.0
log = logging.getLogger(__name__)


class Recorder:
    """Writes what it is given; a new recording begins at `max_bytes` of pixels, or a new sensor.

    And where time jumps back, but once a second at most; in between, and where it stands still, a
    frame gets a time of 1 ns after the last, as times in a recording advance. Of recordings of the
    sensor `keep` stay in the folder, and those that others are writing. Raises RunError if what it
    is writing is moved or removed.
    """

    def __init__(
        self,
        folder: Path,
        max_bytes: int,
        keep: int | None,
        clock_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._folder, self._max_bytes, self._keep, self._clock_s = folder, max_bytes, keep, clock_s
        self._writer: LiveRecordingWriter | None = None
        self._sensor: Sensor | None = None
        self._shape: tuple[int, int] | None = None
        self._lines: TargetLines | None = None
        self._open = contextlib.ExitStack()
        self._newest_ns = 0  # of the recording
        self._began_s = 0.0
        self._next_seq: int | None = None
        self.frames = self.messages = self.missed = self.malformed = self.retimed = 0

    def add_frame(self, frame: Frame, sensor: Sensor) -> None:
        """Write a frame, in a new recording if it does not fit into this one."""
        seq, t_ns = frame.info.seq, frame.info.t_exposure_ns
        if self._next_seq is not None:
            self.missed += max(0, seq - self._next_seq)
        self._next_seq = seq + 1
        writer = self._writer
        fits = (
            writer is not None
            and (self._sensor, self._shape) == (sensor, frame.info.shape)
            and writer.pixel_bytes < self._max_bytes
            and (t_ns >= self._newest_ns or self._clock_s() - self._began_s < REST_S)
        )
        if writer is None or not fits:
            writer = self._rotate(frame, sensor)
        if self._lines is not None:
            self._lines.refuse_lost()
        written_ns = writer.following(t_ns)
        writer.append(frame.pixels_HW, written_ns)
        self._newest_ns = max(self._newest_ns, t_ns)
        self.frames += 1
        self.retimed += written_ns != t_ns
        if self.retimed == 1 and written_ns != t_ns:
            log.warning(
                "frame %d: its exposure time, %d ns, does not advance, or is 146 years away; "
                "recorded as %d ns",
                seq, t_ns, written_ns,
            )  # fmt: skip

    def add_message(self, message: dict[str, Any]) -> None:
        """Write a target message to the recording of the day; before the first frame, nowhere."""
        if self._lines is not None and message["schema"] == "irst.targets/1":
            self._lines.write(message)
            self.messages += 1

    def _rotate(self, frame: Frame, sensor: Sensor) -> LiveRecordingWriter:
        self.close()
        self._lines = recording_folder.begin(self._folder, sensor.id)
        self._open.callback(self._lines.close)
        self._writer = LiveRecordingWriter(self._lines.recording, frame.info.shape, sensor)
        self._open.callback(self._writer.close)
        self._sensor, self._shape = sensor, frame.info.shape
        self._newest_ns, self._began_s = frame.info.t_exposure_ns, self._clock_s()
        if self._keep is not None:
            recording_folder.make_room(self._folder, sensor.id, self._keep)
        return self._writer

    def close(self) -> None:
        """Finish the recording that is being written; raises RunError if it cannot be read."""
        self._writer = self._lines = None
        self._open.close()


def record(
    targets: str,
    frames: str,
    folder: Path,
    max_bytes: int,
    keep: int | None,
    keys: Path | None,
    stopped: Callable[[], bool],
) -> str:
    """Record until the run ends or `stopped`; returns what was done as a line.

    Raises PipelineError if something else is published at `frames`, or the folder cannot be
    written; RunError if no frame came, or writing failed later.
    """
    if keys is not None:
        ClientKeys.load(keys)  # a mistake is said before anything is waited for
    try_writing(folder, "record")
    os.nice(NICENESS)
    recorder = Recorder(folder, max_bytes, keep)
    try:
        with contextlib.ExitStack() as stack:
            frame_socket = FrameSubscriber(frames)
            stack.callback(frame_socket.close)
            stack.callback(recorder.close)
            if _connected(frame_socket, frames, stopped):
                # Only now, so that a run that waits for a subscriber does not begin too early.
                subscriber = Subscriber(targets, keys)
                stack.callback(subscriber.close)
                _follow(recorder, frame_socket, subscriber, stopped)
    except OSError as error:
        why = f"{folder}: cannot be written ({error.strerror})"
        raise RunError(f"{why}; {recorder.frames} frames were written before") from error
    except RunError as error:
        raise RunError(f"{error}; {recorder.frames} frames were written before") from error
    if not recorder.frames:
        raise RunError(f"no frame came from {frames}; is it the run's publish.frames?")
    retimed = f", {recorder.retimed} given another time" if recorder.retimed else ""
    return (
        f"recorded {recorder.frames} frames and {recorder.messages} target messages in {folder}; "
        f"{recorder.missed} were not seen (shed by the run, or missed here), "
        f"{recorder.malformed} malformed{retimed}"
    )


def _connected(frames: FrameSubscriber, endpoint: str, stopped: Callable[[], bool]) -> bool:
    """Wait for the frames; False if told to end before."""
    silence = Silence(endpoint, "is this its publish.frames")
    while not stopped():
        if frames.connected(WAIT_S):
            return True
        silence.heard(False)
    return False


def _follow(
    recorder: Recorder,
    frames: FrameSubscriber,
    subscriber: Subscriber,
    stopped: Callable[[], bool],
) -> None:
    until = None  # after the end of the stream, frames on their way still come
    while not stopped() and (until is None or time.monotonic() < until):
        try:
            received = frames.receive(WAIT_S)
        except CodecError:
            recorder.malformed += 1
            continue
        if received is not None:
            recorder.add_frame(*received)
        while (message := subscriber.receive(0.0)) is not None:
            recorder.add_message(message)
            if message["schema"] == "irst.eos/1":
                until = time.monotonic() + LAST_FRAMES_S
