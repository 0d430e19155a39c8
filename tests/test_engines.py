"""Engines: what a backend promises, and every way an engine can be refused."""

import json
import sys
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import numpy as np
import onnx
import pytest
from linear_engine import MAX_BATCH, patches, weights, write_engine, write_model

from engines import loader
from engines.base import Options
from engines.errors import EngineError
from engines.loader import load, open_engine, resolve
from engines.manifest import Manifest, read_manifest, sha256_of
from engines.scaling import network_input, network_unit
from engines.sensor_needs import SensorNeeds

SHIPPED = sorted(loader.MODELS.glob("*.json"))


@dataclass(frozen=True)
class FakeSensor:
    sigma_px: float = 0.5
    full_scale: int = 255
    noiseless: bool = True


@pytest.fixture
def engine(tmp_path: Path):
    with open_engine(write_engine(tmp_path)) as opened:
        yield opened


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_patch_has_the_same_bits_in_any_batch(path: Path, threads: int) -> None:
    with open_engine(path, options=Options(threads=threads, sigma_px=0.6)) as engine:
        patch = patches(MAX_BATCH + 3)
        if len(engine.manifest.planes) > 1:
            patch = np.stack([patch, np.full_like(patch, 0.05)], axis=1)
        together = engine.infer(patch)
        alone = np.concatenate([engine.infer(patch[i : i + 1]) for i in range(len(patch))])
        in_threes = np.concatenate([engine.infer(patch[i : i + 3]) for i in range(0, 18, 3)])
    np.testing.assert_array_equal(together, alone)
    np.testing.assert_array_equal(together[:18], in_threes)


def test_bf16_is_an_option_and_not_the_default(tmp_path: Path) -> None:
    path = write_engine(tmp_path)
    exact = patches(8).reshape(8, -1) @ weights()
    errors = {}
    for precision in ("f32", "bf16"):
        with open_engine(path, options=Options(precision=precision)) as engine:
            errors[precision] = np.abs(engine.infer(patches(8)).reshape(8, -1) - exact).max()
    with open_engine(path) as engine:
        default = np.abs(engine.infer(patches(8)).reshape(8, -1) - exact).max()
    assert default == errors["f32"] < 1e-5
    assert errors["bf16"] >= errors["f32"]  # equal on a CPU without bfloat16


@pytest.mark.usefixtures("engine")
def test_loading_calls_nobody() -> None:
    assert sys.modules["openvino_telemetry"] is None


# --- choosing one ----------------------------------------------------------------------------


def test_default_is_the_most_specific_that_fits_then_the_best(tmp_path: Path) -> None:
    any_field = {"sigma_px": 0.5}
    benchmark = {"sigma_px": 0.5, "full_scale": 255, "noiseless": True}
    write_engine(tmp_path, "field", sensor=any_field, cso_map=0.3)
    write_engine(tmp_path, "field_better", sensor=any_field, cso_map=0.35)
    write_engine(tmp_path, "benchmark", sensor=benchmark, cso_map=0.1)
    noisy = FakeSensor(sigma_px=0.55, full_scale=16383, noiseless=False)
    assert resolve("default", FakeSensor(), tmp_path).stem == "benchmark"
    assert resolve("default", noisy, tmp_path).stem == "field_better"
    assert resolve("field", FakeSensor(), tmp_path).stem == "field"


def test_a_path_may_be_of_manifest_or_model(tmp_path: Path) -> None:
    path = write_engine(tmp_path)
    for given in (path, path.with_suffix(".onnx")):
        with load(str(given), FakeSensor()) as engine:
            assert engine.manifest.name == "linear"


def test_no_shipped_engine_fits(tmp_path: Path) -> None:
    write_engine(tmp_path, "field")
    with pytest.raises(EngineError, match=r"field is made for sigma_px 0.5, the sensor has 1.2"):
        resolve("default", FakeSensor(sigma_px=1.2), tmp_path)


def test_a_network_that_is_told_sigma_serves_a_range(tmp_path: Path) -> None:
    needs = SensorNeeds(sigma_range_px=(0.4, 1.2))
    assert not needs.mismatches(FakeSensor(sigma_px=0.4, noiseless=False))
    (fault,) = needs.mismatches(FakeSensor(sigma_px=1.3, noiseless=False))
    assert fault == "made for sigma_px 0.4 to 1.2, the sensor has 1.3"


def test_planes_of_a_network_that_is_told_its_sensor() -> None:
    signal = np.array([[[1.0, 4.0], [0.0, 2.0]]], np.float32)
    noise = np.array([[[0.4, 0.8], [np.inf, 9.0]]], np.float32)
    unit = network_unit(signal, "peak", 255)
    alone = network_input(signal, noise, 0.7, unit, ("signal",))
    np.testing.assert_allclose(alone, signal / 4.0)
    told = network_input(signal, noise, 0.7, unit, ("signal", "noise", "sigma"))
    assert told.shape == (1, 3, 2, 2) and told.dtype == np.float32
    np.testing.assert_allclose(told[0, 1], [[0.1, 0.2], [1.0, 1.0]], rtol=1e-6)
    np.testing.assert_allclose(told[0, 2], 0.7)


def test_unknown_name_lists_what_there_is(tmp_path: Path) -> None:
    write_engine(tmp_path, "field")
    with pytest.raises(EngineError, match="no `feild`; use default, field"):
        load("feild", FakeSensor(), models=tmp_path)


