"""`trainer compile`: what it writes, what it refuses, and that it is all or nothing."""

import fcntl
import json
import os
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import onnx
import pytest
from conftest import BIN, assert_one_line_error
from onnx import numpy_helper

from engines.base import Options
from engines.errors import EngineError
from engines.loader import MODELS, open_engine, resolve
from engines.manifest import read_manifest, sha256_of
from pipeline.physics.sensor import Sensor
from trainer.aside import aside
from trainer.build import Wish
from trainer.compile import compile_model
from trainer.errors import TrainerError, TrainingFailed

SENSOR = Sensor(id="field", sigma_px=0.6, full_scale=16383, read_noise=6.0, gain=8.0)


def quiet(_: str) -> None:
    pass


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """A folder with one shipped portable model."""
    folder = tmp_path / "models"
    folder.mkdir()
    for suffix in (".onnx", ".json"):
        (folder / f"off_grid_any{suffix}").write_bytes(
            (MODELS / f"off_grid_any{suffix}").read_bytes()
        )
    return folder


def altered(models: Path, share: float) -> Path:
    """The model with its weights a little off, and a manifest that does not mind."""
    path = models / "off_grid_any.onnx"
    model = onnx.load(path)
    rng = np.random.default_rng(1)
    for tensor in model.graph.initializer:
        values = numpy_helper.to_array(tensor)
        if values.dtype == np.float32:
            noisy = values * (1.0 + share * rng.normal(size=values.shape)).astype(np.float32)
            tensor.CopyFrom(numpy_helper.from_array(noisy.astype(np.float32), tensor.name))
    return saved(model, path)


def saved(model: onnx.ModelProto, path: Path) -> Path:
    """Written over another, whose manifest is made to fit."""
    onnx.save(model, path)
    plain = json.loads(path.with_suffix(".json").read_text())
    plain["onnx_sha256"] = sha256_of(path)
    path.with_suffix(".json").write_text(json.dumps(plain))
    return path


@pytest.mark.parametrize("target", ["openvino", "torch"])
def test_a_build_says_what_it_is_and_how_good(models: Path, target: str) -> None:
    portable = models / "off_grid_any.onnx"
    wish = Wish(target, "f32", threads=1, batch=4, max_batch=4, patches=100)
    made, (candidate,) = compile_model(portable, wish, models, quiet)
    path = models / f"off_grid_any.{target}.json"
    assert read_manifest(path) == made == candidate.manifest
    build = made.build
    assert build is not None and build.target == target and build.precision == "f32"
    assert build.library.startswith(f"{target} ") and build.device
    assert (build.batch.best, build.batch.most, made.max_batch) == (4, 4, 4)
    assert build.parity is not None and build.parity.error < 1e-4
    assert build.parity.loss == pytest.approx(0.0, abs=1e-3)
    assert build.parity.sigma_px in (0.4, 0.5, 1.2)
    assert [found.batch for found in build.latency] == [1, 4, 64]
    assert all(0.0 < found.p50_ms <= found.p99_ms for found in build.latency)
    assert made.engine_id != read_manifest(portable.with_suffix(".json")).engine_id
    patch = np.random.default_rng(2).random((9, 2, 11, 11), np.float32)
    told = Options(sigma_px=0.7)
    portable_engine = open_engine(portable.with_suffix(".json"), options=told)
    with open_engine(path, options=told) as built, portable_engine as plain:
        np.testing.assert_allclose(built.infer(patch), plain.infer(patch), atol=1e-3)
    assert sorted(file.name for file in models.iterdir() if file.name[0] == ".") == []


def test_the_default_is_the_build_this_machine_runs(models: Path) -> None:
    portable = models / "off_grid_any.onnx"
    assert resolve("default", SENSOR, models).stem == "off_grid_any"
    wish = Wish("openvino", "f32", threads=1, batch=4, max_batch=4, patches=100)
    compile_model(portable, wish, models, quiet)
    assert resolve("default", SENSOR, models).stem == "off_grid_any.openvino"
    plain = json.loads((models / "off_grid_any.openvino.json").read_text())
    plain["build"] |= {"target": "tensorrt", "library": "tensorrt 10.9.0"}
    (models / "off_grid_any.openvino.json").write_text(json.dumps(plain))
    assert resolve("default", SENSOR, models).stem == "off_grid_any"  # no TensorRT here


@pytest.mark.parametrize(
    ("share", "fragment"), [(0.2, "CSO-mAP"), (0.002, "maps differ")], ids=["far", "near"]
)
def test_an_engine_that_is_worse_is_not_written(models: Path, share: float, fragment: str) -> None:
    before = sorted(file.name for file in models.iterdir())
    wish = Wish("openvino", "f32", threads=1, batch=4, max_batch=4, patches=400)
    with pytest.raises(TrainingFailed, match=f"{fragment}.*nothing was written"):
        compile_model(altered(models, share), wish, models, quiet)
    assert sorted(file.name for file in models.iterdir()) == before


