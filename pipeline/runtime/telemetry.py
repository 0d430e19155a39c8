"""Figures of a run for Prometheus: base units, names ending in their unit or `_total`.

All of them are known to the supervisor, so one endpoint on one process tells everything.
"""

import os
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info

from pipeline.runtime.metrics_page import metrics_page
from pipeline.transport.sockets import AddressInUse

if TYPE_CHECKING:
    from pipeline.runtime.children import Children
    from pipeline.runtime.dead_letters import DeadLetters
    from pipeline.runtime.dispatch import Dispatcher
    from pipeline.runtime.inlet import Intake
    from pipeline.runtime.topology import Node
    from pipeline.transport.publish import Publisher

SECONDS = (0.0005, 0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.064, 0.125, 0.25, 0.5, 1.0, 2.0)
PROCESS_EVERY_S = 1.0
FIGURES = ("frames", "matched", "counted", "latency", "answered", "lost", "start")
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


class Telemetry:
    """A registry of its own, so that two runs in one process keep apart."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        given: dict[str, Any] = {"namespace": "irst", "registry": self.registry}
        self._frames = Counter(
            "frames", "Frames by what became of them", ["outcome", "stage"], **given
        )
        self._unfused = Counter(
            "unfused_frames", "Published without the word of the node beside the flow", **given
        )
        self._targets = Counter("targets", "Targets published", **given)
        self._stage = Histogram(
            "stage_seconds", "Time in a stage or on a hop, with waiting", ["stage"],
            buckets=SECONDS, **given,
        )  # fmt: skip
        self._age = Histogram(
            "publish_age_seconds", "From ingest to publish", buckets=SECONDS, **given
        )
        self._last = Gauge(
            "last_publish_timestamp_seconds", "When targets were last published, UTC", **given
        )
        self._last_frame = Gauge(
            "last_frame_timestamp_seconds", "When the source last gave a frame, UTC", **given
        )
        self._queue = Gauge("queue_frames", "Frames waiting for a node", ["node"], **given)
        self._held = Gauge("held_frames", "Frames a node's workers hold", ["node"], **given)
        self._subscribers = Gauge("subscribers", "Subscribers connected", **given)
        self._behind = Gauge("subscribers_behind", "Of those, who is behind", **given)
        self._ready = Gauge("node_ready", "1 if the process is ready", ["node"], **given)
        self._memory = Gauge("node_memory_bytes", "Resident memory", ["node"], **given)
        self._descriptors = Gauge("node_descriptors", "Open file descriptors", ["node"], **given)
        self._restarts = Counter("restarts", "Processes started anew", ["node"], **given)
        self._malformed = Counter(
            "malformed_messages", "What came in that could not be read", **given
        )
        self._held_back = Counter(
            "subscriber_overflows", "Messages published while a subscriber was behind", **given
        )
        self._refused = Counter("refused_clients", "Connections without a key on the list", **given)
        self._swaps = Counter(
            "swaps", "Engine swaps asked for, and the figure that one was refused for",
            ["outcome", "figure"], **given,
        )  # fmt: skip
        self._build = Info("run", "Engine and configuration", **given)
        self._described: tuple[str, str] | None = None
        self._processes_at = 0.0
        self._totals: dict[Counter, int] = {}
        self._taken = 0

    def expect(self, topology: Iterable["Node"]) -> None:
        """Have every series from the start, so that the first loss is an increase.

        What was not expected gets its series when it comes.
        """
        self._frames.labels("published", "")
        for node in topology:
            for stage in (node.name, *node.stages):
                self._frames.labels("dropped", stage)
            for replica in range(node.replicas):
                self._restarts.labels(f"{node.name}.{replica}")
        for stage in ("source", "transport", "publish"):
            self._frames.labels("dropped", stage)
        self._swaps.labels("taken", "")
        for figure in FIGURES:
            self._swaps.labels("refused", figure)

    @contextmanager
    def served(self, endpoint: str | None) -> Iterator[None]:
        """Answer at ADDRESS:PORT as long as the block lasts; not at all without an endpoint."""
        if endpoint is None:
            yield
            return
        address, port = endpoint.rsplit(":", 1)
        with ExitStack() as page:
            try:
                page.enter_context(metrics_page(address, int(port), self.registry))
            except OSError as error:
                raise AddressInUse(
                    f"telemetry.metrics {endpoint}: cannot listen there ({error.strerror}); "
                    "choose another port"
                ) from error
            yield

    def count(self, message: dict[str, Any]) -> None:
        """Take in a message that was published."""
        if message["schema"] == "irst.gap/1":
            self._frames.labels("dropped", message["stage"]).inc()
        elif message["schema"] == "irst.targets/1":
            self._frames.labels("published", "").inc()
            self._targets.inc(len(message["targets"]["id"]))
            self._unfused.inc(bool(message.get("fusion", {}).get("missing")))
            self._age.observe(message["age_ns"] / 1e9)
            self._last.set(time.time())
            for stage, ns in message["stage_ns"].items():
                self._stage.labels(stage).observe(ns / 1e9)
            if self._described != (described := (message["engine"], message["config"])):
                self._described = described
                self._build.info({"engine": message["engine"], "config": message["config"]})

    def count_swap(self, refused_for: str | None) -> None:
        """Another configuration has taken over, or was refused for a figure."""
        outcome = "taken" if refused_for is None else "refused"
        self._swaps.labels(outcome, refused_for or "").inc()

    def observe(
        self,
        dispatcher: "Dispatcher",
        children: "Children",
        publisher: "Publisher",
        dead_letters: "DeadLetters",
        intake: "Intake",
    ) -> None:
        """Take in how things stand."""
        if intake.taken != self._taken:
            self._taken = intake.taken
            self._last_frame.set(time.time())
        self._queue.labels(children.all[0].task.node.name).set(intake.waiting)
        for node, (waiting, held) in dispatcher.depths().items():
            self._queue.labels(node).set(waiting)
            self._held.labels(node).set(held)
        self._subscribers.set(publisher.subscribers)
        self._behind.set(publisher.behind)
        totals = {
            self._malformed: dead_letters.count,
            self._held_back: publisher.held_back,
            self._refused: publisher.refused,
        }
        totals |= {self._restarts.labels(name): n for name, n in children.restarts.items()}
        for counter, total in totals.items():
            counter.inc(total - self._totals.get(counter, 0))
        self._totals = totals
        if (now := time.monotonic()) < self._processes_at:
            return
        self._processes_at = now + PROCESS_EVERY_S
        processes = [(child.name, child.ready, child.process) for child in children.all]
        for name, ready, process in processes:
            self._ready.labels(name).set(ready)
            if process is not None and process.pid is not None:
                self._observe_process(name, f"/proc/{process.pid}")
        self._observe_process("supervisor", "/proc/self")

    def _observe_process(self, name: str, folder: str) -> None:
        try:
            pages = int(Path(folder, "statm").read_text().split()[1])
            descriptors = sum(1 for _ in Path(folder, "fd").iterdir())
        except (OSError, IndexError):
            return  # it has just ended
        self._memory.labels(name).set(pages * PAGE_BYTES)
        self._descriptors.labels(name).set(descriptors)
