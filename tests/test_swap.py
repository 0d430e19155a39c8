"""Another engine in a run that goes on: tried on live frames first. Every process here is real."""

import json
import re
import time
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import faulty_nodes
import numpy as np
import onnx
import pytest
from msgspec import structs
from onnx import numpy_helper
from tiny_yolo import write_tiny_yolo

from engines.loader import MODELS
from engines.manifest import sha256_of
from pipeline.config import PipelineConfig, load_config, open_source
from pipeline.errors import PipelineError
from pipeline.messages import FrameInfo, Fusion, TargetReport, Trace
from pipeline.runtime.join import make_ledger
from pipeline.runtime.parity import Parity, Refused
from pipeline.runtime.settings import SwapSettings
from pipeline.runtime.supervisor import Supervisor
from pipeline.runtime.swap import check_swap
from pipeline.runtime.topology import Node
from pipeline.runtime.trial import Trial
from pipeline.transport.hub import Word

SHIPPED = "off_grid_any"
CONFIG = """
source: {kind: synthetic, rate_hz: 20, width: 200, height: 200, singles: 6, groups: 4}
topology: {unmix: {replicas: 2}, front: {queue: 200}}
unmix: {threads: 1}
supervisor: {max_age_ms: 30000}
swap: {frames: 4, slower: 5, within_s: 50}
"""


@pytest.fixture
def config(tmp_path) -> PipelineConfig:
    file = tmp_path / "config.yaml"
    file.write_text(f"{CONFIG}engine: {SHIPPED}\n")
    return load_config(file)


def engine_like_the_shipped(folder: Path, name: str, *, noise: float) -> str:
    """The shipped engine in a file of its own, its weights off by this share."""
    model = onnx.load(MODELS / f"{SHIPPED}.onnx")
    model.doc_string = name
    rng = np.random.default_rng(0)
    for weights in model.graph.initializer:
        values = numpy_helper.to_array(weights)
        if values.dtype == np.float32 and noise:
            off = values * (1.0 + noise * rng.standard_normal(values.shape, np.float32))
            weights.CopyFrom(numpy_helper.from_array(off.astype(np.float32), weights.name))
    onnx.save(model, folder / f"{name}.onnx")
    manifest = json.loads((MODELS / f"{SHIPPED}.json").read_text())
    manifest["onnx_sha256"] = sha256_of(folder / f"{name}.onnx")
    (folder / f"{name}.json").write_text(json.dumps(manifest))
    return str(folder / f"{name}.json")


def run(config: PipelineConfig, asked: list[PipelineConfig]):
    """Messages of a live run that is asked for one configuration after another, and outcomes."""
    source = open_source(config)
    sensor, shape = source.sensor, source.shape
    source.close()
    messages = []
    with Supervisor(config, "live", sensor, shape) as supervisor:

        def outcomes() -> Counter[tuple[str, str]]:
            samples = next(iter(supervisor.telemetry._swaps.collect())).samples
            return Counter(
                {
                    (sample.labels["outcome"], sample.labels["figure"]): int(sample.value)
                    for sample in samples
                    if sample.name.endswith("_total")
                }
            )

        requested, quiet_until = 0, 10
        for message in supervisor.messages():
            messages.append(message)
            if sum(outcomes().values()) < requested:
                quiet_until = len(messages) + 5
            elif len(messages) >= quiet_until:
                if requested < len(asked):
                    supervisor.reload(lambda number=requested: asked[number])
                    requested += 1
                else:
                    supervisor.stop()
        return messages, +outcomes()  # without those there were none of


def assert_nothing_lost(messages) -> None:
    assert not [message for message in messages if message["schema"] == "irst.gap/1"]
    frames = [message for message in messages if message["schema"] == "irst.targets/1"]
    assert [message["frame_seq"] for message in frames] == list(range(len(frames)))
    assert messages[-1]["schema"] == "irst.eos/1" and messages[-1]["published"] == len(frames)


