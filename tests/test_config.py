from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest

from pipeline.component import Stage, component
from pipeline.config import load_config
from pipeline.errors import PipelineError
from pipeline.messages import Unmixed
from pipeline.runtime import topology
from pipeline.runtime.topology import TOPOLOGY, flow_types, running
from pipeline.sensing import load_bad_pixels

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))


def write(path: Path, text: str) -> Path:
    file = path / "config.yaml"
    file.write_text(text)
    return file


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_shipped_configuration_is_valid(path):
    assert load_config(path).stage_names[0] == "detect"


def test_defaults_need_no_file():
    config = load_config(None)
    assert config.topology == running(TOPOLOGY)
    assert set(config.stages) == set(config.stage_names)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("detcet: {}", "unknown field `detcet`; known here: source, sensor"),
        ("detect: {gird: 3}", "unknown field `gird` at detect; known there"),
        ("report: {min_snr: loud}", "report.min_snr: input should be a valid number"),
        ("report: {min_snr: -1}", "report.min_snr: input should be greater than or equal to 0"),
        ("source: {kind: telepathy}", ".yaml: source.kind: unknown source `telepathy`; use one"),
        ("calibrate: {}", "stage `calibrate` is in no node; add it at topology.front.stages"),
        ("refine: {}", "stage `refine` is in no node; add it at topology.unmix.stages"),
        ("recognise: {}", "stage `recognise` is in no node; add it at topology.yolo.stages"),
        ("fuse: {}", "stage `fuse` is in no node; add it at topology.back.stages"),
        (
            "sensor: {geometry: {fx_px: 9, distortion: [1, 2]}}",
            "sensor.geometry.distortion: value error, must be five numbers: k1, k2, p1, p2, k3",
        ),
        ("sensor: {gain: 2}\nsensor: {gain: 3}", ".yaml: line 2: `sensor` is given twice"),
        ("sensor: {id: a}\ndetect:\n - {b: [{c: 1,\n c: 2}]}", "line 4: `c` is given twice"),
        ("? {a: 1, a: 2}\n: x", "line 1: `a` is given twice"),
        ("? [a]\n: x", "not valid YAML"),
        ("source: {path: x}", "source must be a map with a `kind`"),
        ("source: {kind: zarr_recording}", "field `path` is missing at source"),
        ("sensor: {sigma_px: 50}", "sensor.sigma_px: input should be less than or equal to 5"),
        ("topology: {middle: {}}", "unknown field `middle` at topology"),
        ("topology: {unmix: {replica: 2}}", "unknown field `replica` at topology.unmix"),
        ("topology: {back: {replicas: 2}}", "topology.back.replicas must be 1"),
        ("topology: {unmix: {stages: [unmix, refind]}}", "topology.unmix.stages: unknown stage"),
        ("publish: {endpoint: 'tcp://0.0.0.0:5556'}", "publish.endpoint: value error, must be ipc"),
        ("publish: {endpoint: 'tcp://10.0.0.1:5556'}", "without keys nobody else is let in"),
        ("publish: {endpoint: 'tcp://127.0.0.1:0'}", "the port must be 1…65535, or *"),
        ("publish: {endpoint: 'tcp://127.0.0.1:65536'}", "the port must be 1…65535, or *"),
        ("publish: {endpoint: 'tcp://127.0.0.1:٣٣'}", "must be ipc"),
        ("publish: {endpoint: 'tcp://[::]:5556'}", "must be ipc"),
        ("publish: {endpoint: 'ipc://@abstract'}", "must be ipc"),
        ('publish: {endpoint: "ipc:///tmp/a\\0b"}', "must be ipc"),
        ("publish: {endpoint: ''}", "must be ipc"),
        ("publish: [1]", "publish: input should be a valid dictionary"),
        ("publish: []", "publish: input should be a valid dictionary"),
        ("publish: {heartbeat_s: 0.05}", "publish.heartbeat_s: input should be greater"),
        ("publish: {heartbeat_s: 3601}", "publish.heartbeat_s: input should be less"),
        ("publish: {heartbeat_s: .nan}", "publish.heartbeat_s"),
        ("publish: {queue: 1000001}", "publish.queue: input should be less"),
        ("sensor: {read_noise: 1.1e+6}", "sensor.read_noise: input should be less"),
        ("sensor: {gain: 1.1e+9}", "sensor.gain: input should be less"),
        ("sensor: {ifov_rad: .inf}", "sensor.ifov_rad: input should be a finite number"),
        ("sensor: {gain: .nan}", "sensor.gain: input should be"),
        ("engine: 7", "engine must be a name or a path"),
        ("source: {kind: [synthetic]}", "source.kind must be a name, got ['synthetic']"),
        ("engine: 2001-99-99", "not valid YAML: month must be in 1..12"),
        ('engine: !!int ""', "not valid YAML"),
        ("engine: !!bool perhaps", "not valid YAML"),
        ("engine: !!timestamp soon", "not valid YAML"),
        ("engine: " + 3000 * "[", "not valid YAML"),
        ("- a\n- b", "must be a map of named sections"),
        ("detect: {a: [", "not valid YAML"),
    ],
)
def test_a_mistake_is_named_with_its_path_and_what_is_known_there(tmp_path, text, message):
    file = write(tmp_path, text)
    with pytest.raises(PipelineError) as error:
        load_config(file)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_what_a_map_is_merged_with_may_be_given_again(tmp_path):
    text = "sensor: &own {<<: &base {gain: 2.0, id: a}, id: b}\npublish: {queue: 3}\n"
    sensor = load_config(write(tmp_path, text)).sensor
    assert (sensor.gain, sensor.id) == (2.0, "b")


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ("unmix: {stages: [unmix]}", "unmix.stages: the flow ends with Unmixed"),
        (
            "unmix: {stages: [report]}",
            "unmix.stages: `report` takes Unmixed, but Patches comes there",
        ),
        (
            "unmix: {stages: [unmix, unmix]}",
            "unmix.stages: `unmix` takes Patches, but Unmixed comes there",
        ),
        ("front: {stages: [crop, detect]}", "front.stages: `crop` takes Blobs, but Frame comes"),
    ],
)
def test_stages_that_do_not_fit_each_other_are_named(tmp_path, stages, message):
    file = write(tmp_path, f"topology: {{{stages}}}")
    with pytest.raises(PipelineError) as error:
        load_config(file)
    assert str(error.value).startswith(f"{file}: topology.{message}")


