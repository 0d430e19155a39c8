"""The source that measures live runs, and what is read from them."""

import numpy as np
import pytest
from tiny_yolo import write_tiny_yolo

from pipeline.bench_fusion import FUSION
from pipeline.bench_live import Run, live_run
from pipeline.component import component
from pipeline.config import load_config
from pipeline.errors import PipelineError
from pipeline.formats.recording import RecordingWriter
from pipeline.physics.sensor import Sensor
from pipeline.watch import Look


def loop(path, phases):
    kind = component("source", "loop")
    return kind.build(kind.Config(path=path, phases=phases), {})


def test_a_recording_goes_round_and_round_through_its_phases(scene_recording):
    source = loop(scene_recording, [(0.1, 200.0), (0.05, 400.0)])
    frames = list(source.frames())
    assert [frame.info.seq for frame in frames] == list(range(40))
    assert source.length == 40
    np.testing.assert_array_equal(frames[12].pixels_HW, frames[0].pixels_HW)
    times = np.diff([frame.info.t_exposure_ns for frame in frames]) / 1e9
    assert 0.09 < times[:19].sum() < 10.0
    assert frames[0].info.clock == "utc"


def test_a_closed_loop_ends(scene_recording):
    source = loop(scene_recording, [(1e6, 50.0)])
    frames = source.frames()
    next(frames)
    source.close()
    assert list(frames) == []


def test_an_empty_recording_cannot_go_round(tmp_path):
    with RecordingWriter(tmp_path / "none.zarr", (16, 16), Sensor()):
        pass
    with pytest.raises(PipelineError, match=r"none\.zarr: 0 bytes"):
        loop(tmp_path / "none.zarr", [(1.0, 1.0)])


def test_a_live_run_is_seen_whole(scene_recording, tmp_path):
    source = {"kind": "loop", "path": str(scene_recording), "phases": [(2.0, 60.0)]}
    config = tmp_path / "config.yaml"
    config.write_text(FUSION.format(detector=write_tiny_yolo(tmp_path)))
    run = live_run(load_config(config, source=source))
    assert run.frames == 120
    assert 0 < run.fused <= len(run.ages_ms)
    assert run.unnamed == 0
    assert len(run.ages_ms) > 20
    assert min(run.ages_ms) > 0
    assert set(run.growth("irst_node_memory_bytes")) == {
        "front.0", "unmix.0", "back.0", "yolo.0", "supervisor",
    }  # fmt: skip


def test_growth_is_counted_from_when_it_has_settled():
    looks = [Look(n, {"m": {("a",): value}}) for n, value in enumerate([1, 100, 101, 102, 110])]
    assert Run(looks=looks).growth("m") == {"a": pytest.approx(0.1)}
