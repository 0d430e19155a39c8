"""Random faults against a live run: what is not named as lost is published once, in order.

    python tests/chaos.py --seconds 300 --events 200 --seed 1

Events: the front, unmix or back node is killed, or stopped for one or three seconds; a subscriber
stops reading; garbage comes over the feed, from strangers at the run's sockets, and as a node's
answer; another engine is to take over. All kinds come equally often. At the end each must have had
its effect, the run must be well, and its totals must add up with what one subscriber has seen from
the first frame to the last.
"""

import argparse
import contextlib
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

import msgpack
import zmq
from chaos_witnesses import Deaf, Witness
from faulty_nodes import CHAOS, DAMAGE

from pipeline.client import Subscriber
from pipeline.errors import PipelineError
from pipeline.runtime.dead_letters import DeadLetters, read_letter
from pipeline.watch import Look, read_figures

ACTORS = Path(__file__).with_name("chaos_actors.py")
NODES = ("front", "unmix", "back")
KINDS = (
    *(("kill", node) for node in NODES),
    *(("stop", node) for node in NODES),
    *(("deafen",), ("feed_garbage",), ("intrude",), ("damage",), ("swap",)),
)
"""Of events: the method, without its underscore, and what it is given."""
STOPS_S = (1.0, 3.0)
HEALTHY_S = 30.0
CONFIG = """
source: {{kind: zmq_feed, endpoint: "ipc://{folder}/in", width: 160, height: 128}}
sensor: {{full_scale: 16383, read_noise: 5}}
topology: {{unmix: {{stages: [unmix], replicas: 2}}, back: {{stages: [report]}}}}
unmix: {{threads: 1}}
publish: {{endpoint: "ipc://{folder}/out", wait_for: 1, queue: 100}}
supervisor: {{name: {name}, restarts: 10000, within_s: 10, stall_s: 2}}
swap: {{frames: 5, matched: 0, counted: 0, slower: 20, within_s: 10}}
dead_letters: {{folder: "{folder}/letters", keep: 10000}}
telemetry: {{metrics: "{metrics}"}}
"""
ENGINES = ("off_grid_any.openvino", "off_grid_any")


