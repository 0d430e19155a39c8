"""`pipeline record`: frames and targets of a live run as recordings, beside the flow.

The recorder is a process of its own that subscribes: if it is slow it misses frames, and says how
many; the run never waits. A recording NAME.zarr has its target messages, a line of JSON each, in
NAME.targets.jsonl; a target message belongs to the frame of the same `t_exposure_ns`.
"""

import contextlib
import json
import os
import shutil
import time
from pathlib import Path
from typing import IO, Any

from pipeline.client import Subscriber
from pipeline.errors import RunError
from pipeline.formats.live_recording import LiveRecordingWriter
from pipeline.messages import Frame
from pipeline.physics.sensor import Sensor
from pipeline.transport.codec import CodecError
from pipeline.transport.frames import FrameSubscriber

NICENESS = 10
WAIT_S = 0.05
LAST_FRAMES_S = 0.5


class Recorder:
    """Writes what it is given; a new recording begins at `max_bytes` of pixels, or a new sensor."""

    def __init__(self, folder: Path, max_bytes: int, keep: int | None) -> None:
        self._folder, self._max_bytes, self._keep = folder, max_bytes, keep
        self._writer: LiveRecordingWriter | None = None
        self._sensor: Sensor | None = None
        self._shape: tuple[int, int] | None = None
        self._lines: IO[str] | None = None
        self._names: list[Path] = []
        self._next_seq: int | None = None
        self.frames = self.missed = self.malformed = 0

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
            and writer.follows(t_ns)
        )
        if writer is None or not fits:
            writer = self._rotate(frame, sensor)
        writer.append(frame.pixels_HW, t_ns)
        self.frames += 1

    def add_message(self, message: dict[str, Any]) -> None:
        """Write a target message to the recording of the day; before the first frame, nowhere."""
        if self._lines is not None and message["schema"] == "irst.targets/1":
            self._lines.write(json.dumps(message) + "\n")
            self._lines.flush()

    def _rotate(self, frame: Frame, sensor: Sensor) -> LiveRecordingWriter:
        self.close()
        stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
        path = self._folder / f"{sensor.id}-{stamp}-{len(self._names):04d}.zarr"
        self._writer = LiveRecordingWriter(path, frame.info.shape, sensor)
        self._sensor, self._shape = sensor, frame.info.shape
        self._lines = _lines_of(path).open("w", encoding="utf-8")
        self._names.append(path)
        if self._keep is not None and len(self._names) > self._keep:
            oldest = self._names[-self._keep - 1]
            shutil.rmtree(oldest, ignore_errors=True)
            _lines_of(oldest).unlink(missing_ok=True)
        return self._writer

    def close(self) -> None:
        """Finish the recording that is being written."""
        if self._lines is not None:
            self._lines.close()
            self._lines = None
        if self._writer is not None:
            self._writer.close()
            self._writer = None


def _lines_of(path: Path) -> Path:
    return path.with_suffix(".targets.jsonl")


def record(
    targets: str, frames: str, folder: Path, max_bytes: int, keep: int | None, keys: Path | None
) -> str:
    """Record until the run ends, or an interrupt; returns what was done as a line.

    Raises RunError if nothing came at all or the folder cannot be written.
    """
    os.nice(NICENESS)
    recorder = Recorder(folder, max_bytes, keep)
    with contextlib.ExitStack() as stack:
        frame_socket = FrameSubscriber(frames)
        stack.callback(frame_socket.close)
        stack.callback(recorder.close)
        try:
            frame_socket.wait_connected()
            # Only now, so that a run that waits for a subscriber does not begin too early.
            subscriber = Subscriber(targets, keys)
            stack.callback(subscriber.close)
            _follow(recorder, frame_socket, subscriber)
        except OSError as error:
            raise RunError(f"{folder}: cannot be written ({error.strerror})") from error
        except KeyboardInterrupt:
            pass
    if not recorder.frames:
        raise RunError(f"no frame came from {frames}; is it the run's publish.frames?")
    return (
        f"recorded {recorder.frames} frames in {folder}; {recorder.missed} were not seen (shed by "
        f"the run, or missed here), {recorder.malformed} malformed"
    )


def _follow(recorder: Recorder, frames: FrameSubscriber, subscriber: Subscriber) -> None:
    until = None  # after the end of the stream, frames on their way still come
    while until is None or time.monotonic() < until:
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
