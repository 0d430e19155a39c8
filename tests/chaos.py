"""Random faults against a live run: what is not named as lost is published once, in order.

    python tests/chaos.py --seconds 300 --events 200 --seed 1

Events: a node is killed; a node is stopped for three seconds; a subscriber stops reading; garbage
is sent to the run's sockets; another engine is to take over. At the end the run must be well, and
its totals must add up with what one subscriber has seen from the first frame to the last.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import zmq

from pipeline.client import Subscriber

BIN = Path(sys.executable).parent
STOP_S = 3.0
HEALTHY_S = 30.0
CONFIG = """
source: {{kind: synthetic, rate_hz: {rate}, width: 160, height: 128, singles: 3, groups: 2}}
topology: {{unmix: {{replicas: 2}}}}
unmix: {{threads: 1}}
publish: {{endpoint: "ipc://{folder}/out", wait_for: 1}}
supervisor: {{name: {name}, restarts: 10000, stall_s: 2}}
swap: {{frames: 5, matched: 0, counted: 0, slower: 20, within_s: 10}}
dead_letters: {{folder: "{folder}/letters"}}
"""
DEAF = """
import sys, time, zmq
socket = zmq.Context().socket(zmq.SUB)
socket.setsockopt(zmq.RCVHWM, 1)
socket.setsockopt(zmq.SUBSCRIBE, b"targets.")
socket.connect(sys.argv[1])
time.sleep(5)
"""


def nodes_of(pid: int) -> list[int]:
    """Processes of the nodes that run now."""
    listed = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    found = []
    for child in listed:
        try:
            if "spawn_main" in Path(f"/proc/{child}/cmdline").read_text():
                found.append(int(child))
        except OSError:
            continue  # it has just ended
    return found


@dataclass
class Witness:
    """What a subscriber has seen of a run."""

    subscriber: Subscriber
    outcomes: list[tuple[int, str]] = field(default_factory=list)  # seq, schema
    end: dict | None = None
    rejected: int = 0

    def watch(self) -> None:
        """Listen to the end of the stream."""
        while self.end is None:
            message = self.subscriber.receive(1.0)
            if message is None:
                continue
            if message["schema"] in ("irst.targets/1", "irst.gap/1"):
                self.outcomes.append((message["frame_seq"], message["schema"]))
            elif message["schema"] == "irst.eos/1":
                self.end = message
        self.rejected = self.subscriber.rejected
        self.subscriber.close()

    @property
    def published(self) -> int:
        return sum(schema == "irst.targets/1" for _, schema in list(self.outcomes))


class Chaos:
    """One run and the faults done to it."""

    def __init__(self, folder: Path, seed: int, rate_hz: float = 50.0) -> None:
        self._rng = random.Random(seed)
        self._folder = folder
        self.done: Counter[str] = Counter()
        self._deaf: list[subprocess.Popen[bytes]] = []
        self._timers: list[threading.Timer] = []
        self._config = folder / "config.yaml"
        self._text = CONFIG.format(rate=rate_hz, folder=folder, name=folder.name)
        self._config.write_text(self._text)
        self._run = subprocess.Popen(
            [str(BIN / "pipeline"), "run", "--config", str(self._config)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "TMPDIR": str(folder)},
        )
        self._output: list[str] = []
        self._readers = [
            threading.Thread(target=self._read, args=(pipe,), daemon=True)
            for pipe in (self._run.stdout, self._run.stderr)
        ]
        for reader in self._readers:
            reader.start()
        self.witness = Witness(Subscriber(f"ipc://{folder}/out"))
        self._watcher = threading.Thread(target=self.witness.watch, daemon=True)
        self._watcher.start()

    def _read(self, pipe) -> None:
        self._output.extend(pipe)

    def wait_published(self, more: int, timeout_s: float = HEALTHY_S) -> float:
        """Seconds until so many more frames were published."""
        began, before = time.monotonic(), self.witness.published
        while self.witness.published < before + more:
            assert self._run.poll() is None, "".join(self._output)
            assert time.monotonic() < began + timeout_s, "no frames come: " + "".join(self._output)
            time.sleep(0.05)
        return time.monotonic() - began

    def strike(self, seconds: float, events: int) -> None:
        """So many random events, spread over the time."""
        for _ in range(events):
            event = self._rng.choice(
                [self._kill, self._stop, self._deafen, self._corrupt, self._swap]
            )
            event()
            self.done[event.__name__.strip("_")] += 1
            time.sleep(self._rng.uniform(0.5, 1.5) * seconds / events)

    def _any_node(self) -> int | None:
        nodes = nodes_of(self._run.pid)
        return self._rng.choice(nodes) if nodes else None

    def _kill(self) -> None:
        if (node := self._any_node()) is not None:
            os.kill(node, signal.SIGKILL)

    def _stop(self) -> None:
        if (node := self._any_node()) is None:
            return
        os.kill(node, signal.SIGSTOP)
        timer = threading.Timer(STOP_S, self._go_on, [node])
        timer.start()
        self._timers.append(timer)

    def _go_on(self, node: int) -> None:
        if self._run.poll() is None and node in nodes_of(self._run.pid):
            os.kill(node, signal.SIGCONT)

    def _deafen(self) -> None:
        words = [sys.executable, "-c", DEAF, f"ipc://{self._folder}/out"]
        self._deaf.append(subprocess.Popen(words))

    def _corrupt(self) -> None:
        hub = next(self._folder.glob("irst-*/hub"))
        for kind, path in ((zmq.DEALER, hub), (zmq.XSUB, self._folder / "out")):
            socket = zmq.Context.instance().socket(kind)
            socket.linger = 100
            socket.connect(f"ipc://{path}")
            socket.send_multipart([self._rng.randbytes(self._rng.randrange(400))])
            socket.close()

    def _swap(self) -> None:
        engine = self._rng.choice(["off_grid_any", "dista_net_field"])
        self._config.write_text(f"{self._text}engine: {engine}\n")
        self._run.send_signal(signal.SIGUSR1)

    def finish(self) -> dict:
        """End the run; returns its totals after checking all that must hold."""
        for timer in self._timers:
            timer.join()
        nodes = nodes_of(self._run.pid)
        self._run.send_signal(signal.SIGTERM)
        asked = time.monotonic()
        self._run.wait(30)
        took_s = time.monotonic() - asked
        for reader in self._readers:
            reader.join(10)
        for pipe in (self._run.stdout, self._run.stderr):
            pipe.close()
        output = "".join(self._output)
        self._watcher.join(10)
        for deaf in self._deaf:
            deaf.wait(10)
        assert self._run.returncode == 0, output
        assert "Traceback" not in output, output
        assert took_s < 5.0, f"it took {took_s:.1f} s to end"
        end = self.witness.end
        assert end is not None, output
        dropped = sum(entry["frames"] for entry in end["dropped"])
        assert end["frames_in"] == end["published"] + dropped, end
        seqs = [seq for seq, _ in self.witness.outcomes]
        assert seqs == list(range(end["frames_in"])), "each frame once, in order"
        assert self.witness.published == end["published"]
        assert self.witness.rejected == 0
        assert not any(Path(f"/proc/{node}").exists() for node in nodes)
        assert not list(self._folder.glob("irst-*"))
        return end


def run_chaos(seconds: float, events: int, seed: int) -> tuple[dict, Counter[str], float]:
    """The whole of it: totals, events by kind, seconds the run took to be well again."""
    with tempfile.TemporaryDirectory(prefix="c") as folder:
        chaos = Chaos(Path(folder), seed)
        chaos.wait_published(20, 60.0)
        chaos.strike(seconds, events)
        time.sleep(STOP_S)
        well_s = chaos.wait_published(50)
        return chaos.finish(), chaos.done, well_s


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--events", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    end, done, well_s = run_chaos(given.seconds, given.events, given.seed)
    print(json.dumps(end, indent=1))
    print(f"events: {dict(done)}; 50 frames published {well_s:.1f} s after the last")


if __name__ == "__main__":
    main()