class Chaos:
    """One run and the faults done to it."""

    def __init__(self, folder: Path, seed: int, rate_hz: float = 50.0) -> None:
        self._rng = random.Random(seed)
        self._folder = folder
        self.done: Counter[str] = Counter()
        self._deaf: list[Deaf] = []
        self.missed: list[int] = []  # by those that were deaf
        self._died: set[str] = set()  # processes, by name, that the run had to start anew
        self._timers: list[threading.Timer] = []
        self._engine = 0
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self._metrics = f"127.0.0.1:{probe.getsockname()[1]}"
        self._config = folder / "config.yaml"
        self._text = CONFIG.format(folder=folder, name=folder.name, metrics=self._metrics)
        self._config.write_text(f"{self._text}engine: {ENGINES[0]}\n")
        self._run = self._actor("run", str(self._config), stderr=subprocess.PIPE)
        self._output: list[str] = []
        self._readers = [
            threading.Thread(target=self._read, args=(pipe,), daemon=True)
            for pipe in (self._run.stdout, self._run.stderr)
        ]
        for reader in self._readers:
            reader.start()
        self._camera = self._actor("camera", f"ipc://{folder}/in", str(rate_hz))
        self._feed = zmq.Context.instance().socket(zmq.PUSH)
        self._feed.linger = 0
        self._feed.connect(f"ipc://{folder}/in")
        self.witness = Witness(Subscriber(f"ipc://{folder}/out"))
        self._watcher = threading.Thread(target=self.witness.watch, daemon=True)
        self._watcher.start()

    def _actor(self, *words: str, **pipes: int) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, str(ACTORS), *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "TMPDIR": str(self._folder), CHAOS: str(self._folder)},
            **pipes,
        )

    def _read(self, pipe) -> None:
        self._output.extend(pipe)

    # --- waiting ---------------------------------------------------------------------------

    def wait(self, condition, timeout_s: float = HEALTHY_S) -> float:
        """Seconds until a condition holds."""
        began = time.monotonic()
        while not condition():
            assert self._run.poll() is None, "".join(self._output)
            assert time.monotonic() < began + timeout_s, "in vain: " + "".join(self._output)
            time.sleep(0.02)
        return time.monotonic() - began

    def figures(self) -> Look:
        for _ in range(9):
            with contextlib.suppress(PipelineError):  # it starts engines just now, perhaps
                return read_figures(self._metrics)
        return read_figures(self._metrics)

    @property
    def well(self) -> bool:
        """Frames are published in time, none is lost, and all processes are ready."""
        return self.witness.well and all(self.figures().values["irst_node_ready"].values())

    # --- events ----------------------------------------------------------------------------

    def strike(self, seconds: float, events: int) -> None:
        """So many events, spread over the time, each kind as often as any other."""
        order: list[tuple[str, ...]] = []
        while len(order) < events:
            order += self._rng.sample(KINDS, len(KINDS))
        next_s = time.monotonic()
        for event, *words in order[:events]:
            getattr(self, f"_{event}")(*words)
            self.done[" ".join([event, *words])] += 1
            next_s += self._rng.uniform(0.5, 1.5) * seconds / events
            time.sleep(max(0.0, next_s - time.monotonic()))

    def _processes(self, node: str) -> dict[str, int]:
        """Processes of a node that run now, by name; not those that are to take over from them."""
        children = Path(f"/proc/{self._run.pid}/task/{self._run.pid}/children").read_text().split()
        found: dict[str, int] = {}
        for file in self._folder.glob(f"{node}.*#*.pid"):
            pid = file.read_text()
            if pid in children and _state(int(pid)) not in "ZX":
                found[file.stem] = int(pid)
        oldest = min(map(_generation, found), default=0)
        return {name: pid for name, pid in found.items() if _generation(name) == oldest}

    def _victim(self, node: str) -> tuple[str, int]:
        """One of a node's processes, once there is one."""
        self.wait(lambda: self._processes(node))
        return self._rng.choice(sorted(self._processes(node).items()))

    def _will_be_replaced(self, name: str) -> bool:
        """True of a process that no other is about to take over from."""
        files = self._folder.glob(f"{name.split('#')[0]}#*.pid")
        return max(_generation(file.stem) for file in files) == _generation(name)

    def _kill(self, node: str) -> None:
        name, pid = self._victim(node)
        if self._will_be_replaced(name):
            self._died.add(name)
        os.kill(pid, signal.SIGKILL)

    def _stop(self, node: str) -> None:
        name, pid = self._victim(node)
        os.kill(pid, signal.SIGSTOP)
        self.wait(lambda: _state(pid) in "TZX", 5.0)
        timer = threading.Timer(self._rng.choice(STOPS_S), self._go_on, [name, pid])
        timer.start()
        self._timers.append(timer)

    def _go_on(self, name: str, pid: int) -> None:
        if _state(pid) == "T":
            os.kill(pid, signal.SIGCONT)
        elif self._will_be_replaced(name):
            self._died.add(name)

    def _deafen(self) -> None:
        while len(self._deaf) > 1:
            self._undeafen()
        process = self._actor("deaf", f"ipc://{self._folder}/out")
        self._deaf.append(Deaf(process, self.witness))

    def _undeafen(self) -> None:
        self.wait(lambda: self._deaf[0].long_enough)
        self.missed.append(self._deaf.pop(0).hear())

    def _feed_garbage(self) -> None:
        """What is no frame, among the camera's."""
        rng = self._rng
        header = {
            "schema": "irst.frame/1",
            "seq": rng.randrange(1 << 40),
            "t_exposure_ns": 0,
            "dtype": "uint16",
            "shape": [128, 160],
        }
        kinds = (
            [rng.randbytes(rng.randrange(400))],
            [rng.randbytes(200), rng.randbytes(128 * 160 * 2)],
            [msgpack.packb(header), rng.randbytes(7)],
            [b"\x91" * 10_000, b""],
            [msgpack.packb(header | {"shape": [1 << 14, 1 << 14]}), b""],
        )
        for parts in rng.sample(kinds, 3):  # of more in a second not all are kept
            self._feed.send_multipart(parts)

    def _intrude(self) -> None:
        """Strangers at the hub and at the subscribers' door."""
        hub = next(self._folder.glob("irst-*/hub"))
        for kind, path in ((zmq.DEALER, hub), (zmq.XSUB, self._folder / "out")):
            stranger = zmq.Context.instance().socket(kind)
            stranger.linger = 10_000
            stranger.connect(f"ipc://{path}")
            stranger.send_multipart([self._rng.randbytes(self._rng.randrange(1, 400))])
            stranger.close()

    def _damage(self) -> None:
        """A node's next answer is no message; or not even a word, which is its end."""
        kind = self._rng.choice([*DAMAGE, "word"])
        wish = self._folder / f"{self._rng.choice(NODES)}.damage"
        wish.with_suffix(".new").write_text(kind)
        wish.with_suffix(".new").rename(wish)

    def _swap(self) -> None:
        self._engine = 1 - self._engine
        self._config.write_text(f"{self._text}engine: {ENGINES[self._engine]}\n")
        self._run.send_signal(signal.SIGUSR1)

    # --- the end ---------------------------------------------------------------------------

    def settle(self) -> float:
        """What is under way takes effect; returns seconds from the last fault to all being well."""
        for timer in self._timers:
            timer.join()
        began = time.monotonic()
        self.wait(lambda: self.well)
        well_s = time.monotonic() - began
        while self._deaf:
            self._undeafen()
        self.wait(lambda: not list(self._folder.glob("*.damage")))
        self.wait(self._has_fed)
        while not self.figures().get("irst_swaps_total", "", "taken"):
            before = self._swaps_decided()
            self._swap()
            self.wait(lambda before=before: self._swaps_decided() > before)
        self.wait(lambda: self.well)
        return well_s

    def _has_fed(self) -> bool:
        """True if garbage is a letter; else more is fed, as it may have died with a front."""
        if self._letters()["over the feed"]:
            return True
        self._feed_garbage()
        time.sleep(0.5)
        return False

    def _letters(self) -> Counter[str]:
        """Dead letters by their cause."""
        letters = DeadLetters.letters(self._folder / "letters")
        return Counter(_cause(read_letter(path)["cause"]) for path in letters)

    def _swaps_decided(self) -> float:
        return sum(self.figures().values["irst_swaps_total"].values())

    def check_effects(self) -> dict[str, float]:
        """Every kind of event has done something; returns how much."""
        figures = self.figures()
        causes = self._letters()
        effects = {
            "killed or stopped too long": len(self._died),
            "restarts": sum(figures.values["irst_restarts_total"].values()),
            "missed by each of the deaf": min(self.missed),
            "overflows": figures.get("irst_subscriber_overflows_total"),
            "malformed": figures.get("irst_malformed_messages_total"),
            **{f"dead letters {cause}": causes[cause] for cause in CAUSES},
            "swaps taken": figures.get("irst_swaps_total", "", "taken"),
            "swaps refused": self._swaps_decided() - figures.get("irst_swaps_total", "", "taken"),
        }
        assert effects["restarts"] >= effects["killed or stopped too long"] > 0, effects
        for name in effects.keys() - {"swaps refused"}:
            assert effects[name] > 0, effects
        assert effects["overflows"] >= max(self.missed), effects
        assert causes.total() <= effects["malformed"], effects
        return effects

    def finish(self) -> dict:
        """End the run; returns its totals after checking all that must hold."""
        nodes = [pid for node in NODES for pid in self._processes(node).values()]
        self._run.send_signal(signal.SIGTERM)
        asked = time.monotonic()
        self._run.wait(30)
        took_s = time.monotonic() - asked
        self._watcher.join(10)
        output = self._close()
        assert self._run.returncode == 0, output
        assert "Traceback" not in output, output
        assert took_s < 5.0, f"it took {took_s:.1f} s to end"
        end, outcomes = self.witness.end, self.witness.outcomes
        assert end is not None, output
        dropped = Counter()
        for entry in end["dropped"]:
            dropped[entry["stage"]] += entry["frames"]
        assert end["frames_in"] == end["published"] + dropped.total(), end
        assert re.search(rf"{end['frames_in']} in = {end['published']} published", output), output
        seqs = [message["frame_seq"] for message in outcomes]
        assert seqs == list(range(end["frames_in"])), "each frame once, in order"
        assert self.witness.published == end["published"]
        seen = Counter(message["stage"] for message in outcomes if "stage" in message)
        assert seen == dropped, (seen, dropped)
        assert self.witness.rejected == 0
        assert not any(Path(f"/proc/{node}").exists() for node in nodes)
        assert not list(self._folder.glob("irst-*"))
        return end

    def _close(self) -> str:
        """End the others; what the run has said."""
        self._feed.close()
        self._camera.kill()
        self._camera.communicate()
        for deaf in self._deaf:
            deaf.end()
        for reader in self._readers:
            reader.join(10)
        for pipe in (self._run.stdin, self._run.stdout, self._run.stderr):
            pipe.close()
        return "".join(self._output)

    def abandon(self) -> None:
        """Leave nothing running after a failure."""
        self.witness.given_up = True
        self._watcher.join(10)
        if self._run.poll() is None:
            self._run.kill()
            self._run.wait(10)
            self._close()


