"""Subscribers of a run under faults: one that sees everything, and those that stop reading."""

import subprocess
import sys
import threading
from dataclasses import dataclass, field

from pipeline.client import Subscriber

WELL = 100  # frames in a row, 2 s
NORMAL_AGE_NS = 30_000_000
DEAF_FRAMES = 220  # more than the kernel, both sockets and `publish.queue` hold


@dataclass
class Witness:
    """What a subscriber has seen of a run."""

    subscriber: Subscriber
    outcomes: list[dict] = field(default_factory=list)  # what is of use here of targets and gaps
    published: int = 0
    end: dict | None = None
    rejected: int = 0
    given_up: bool = False

    def watch(self) -> None:
        """Listen to the end of the stream."""
        while self.end is None and not self.given_up:
            message = self.subscriber.receive(1.0)
            if message is None:
                continue
            if message["schema"] in ("irst.targets/1", "irst.gap/1"):
                names = message.keys() & {"frame_seq", "stage", "age_ns"}
                self.outcomes.append({name: message[name] for name in names})
                self.published += message["schema"] == "irst.targets/1"
            elif message["schema"] == "irst.eos/1":
                self.end = message
        self.rejected = self.subscriber.rejected
        self.subscriber.close()

    @property
    def well(self) -> bool:
        """The last WELL frames were all published, and, most of them, in time."""
        last = self.outcomes[-WELL:]
        ages_ns = sorted(message.get("age_ns", sys.maxsize) for message in last)
        ages_ns += [sys.maxsize] * (WELL - len(last))
        return ages_ns[-1] < sys.maxsize and ages_ns[WELL * 3 // 4] < NORMAL_AGE_NS


class Deaf:
    """A subscriber that reads one frame and no more."""

    def __init__(self, process: subprocess.Popen[str], witness: Witness) -> None:
        self._process, self._witness = process, witness
        self._deaf_since: int | None = None  # frames published then
        threading.Thread(target=self._has_come, daemon=True).start()

    def _has_come(self) -> None:
        if self._process.stdout.readline() == "deaf\n":
            self._deaf_since = self._witness.published

    @property
    def long_enough(self) -> bool:
        """True once more were published than fit in where they can wait."""
        since = self._deaf_since
        return since is not None and self._witness.published > since + DEAF_FRAMES

    def hear(self) -> int:
        """Let it read again, and end; how many frames it has missed."""
        said, _ = self._process.communicate("\n", timeout=60)
        return int(said)

    def end(self) -> None:
        self._process.kill()
        self._process.communicate()