@pytest.mark.timeout(300)
def test_only_an_engine_that_does_as_well_takes_over(config, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(
        "pipeline.runtime.supervisor.run_node", faulty_nodes.as_its_engine_is_called
    )
    names = ["broken", "altered", "slow", "failing", "good"]
    engines = [
        engine_like_the_shipped(tmp_path, name, noise=0.5 if name == "altered" else 0.0)
        for name in names
    ]
    broken = Path(engines[0]).with_suffix(".onnx")
    broken.write_bytes(broken.read_bytes()[:-1000])
    asked = [replace(config, engine=engine) for engine in engines]
    messages, outcomes = run(config, asked)
    assert not [message for message in messages if message["schema"] == "irst.gap/1"]
    frames = [message for message in messages if message["schema"] == "irst.targets/1"]
    assert [message["frame_seq"] for message in frames] == list(range(len(frames)))
    assert messages[-1]["schema"] == "irst.eos/1" and messages[-1]["published"] == len(frames)

    refused = {("refused", figure): 1 for figure in ("start", "matched", "latency", "lost")}
    assert outcomes == {**refused, ("taken", ""): 1}
    lines = [record.getMessage() for record in caplog.records if "pipeline" in record.name]
    said = [
        "broken.onnx: truncated or altered",
        r"of the targets are found by both within 0.1 px, 95.0% are asked for \(swap.matched\)",
        r"node unmix takes \d{3,}\.",
        "at unmix: cannot",
    ]
    assert len(lines) == len(said) + 1, lines
    for line, part in zip(lines, said, strict=False):
        assert re.match(f"the run goes on as it was: .*{part}", line) and "\n" not in line

    (first,) = [
        later["frame_seq"]
        for earlier, later in pairwise(frames)
        if (earlier["engine"], earlier["config"]) != (later["engine"], later["config"])
    ]
    assert lines[-1] == f"another configuration has taken over from frame {first} on"
    shipped = str(MODELS / SHIPPED)
    for model, part in ((shipped, frames[:first]), (engines[-1], frames[first:])):
        digest = sha256_of(Path(model).with_suffix(".onnx"))[:12]
        assert {message["engine"] for message in part} == {digest}
    assert (frames[0]["config"], frames[-1]["config"]) == (config.digest, asked[-1].digest)


def test_an_engine_in_the_front_cannot_change_in_a_run(tmp_path):
    """Nor be read again: the front is not started anew, so that the sensor is read on."""
    file = tmp_path / "one.yaml"
    file.write_text(
        "topology: {front: {stages: [detect, crop, unmix, report]}, unmix: {stages: []}}"
    )
    old = load_config(file)
    for new in (replace(old, engine="off_grid"), old):
        with pytest.raises(PipelineError, match="the engine runs in the front node"):
            check_swap(old, new)


@pytest.mark.patient
@pytest.mark.timeout(300)
def test_a_detector_that_does_not_answer_as_well_is_refused(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(
        "pipeline.runtime.supervisor.run_node", faulty_nodes.as_its_detector_is_called
    )
    text = CONFIG.replace(
        "topology: {unmix: {replicas: 2}, ",
        "topology: {yolo: {stages: [recognise]}, back: {stages: [fuse]}, ",
    ).replace("max_age_ms", "beside_ms: 5000, max_age_ms")
    configs = []
    for name in ("first", "failing", "slow"):
        (tmp_path / name).mkdir()
        detector = write_tiny_yolo(tmp_path / name, centre_sigma_px=2.0)
        file = tmp_path / f"{name}.yaml"
        file.write_text(f"{text}engine: {SHIPPED}\nrecognise: {{engine: {detector}}}\n")
        configs.append(load_config(file))
    messages, outcomes = run(configs[0], configs[1:])
    assert_nothing_lost(messages)
    assert outcomes == {("refused", figure): 1 for figure in ("answered", "latency")}
    lines = [record.getMessage() for record in caplog.records if "pipeline" in record.name]
    assert "the detector answers 0 frames in time" in lines[0] and lines[0].endswith(": no idea")
    assert re.search(r"node yolo takes \d{3,}\.", lines[1])
    frames = [message for message in messages if message["schema"] == "irst.targets/1"]
    assert {frame["config"] for frame in frames} == {configs[0].digest}
    assert "no idea" not in {frame["fusion"]["missing"] for frame in frames}, "a trial is unseen"


NODES = (Node("unmix", ("unmix",), budget_ms=5.0),)


def report(xy_px, group) -> TargetReport:
    number = len(group)
    return TargetReport(
        info=FrameInfo(0, "roof", 0, "utc", (32, 32)),
        engine="",
        source="",
        refined=np.zeros(number, np.bool_),
        group=np.array(group, np.int32),
        xy_px=np.array(xy_px, np.float64).reshape(-1, 2),
        cov_px2=np.zeros((number, 3)),
        intensity=np.ones(number),
        intensity_sigma=np.ones(number),
        p_exist=np.ones(number),
        snr=np.ones(number),
        flags=np.zeros(number, np.uint16),
        bbox_px=np.zeros((3, 4), np.int32),
        count_posterior=np.zeros((3, 6)),
        joint_px2=np.zeros((3, 0, 0)),
        group_flags=np.zeros(3, np.uint16),
    )


def compared(old, new, *, old_ms=4.0, new_ms=4.0, same_targets=True, **settings) -> None:
    parity = Parity(SwapSettings(**settings), NODES)
    traces = (Trace(0, {"unmix": round(ms * 1e6)}) for ms in (old_ms, new_ms))
    parity.add(*zip((old, new), traces, strict=True))
    parity.check(same_targets=same_targets)


TWO = report([[4.0, 5.0], [20.0, 9.0]], [0, 2])
SAID = Fusion("yolo", "", ("",) * 3, np.full((3, 4), np.nan), np.full(3, np.nan))
FUSED, UNFUSED = (
    structs.replace(TWO, fusion=structs.replace(SAID, missing=missing))
    for missing in ("", "too late")
)


def test_the_same_targets_in_any_order_are_the_same():
    compared(TWO, TWO)
    compared(TWO, report([[20.05, 9.0], [4.0, 4.95]], [2, 0]))
    compared(report([], []), report([], []), matched=0.0, counted=0.0)


@pytest.mark.parametrize(
    "new",
    [
        report([[4.2, 5.0], [20.0, 9.0]], [0, 2]),
        report([[4.0, 5.0], [20.0, 9.0]], [1, 2]),
        report([], []),
        report([[4.0, 5.0], [20.0, 9.0], [20.5, 9.0]], [0, 2, 2]),
    ],
)
def test_targets_elsewhere_are_others(new):
    with pytest.raises(Refused) as refused:
        compared(TWO, new)
    assert refused.value.figure == "matched"
    compared(TWO, new, same_targets=False)


def test_groups_of_other_numbers_are_others():
    with pytest.raises(Refused, match=r"50\.0% of the groups .* \(swap\.counted\)"):
        compared(TWO, report([[4.0, 5.0], [20.0, 9.0], [20.5, 9.0]], [0, 2, 2]), matched=0.5)


def test_a_node_may_take_its_budget_or_what_the_old_one_took_and_half_again():
    compared(TWO, TWO, old_ms=1.0, new_ms=5.0)
    compared(TWO, TWO, old_ms=8.0, new_ms=11.9)
    with pytest.raises(Refused, match=r"unmix takes 12\.10 ms where the old one takes 8\.00"):
        compared(TWO, TWO, old_ms=8.0, new_ms=12.1)


def test_a_frame_that_was_shown_before_the_trial_is_not_tried():
    rows = (
        Node("front", ("detect", "crop")),
        Node("back", ("unmix", "report", "fuse")),
        Node("yolo", ("recognise",), beside=True),
    )
    trial = Trial(
        SwapSettings(), rows, make_ledger(rows, 10**9, 10**9), patience_s=5.0, same_targets=True
    )
    trial.ready(b"back", 1)
    trial.ready(b"yolo", 2)
    now_ns = time.monotonic_ns()
    trial.offer(5, now_ns, [b"patches 5"])
    assert list(trial.assign()) == []
    trial.show(6, now_ns, [b"frame 6"])
    trial.offer(6, now_ns, [b"patches 6"])
    assert [(worker, job.seq, job.parts) for worker, job in trial.assign()] == [
        (b"yolo", 6, [b"frame 6"])
    ]
    trial.hear(b"yolo", Word("result", 6), [b"boxes 6"])
    ((worker, job),) = trial.assign()
    assert (worker, job.parts, job.beside) == (b"back", [b"patches 6"], [b"boxes 6"])


def test_a_detector_answers_as_often_and_as_soon_as_the_old_one():
    nodes = (*NODES, Node("yolo", ("recognise",), budget_ms=10.0, beside=True))

    def judged(pairs, new_ms=9.0):
        parity = Parity(SwapSettings(answered=0.6), nodes)
        for pair in pairs:
            traces = (Trace(0, {"unmix": 0, "recognise": round(ms * 1e6)}) for ms in (1.0, new_ms))
            parity.add(*zip(pair, traces, strict=True))
        parity.check(same_targets=True)

    judged([(FUSED, FUSED)] * 2 + [(FUSED, UNFUSED)])
    judged([(UNFUSED, UNFUSED), (UNFUSED, FUSED)], new_ms=11.0)  # with nothing to compare it to
    with pytest.raises(Refused, match=r"answers 1 frames .* old one answers 2, .*: too late"):
        judged([(FUSED, FUSED), (FUSED, UNFUSED)])
    with pytest.raises(Refused, match=r"yolo takes 11\.00 ms where the old one takes 1\.00; 10"):
        judged([(FUSED, FUSED)], new_ms=11.0)