@pytest.mark.parametrize(
    ("sensor", "fault"),
    [
        (FakeSensor(sigma_px=0.58), "sigma_px 0.5, the sensor has 0.58"),
        (FakeSensor(full_scale=4095), "full_scale 255, the sensor has 4095"),
        (FakeSensor(noiseless=False), "noiseless yes, the sensor has no"),
    ],
)
def test_engine_for_another_sensor_is_refused(
    tmp_path: Path, sensor: FakeSensor, fault: str
) -> None:
    needs = {"sigma_px": 0.5, "full_scale": 255, "noiseless": True}
    path = write_engine(tmp_path, sensor=needs)
    with pytest.raises(EngineError, match=fault) as refusal:
        load(str(path), sensor)
    assert str(path) in str(refusal.value)


def test_sigma_may_spread_as_in_the_field() -> None:
    needs = SensorNeeds(sigma_px=0.5)
    assert needs.mismatches(FakeSensor(sigma_px=0.55)) == []
    assert needs.mismatches(FakeSensor(sigma_px=0.45)) == []
    assert len(needs.mismatches(FakeSensor(sigma_px=0.42))) == 1


# --- files that cannot be used ---------------------------------------------------------------


def refusal(path: Path) -> str:
    with pytest.raises(EngineError) as caught:
        load(str(path), FakeSensor())
    message = str(caught.value)
    assert path.stem in message
    assert "\n" not in message
    return message


def test_no_such_file(tmp_path: Path) -> None:
    assert "no manifest" in refusal(tmp_path / "nothing.onnx")


def test_missing_model(tmp_path: Path) -> None:
    path = write_engine(tmp_path)
    path.with_suffix(".onnx").unlink()
    assert "model is missing" in refusal(path)


@pytest.mark.parametrize("change", ["truncated", "altered"])
def test_truncated_or_altered_model(tmp_path: Path, change: str) -> None:
    path = write_engine(tmp_path)
    model = path.with_suffix(".onnx")
    data = bytearray(model.read_bytes())
    data[len(data) // 2] ^= 1
    model.write_bytes(data[:-1000] if change == "truncated" else data)
    assert "truncated or altered" in refusal(path)


def test_model_that_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "linear.onnx").write_bytes(b"not a network")
    assert "cannot read it" in refusal(write_engine(tmp_path))


@pytest.mark.parametrize(
    ("fields", "fault"),
    [
        ({"colour": "red"}, "unknown field `colour`"),
        ({"sensor": {"sigma": 0.5}}, "unknown field `sensor.sigma`"),
        ({"c": 4}, "c must be odd, got 4"),
        ({"size_px": 12}, "size_px must be odd, got 12"),
        ({"scaling": "percent"}, "scaling: input should be 'full_scale' or 'peak'"),
        ({"detection_threshold": "NaN"}, "detection_threshold"),
        ({"onnx_sha256": "abc"}, "onnx_sha256"),
        ({"max_batch": 0}, "max_batch"),
    ],
)
def test_wrong_manifest_names_the_field(tmp_path: Path, fields: dict, fault: str) -> None:
    assert fault in refusal(write_engine(tmp_path, **fields))


def test_manifest_without_a_field_or_not_json(tmp_path: Path) -> None:
    path = write_engine(tmp_path)
    plain = json.loads(path.read_text())
    del plain["scaling"]
    path.write_text(json.dumps(plain))
    assert "field `scaling` is missing" in refusal(path)
    path.write_text('{"name": ')
    assert "invalid JSON" in refusal(path)


def test_model_of_another_c(tmp_path: Path) -> None:
    write_model(tmp_path / "linear.onnx", c=5)
    message = refusal(write_engine(tmp_path))
    assert "gives maps" in message and "55" in message and "33" in message


def test_model_of_another_patch_size(tmp_path: Path) -> None:
    assert "takes patches" in refusal(write_engine(tmp_path, size_px=13))


def test_unknown_backend(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"no `abacus`; use .*openvino_cpu"):
        load(str(write_engine(tmp_path)), FakeSensor(), backend="abacus")


def test_backend_whose_library_is_missing(tmp_path: Path, monkeypatch) -> None:
    def missing(name: str):
        if name.startswith("engines.backends."):
            raise ImportError("No module named 'openvino'")
        return import_module(name)

    monkeypatch.setattr(loader, "import_module", missing)
    with pytest.raises(EngineError, match=r"library is not installed.*openvino"):
        open_engine(write_engine(tmp_path))


# --- what is shipped -------------------------------------------------------------------------


def test_manifest_round_trip(tmp_path: Path) -> None:
    manifest = read_manifest(write_engine(tmp_path))
    manifest.write(tmp_path / "again.json")
    assert read_manifest(tmp_path / "again.json") == manifest
    assert Manifest.model_validate(manifest.model_dump(mode="json")) == manifest


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_engine_is_small_whole_and_without_traces(path: Path) -> None:
    manifest = read_manifest(path)
    model = path.with_suffix(".onnx")
    assert manifest.name == path.stem
    assert sha256_of(model) == manifest.onnx_sha256
    assert model.stat().st_size < 12_000_000
    graph = onnx.load(model).graph
    assert all(not node.metadata_props for node in graph.node)
    assert all(not tensor.external_data for tensor in graph.initializer)