def test_the_nodes_of_the_table_take_and_give_what_their_stages_do():
    assert flow_types(TOPOLOGY) == [("Frame", "Patches"), ("Patches", "TargetReport")]


def test_a_front_without_stages_passes_frames_on(tmp_path):
    text = "topology: {front: {stages: []}, unmix: {stages: [detect, crop, unmix, report]}}"
    types = [("Frame", "Frame"), ("Frame", "TargetReport")]
    assert flow_types(load_config(write(tmp_path, text)).topology) == types


def test_of_other_nodes_those_with_stages_are_run(tmp_path):
    text = "topology: {unmix: {stages: [unmix]}, back: {stages: [report]}}"
    rows = load_config(write(tmp_path, text)).topology
    assert [row.name for row in rows] == ["front", "unmix", "back"]
    text = "topology: {front: {stages: [detect, crop, unmix, report]}, unmix: {stages: []}}"
    (alone,) = load_config(write(tmp_path, text)).topology
    assert flow_types([alone]) == [("Frame", "TargetReport")]


def test_a_stage_between_messages_of_one_kind_fits_once(monkeypatch):
    class Refine(Stage[Unmixed, Unmixed]):
        pass

    class Steady(Refine):
        pass

    own = {"refine": Refine, "steady": Steady}
    monkeypatch.setattr(
        topology, "component", lambda kind, name: own.get(name) or component(kind, name)
    )
    front, unmix, back, _ = TOPOLOGY
    refined = replace(unmix, stages=("unmix", "refine", "report"))
    assert flow_types([front, refined, back]) == flow_types(TOPOLOGY)
    apart = replace(unmix, stages=("unmix", "refine"))
    assert flow_types([front, apart, replace(back, stages=("steady", "report"))])
    with pytest.raises(PipelineError, match="`refine` is there already"):
        flow_types([front, apart, replace(back, stages=("refine", "report"))])


def test_a_bomb_of_aliases_gives_a_short_message(tmp_path):
    bomb = "&a0 [x, x]"
    for level in range(1, 40):
        bomb = f"&a{level} [{bomb}, *a{level - 1}]"
    for text in (f"engine: {bomb}", f"source: {{kind: {bomb}}}", f"sensor: {{sigma_px: {bomb}}}"):
        with pytest.raises(PipelineError) as error:
            load_config(write(tmp_path, text))
        assert len(str(error.value)) < len(str(tmp_path)) + 250


@pytest.mark.parametrize(
    "endpoint", ["ipc:///run/targets", "tcp://localhost:1", "tcp://127.1.2.3:*"]
)
def test_endpoints_on_this_machine_are_taken(endpoint):
    assert load_config(None, publish={"endpoint": endpoint}).publish.endpoint == endpoint


def test_what_is_given_overrides_the_file_and_nothing_is_not_given(tmp_path):
    file = write(tmp_path, "publish: {endpoint: 'tcp://127.0.0.1:7000', queue: 7}")
    given = load_config(file, publish={"endpoint": "tcp://127.0.0.1:7001"}).publish
    assert (given.endpoint, given.queue) == ("tcp://127.0.0.1:7001", 7)
    with pytest.raises(PipelineError, match=r"publish\.endpoint: value error, must be ipc"):
        load_config(file, publish={"endpoint": ""})


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(PipelineError, match=r"nowhere\.yaml: cannot read the configuration"):
        load_config(tmp_path / "nowhere.yaml")


def test_the_digest_follows_what_decides_the_targets_only(tmp_path):
    base = load_config(None)
    assert load_config(write(tmp_path, "publish: {queue: 7}")).digest == base.digest
    assert load_config(write(tmp_path, "report: {min_snr: 5}")).digest != base.digest


def test_bad_pixel_maps_must_be_grey_and_of_the_frames_size(tmp_path):
    mask = np.zeros((4, 6), dtype=np.uint8)
    mask[1, 2] = 255
    path = tmp_path / "bad.png"
    cv2.imwrite(str(path), mask)
    found = load_bad_pixels(path, (4, 6))
    assert found is not None
    assert np.argwhere(found).tolist() == [[1, 2]]
    with pytest.raises(PipelineError, match="bad-pixel map is 6×4, frames are 8×8"):
        load_bad_pixels(path, (8, 8))
    with pytest.raises(PipelineError, match="readable grey PNG"):
        load_bad_pixels(tmp_path / "none.png", (4, 6))
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(PipelineError, match="readable grey PNG, and this is none, or damaged"):
        load_bad_pixels(path, (4, 6))
    cv2.imwrite(str(path), np.full((4, 6), 255, np.uint8))
    with pytest.raises(PipelineError, match="every pixel"):
        load_bad_pixels(path, (4, 6))
