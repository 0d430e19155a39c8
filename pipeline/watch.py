"""`pipeline watch`: a run's Prometheus figures as a table in the terminal."""

import http.client
import re
import time
import urllib.request
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry, Metric
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from pipeline.errors import PipelineError, RunError

TIMEOUT_S = 2.0
MAX_BYTES = 1 << 24
ADDRESS = r"([A-Za-z0-9._-]+|\[[0-9A-Fa-f:]+\]):[0-9]{1,5}"


@dataclass(frozen=True)
class Look:
    """The figures at one time: name → values of its labels (by name, `le` last) → value."""

    t_s: float
    values: dict[str, dict[tuple[str, ...], float]] = field(default_factory=dict)

    def get(self, name: str, *labels: str) -> float:
        """One value, 0 if there is none yet."""
        return self.values.get(name, {}).get(labels, 0.0)

    def total(self, name: str, first: str) -> float:
        """The sum over all whose first label is this."""
        return sum(v for labels, v in self.values.get(name, {}).items() if labels[:1] == (first,))


def read_figures(address: str) -> Look:
    """Ask a run for its figures; raises PipelineError if nobody answers with any."""
    if not re.fullmatch(ADDRESS, address):
        raise PipelineError(f"{address}: not an address; give HOST:PORT, e.g. 127.0.0.1:9464")
    url = f"http://{address}/metrics"
    hint = "is telemetry.metrics of the run this address?"
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT_S) as answer:
            text = answer.read(MAX_BYTES).decode()
        families = list(text_string_to_metric_families(text))
        if not any(family.name.startswith("irst_") for family in families):
            raise ValueError("the figures of something else")
    except (http.client.HTTPException, ValueError) as error:
        raise PipelineError(f"{url}: what answers there is no run's figures; {hint}") from error
    except OSError as error:
        reason = getattr(error, "reason", error)
        raise PipelineError(f"{url}: no figures there ({reason}); {hint}") from error
    return _look(families)


def look_at(registry: CollectorRegistry) -> Look:
    """The figures of a run in this process."""
    return _look(registry.collect())


def _look(families: Iterable[Metric]) -> Look:
    values: dict[str, dict[tuple[str, ...], float]] = defaultdict(dict)
    for family in families:
        for sample in family.samples:
            names = sorted(sample.labels, key=lambda name: (name == "le", name))
            values[sample.name][tuple(sample.labels[name] for name in names)] = sample.value
    return Look(time.monotonic(), dict(values))


def counted_from(now: Look, before: Look) -> Look:
    """What to subtract from `now`: nothing where a counter went back, as the run began anew."""
    restarted = any(
        now.get(name, *labels) < value
        for name, series in before.values.items()
        if name.endswith("_total")
        for labels, value in series.items()
    )
    return Look(before.t_s) if restarted else before


def quantile_s(now: Look, before: Look | None, name: str, share: float, *labels: str) -> float:
    """Upper edge, seconds, of the histogram's bucket that holds the quantile since `before`."""
    counts = []
    for key, value in now.values.get(f"{name}_bucket", {}).items():
        if key[:-1] == labels:
            earlier = 0.0 if before is None else before.get(f"{name}_bucket", *key)
            counts.append((float(key[-1]), value - earlier))
    counts.sort()
    total = counts[-1][1] if counts else 0.0
    return next((edge for edge, count in counts if total and count >= share * total), 0.0)


def watch(address: str, count: int | None, every_s: float) -> None:
    """Look again and again until Ctrl-C, `count` looks, or the run ends."""
    before = None
    looks = 0
    with Live(auto_refresh=False) as live:
        while count is None or looks < count:
            try:
                now = read_figures(address)
            except PipelineError as error:
                if before is None:
                    raise
                raise RunError(f"the run has ended or answers no more ({error})") from error
            live.update(render(now, before), refresh=True)
            before = now
            looks += 1
            if count is None or looks < count:
                time.sleep(every_s)


def _shown(rate: float | None) -> str:
    return "–" if rate is None else f"{rate:.1f}"


def render(now: Look, before: Look | None) -> Group:
    """All that is known as tables; rates, and quantiles, are of what came since `before`.

    Without it there are no rates, and quantiles are of the whole run.
    """
    before = counted_from(now, before) if before else None

    def rate(outcome: str) -> float | None:
        if before is None:
            return None
        gained = now.total("irst_frames_total", outcome) - before.total(
            "irst_frames_total", outcome
        )
        return gained / (now.t_s - before.t_s)

    published, dropped = rate("published"), rate("dropped")
    lost = now.total("irst_frames_total", "dropped")
    restarts = now.values.get("irst_restarts_total", {})
    age_ms = [1e3 * quantile_s(now, before, "irst_publish_age_seconds", q) for q in (0.5, 0.99)]
    head = Text(
        f"{_shown(published)} frames/s published, {_shown(dropped)} lost/s "
        f"({lost:.0f} in all); age ≤ {age_ms[0]:g} ms p50, ≤ {age_ms[1]:g} ms p99; "
        f"{now.get('irst_subscribers'):.0f} subscribers, {sum(restarts.values()):.0f} "
        f"restarts, {now.get('irst_malformed_messages_total'):.0f} malformed",
        style="bold red" if dropped else "bold",
    )
    nodes = Table("node", "ready", "waiting", "held", "memory MB", "descriptors")
    for (name,), memory in now.values.get("irst_node_memory_bytes", {}).items():
        row, first = name.split(".")[0], name.endswith(".0")
        nodes.add_row(
            name,
            "yes" if name == "supervisor" or now.get("irst_node_ready", name) else "[red]no",
            f"{now.get('irst_queue_frames', row):.0f}" if first else "",
            f"{now.get('irst_held_frames', row):.0f}" if first else "",
            f"{memory / 1e6:.0f}",
            f"{now.get('irst_node_descriptors', name):.0f}",
        )
    stages = Table("stage or hop", "p50 ≤ ms", "p99 ≤ ms")
    for (name,) in now.values.get("irst_stage_seconds_count", {}):
        edges = [1e3 * quantile_s(now, before, "irst_stage_seconds", q, name) for q in (0.5, 0.99)]
        stages.add_row(name, *(f"{edge:g}" for edge in edges))
    reasons = Table("lost at", "frames")
    for (outcome, stage), number in now.values.get("irst_frames_total", {}).items():
        if outcome == "dropped" and number:
            reasons.add_row(stage, f"{number:.0f}")
    return Group(head, nodes, stages, *([reasons] if lost else []))