CAUSES = {
    "over the feed": r"frame \d+ from the source: ",
    "of a stranger": r"from a stranger",
    "of a node": r"from node |frame \d+ at (node|the output)",
}


def _cause(text: str) -> str:
    return next(name for name, pattern in CAUSES.items() if re.match(pattern, text))


def _state(pid: int) -> str:
    """R, S, D: it runs; T: it is stopped; Z, X: it is dead."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return "X"


def _generation(name: str) -> int:
    """Of a process's configuration, from e.g. `unmix.0#2.5`."""
    return int(name.split("#")[1].split(".")[0])


def run_chaos(seconds: float, events: int, seed: int) -> tuple[dict, dict, Counter[str], float]:
    """The whole of it: totals, effects, events by kind, seconds the run took to be well again."""
    with tempfile.TemporaryDirectory(prefix="c") as folder:
        chaos = Chaos(Path(folder), seed)
        try:
            chaos.wait(lambda: chaos.witness.published > 20, 60.0)
            chaos.strike(seconds, events)
            well_s = chaos.settle()
            effects = chaos.check_effects()
            return chaos.finish(), effects, chaos.done, well_s
        finally:
            chaos.abandon()


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--events", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    if given.events < len(KINDS):
        parser.error(f"--events: at least {len(KINDS)}, one of each kind, got {given.events}")
    end, effects, done, well_s = run_chaos(given.seconds, given.events, given.seed)
    print(json.dumps(end, indent=1))
    print(f"events: {dict(done)}\neffects: {effects}\nwell {well_s:.1f} s after the last")


if __name__ == "__main__":
    main()
