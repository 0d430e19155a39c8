"""`pipeline bench`: every stage and hop on this machine, beside the budgets.

Method. A scene recording (640 × 512, 14 bit, 16 groups a frame) is made once, with its map of bad
pixels, in a temporary folder. (1) Each stage by direct call over all frames, one stage after
another. (2) Replay in processes over ZeroMQ, as fast as it goes: its rival is the plain loop over
the same stages, and the ratio of the two is printed. (3) The same recording live at 100 Hz: age at
publish, each hop from send to receipt with the waiting in it, frames shed. (4) One full frame
from the supervisor to a node and back, twice, over ipc, one frame at a time.
"""

import os
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track
from rich.table import Table

from pipeline.component import Source
from pipeline.config import PipelineConfig, load_config, open_source
from pipeline.formats.recording import RecordingWriter
from pipeline.messages import Frame, FrameInfo, Patches, Trace
from pipeline.physics.scene import Scene, SceneSettings
from pipeline.runtime import replay
from pipeline.runtime.flow import build_flow
from pipeline.runtime.memory import keep_freed_memory
from pipeline.runtime.supervisor import Supervisor
from pipeline.summary import Summary
from pipeline.transport import codec
from pipeline.transport.hub import HubSocket, NodeSocket, Word

Milliseconds = NDArray[np.float64]
LIVE_HZ = 100.0
HOPS = (b"first", b"second")  # nodes: two hops each
DETECTION_BUDGET_HZ = 400.0
FOUR_HOPS_BUDGET_MS = 1.5
AGE_BUDGET_MS = 10.0


def run_bench(frames: int, engine: str | None) -> None:
    """Measure and print; see the module for the method."""
    console = Console()
    with tempfile.TemporaryDirectory(prefix="irst-") as folder:
        bench = Bench(Path(folder), engine)
        bench.make(frames)
        config = bench.config()
        source = open_source(config)
        keep_freed_memory()
        stage_ms, patches = _stage_times(config, source)
        console.print(
            f"\n{frames} frames of 640 × 512, 16 bit, seed 1; {patches / frames:.1f} windows "
            f"unmixed a frame; {os.cpu_count()} cores"
        )
        _print_stages(console, config, stage_ms)
        _print_flow(console, config, source)
        _print_live(console, bench.config(rate_hz=LIVE_HZ), source)
    _print_hops(console, frames)


@dataclass(frozen=True)
class Bench:
    """The files of a measurement: recording, bad-pixel map, configuration."""

    folder: Path
    engine: str | None
    name: str = "bench"

    @property
    def recording(self) -> Path:
        """The scene."""
        return self.folder / f"{self.name}.zarr"

    def make(self, frames: int, **scene: Any) -> None:
        """Write the scene, other than usual as given, and its map of bad pixels."""
        made = Scene(SceneSettings(seed=1, **scene))
        shape = (made.settings.height, made.settings.width)
        cv2.imwrite(str(self._bad_pixels), made.bad_pixels_HW.astype(np.uint8) * 255)
        with RecordingWriter(self.recording, shape, made.settings.sensor) as writer:
            say = f"making the recording {self.name}"
            for index in track(range(frames), say, console=Console(stderr=True)):
                writer.append(made.frame(index).pixels_HW, round(index * 1e9 / LIVE_HZ))

    @property
    def _bad_pixels(self) -> Path:
        return self.folder / f"{self.name}.png"

    def config(self, more: str = "", **source: Any) -> PipelineConfig:
        """Replay of the recording, with the map of bad pixels that every real sensor has.

        more: further sections, as YAML.
        """
        file = self.folder / "config.yaml"
        file.write_text(f"sensor: {{bad_pixels: {self._bad_pixels}}}\n{more}")
        settings = {"kind": "zarr_recording", "path": str(self.recording), **source}
        return load_config(file, source=settings, engine=self.engine)

    def live(self, phases: list[tuple[float, float]], more: str = "") -> PipelineConfig:
        """The recording from memory, for so many seconds at so many frames/s, one after another."""
        return self.config(more, kind="loop", phases=phases)


def _collect(messages: Any) -> Summary:
    summary = Summary()
    for message in messages:
        summary.add(message)
    return summary


def _stage_times(config: PipelineConfig, source: Source) -> tuple[dict[str, Milliseconds], int]:
    """Milliseconds of each stage for each frame, and the number of patches in all frames."""
    messages: list[Any] = list(source.frames())
    stage_ms, patches = {}, 0
    for name in config.stage_names:
        flow = build_flow(config, [name], source.sensor, source.shape)
        done = [flow.process(message, Trace(0, {})) for message in messages]
        flow.close()
        messages = [message for message, _ in done]
        stage_ms[name] = np.array([trace.stage_ns[name] for _, trace in done]) / 1e6
        if isinstance(messages[0], Patches):
            patches = sum(len(message.group) for message in messages)
    return stage_ms, patches


def _ratio(measured: float, budget: float) -> str:
    return f"{measured / budget:.2f}"