def test_an_engine_is_compared_wherever_its_sensors_may_be(models: Path) -> None:
    path = models / "off_grid_any.onnx"
    model = onnx.load(path)
    for node in model.graph.node:
        node.input[:] = ["bounded" if name == "sigma_px" else name for name in node.input]
    bound = numpy_helper.from_array(np.array([0.6], np.float32), "bound")
    model.graph.initializer.append(bound)
    model.graph.node.insert(0, onnx.helper.make_node("Min", ["sigma_px", "bound"], ["bounded"]))
    wish = Wish("openvino", "f32", threads=1, batch=4, max_batch=4, patches=400)
    with pytest.raises(TrainingFailed, match=r"lower.*at σ 1.2 px") as refused:
        compile_model(saved(model, path), wish, models, quiet)
    assert "σ 0.4" not in str(refused.value) and "σ 0.5" not in str(refused.value)


def test_what_is_built_already_is_not_built_again(models: Path) -> None:
    wish = Wish("openvino", "f32", threads=1, batch=4, max_batch=4, patches=100)
    compile_model(models / "off_grid_any.onnx", wish, models, quiet)
    with pytest.raises(TrainerError, match="is built for openvino already"):
        compile_model(models / "off_grid_any.openvino.onnx", wish, models, quiet)


def test_a_torch_program_needs_the_weights(models: Path, monkeypatch) -> None:
    monkeypatch.setattr("trainer.parity.WEIGHTS", models)
    with pytest.raises(TrainerError, match=r"put off_grid_any.pt of `trainer export` beside it"):
        compile_model(
            models / "off_grid_any.onnx", Wish("torch", "f32", patches=100), models, quiet
        )


def test_one_process_compiles_in_a_folder(models: Path) -> None:
    held = os.open(models, os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)
    try:
        with pytest.raises(TrainerError, match="another process is writing there"):
            compile_model(models / "off_grid_any.onnx", Wish("openvino", "f32"), models, quiet)
    finally:
        os.close(held)


def test_a_truncated_model_is_refused(models: Path) -> None:
    path = models / "off_grid_any.onnx"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(EngineError, match="truncated or altered"):
        compile_model(path, Wish("openvino"), models, quiet)


def test_a_killed_compilation_leaves_what_was_there(models: Path) -> None:
    words = [BIN / "trainer", "compile", models / "off_grid_any.onnx", "--target", "openvino"]
    process = subprocess.Popen([*map(str, words), "--precision", "f32"], stderr=subprocess.DEVNULL)
    aside = models / ".off_grid_any.openvino.part"
    until = time.monotonic() + 90.0
    while not list(aside.glob("*/*.onnx")):
        assert time.monotonic() < until and process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert aside.is_dir()  # it was in the midst of it
    assert sorted(file.name for file in models.glob("*.*") if file.name[0] != ".") == [
        "off_grid_any.json",
        "off_grid_any.onnx",
    ]
    wish = Wish("openvino", "f32", threads=1, batch=4, max_batch=4, patches=100)
    compile_model(models / "off_grid_any.onnx", wish, models, quiet)
    assert not aside.exists()
    assert (models / "off_grid_any.openvino.json").is_file()


@pytest.mark.parametrize(
    ("words", "fragments"),
    [
        (["missing.onnx", "--target", "openvino"], ["missing.onnx: no such model"]),
        (["off_grid_any.onnx", "--target", "torch", "--precision", "int8"], ["--precision int8"]),
        (["off_grid_any.onnx", "--target", "abacus"], ["abacus"]),
    ],
)
def test_a_mistake_is_one_line(command, models: Path, words, fragments) -> None:
    result = command("trainer", "compile", models / words[0], *words[1:])
    assert_one_line_error(result, *fragments)


def test_the_command_tells_what_it_tried_and_chose(command, models: Path, tmp_path: Path) -> None:
    result = command(
        *("trainer", "compile", models / "off_grid_any.onnx", "--target", "openvino"),
        *("--precision", "f32", "--max-batch", "8", "--out", tmp_path / "built"),
    )
    assert result.returncode == 0, result.stderr
    assert "chosen" in result.stdout and "off_grid_any.openvino.json" in result.stdout
    assert "CSO-mAP" in result.stderr
    assert (tmp_path / "built" / "off_grid_any.openvino.onnx").is_file()


def test_a_second_compilation_leaves_the_first_alone(models: Path) -> None:
    with aside(models, "a") as folder:
        (folder / "half.onnx").write_bytes(b"half")
        with pytest.raises(TrainerError, match="another process"), aside(models, "a"):
            pass
        assert (folder / "half.onnx").is_file()
    assert not folder.exists()
