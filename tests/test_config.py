from pathlib import Path

import cv2
import numpy as np
import pytest

from pipeline.config import load_bad_pixels, load_config
from pipeline.errors import PipelineError
from pipeline.runtime.topology import TOPOLOGY

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
    assert config.topology == TOPOLOGY
    assert set(config.stages) == set(config.stage_names)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("detcet: {}", "unknown field `detcet`; known here: source, sensor"),
        ("detect: {gird: 3}", "unknown field `gird` at detect; known there"),
        ("report: {min_snr: loud}", "report.min_snr: input should be a valid number"),
        ("report: {min_snr: -1}", "report.min_snr: input should be greater than or equal to 0"),
        ("source: {kind: telepathy}", "unknown source `telepathy`; use one of"),
        ("source: {path: x}", "source must be a map with a `kind`"),
        ("source: {kind: zarr_recording}", "field `path` is missing at source"),
        ("sensor: {sigma_px: 50}", "sensor.sigma_px: input should be less than or equal to 5"),
        ("topology: {middle: {}}", "unknown field `middle` at topology"),
        ("topology: {unmix: {replica: 2}}", "unknown field `replica` at topology.unmix"),
        ("topology: {back: {replicas: 2}}", "topology.back.replicas must be 1"),
        ("topology: {unmix: {stages: [unmix, refind]}}", "unknown stage `refind`; use one of"),
        ("publish: {endpoint: 'tcp://0.0.0.0:5556'}", "publish.endpoint: value error, must be ipc"),
        ("publish: {endpoint: 'tcp://10.0.0.1:5556'}", "without keys nobody else is let in"),
        ("publish: [1]", "publish"),
        ("engine: 7", "engine must be a name or a path"),
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