def _print_stages(
    console: Console, config: PipelineConfig, stage_ms: dict[str, Milliseconds]
) -> None:
    table = Table(
        "stage", "p50 ms", "p99 ms", "frames/s", "budget ms", "p50 / budget",
        title="(1) stages by direct call", title_justify="left",
    )  # fmt: skip
    for node in config.topology:
        total = np.sum([stage_ms[stage] for stage in node.stages], axis=0)
        for stage in node.stages:
            p50, p99 = np.percentile(stage_ms[stage], [50, 99])
            table.add_row(stage, f"{p50:.2f}", f"{p99:.2f}", f"{1e3 / p50:.0f}", "", "")
        p50, p99 = np.percentile(total, [50, 99])
        budget = node.budget_ms
        table.add_row(
            f"[bold]{node.name} node", f"{p50:.2f}", f"{p99:.2f}", f"{1e3 / p50:.0f}",
            f"{budget:g}", _ratio(p50, budget), end_section=True,
        )  # fmt: skip
    console.print(table)
    rate = 1e3 / float(np.median(stage_ms["detect"]))
    verdict = _ratio(rate, DETECTION_BUDGET_HZ)
    console.print(
        f"up to detection {rate:.0f} frames/s; wanted {DETECTION_BUDGET_HZ:g}: × {verdict}"
    )


def _print_flow(console: Console, config: PipelineConfig, source: Source) -> None:
    again = open_source(config)
    plain = _collect(replay.in_process(config, again))
    again.close()
    flow = _collect(replay.over_zeromq(config, source))
    console.print("\n(2) replay as fast as it goes")
    for name, run in (("plain loop", plain), ("over ZeroMQ", flow)):
        console.print(f"  {name:12} {run.frames / run.seconds:7.1f} frames/s")
    console.print(f"  ZeroMQ / plain loop: {plain.seconds / flow.seconds:.2f}")


def _print_live(console: Console, config: PipelineConfig, source: Source) -> None:
    with Supervisor(config, "live", source.sensor, source.shape) as supervisor:
        live = _collect(supervisor.messages())
    table = Table(
        "stage or hop", "p50 ms", "p99 ms",
        title=f"(3) live at {LIVE_HZ:g} Hz: {live.frames} frames published, "
        f"{len(live.dropped)} shed",
        title_justify="left",
    )  # fmt: skip
    for name, ns in live.latency_ns.items():
        p50, p99 = np.percentile(np.array(ns) / 1e6, [50, 99])
        table.add_row(name, f"{p50:.2f}", f"{p99:.2f}")
    console.print(table)
    if live.frames:
        p99 = float(np.percentile(live.latency_ns["ingest to publish"], 99)) / 1e6
        verdict = _ratio(p99, AGE_BUDGET_MS)
        console.print(f"ingest to publish p99 {p99:.1f} ms; budget {AGE_BUDGET_MS:g}: × {verdict}")


def _print_hops(console: Console, frames: int) -> None:
    times_ms = four_hops_ms(frames)
    p50, p99 = np.percentile(times_ms, [50, 99])
    verdict = _ratio(float(p50), FOUR_HOPS_BUDGET_MS)
    console.print(
        f"\n(4) four hops of a full frame: p50 {p50:.2f} ms, p99 {p99:.2f} ms; "
        f"budget {FOUR_HOPS_BUDGET_MS:g} ms p50: × {verdict}"
    )


def four_hops_ms(frames: int) -> list[float]:
    """Milliseconds each of `frames` full frames takes from front through two nodes and back."""
    info = FrameInfo(0, "bench", 0, "utc", (512, 640))
    frame = Frame(info, np.zeros((512, 640), dtype=np.uint16))
    times_ms = []
    with tempfile.TemporaryDirectory(prefix="irst-") as folder:
        endpoint = f"ipc://{folder}/hub"
        hub = HubSocket(endpoint)
        stages = [
            threading.Thread(target=_relay, args=(endpoint, name), daemon=True) for name in HOPS
        ]
        for stage in stages:
            stage.start()
            _heard(hub)
        for _ in range(frames):
            began = time.monotonic_ns()
            parts = codec.encode(frame, Trace(began, {}), began)
            for name in HOPS:
                hub.send(name, Word("work"), parts)
                parts = _heard(hub)
            codec.decode(parts)
            times_ms.append((time.monotonic_ns() - began) / 1e6)
        for name, stage in zip(HOPS, stages, strict=True):
            hub.send(name, Word("stop"))
            stage.join()
        hub.close()
    return times_ms


def _heard(hub: HubSocket) -> list[Any]:
    """The parts of the next message, whatever it takes."""
    while (heard := hub.receive(1000)) is None:
        pass
    return heard[1][1:]


def _relay(endpoint: str, name: bytes) -> None:
    """A node without stages: decodes, encodes and answers."""
    socket = NodeSocket(endpoint, name)
    socket.send(Word("ready"))
    while (received := socket.receive(1000)) is None or received[0].kind != "stop":
        if received is not None:
            message, trace, sent_ns = codec.decode(received[1])
            socket.send(Word("result"), codec.encode(message, trace, sent_ns))
    socket.close()
