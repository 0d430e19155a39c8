"""TensorRT's backends: on a CUDA and a TensorRT of our own, whose names the real one has."""

import inspect
import json
import sys
import threading
from pathlib import Path

import fake_tensorrt
import numpy as np
import pytest
from fake_cuda import FakeCuda
from linear_engine import weights, write_engine

from engines import loader
from engines.base import IN_FLIGHT, Engine, Options
from engines.build import Batch, Build
from engines.cuda import driver
from engines.errors import EngineError
from engines.loader import load, misfits, open_engine
from engines.manifest import read_manifest, sha256_of

SIZE, CELLS, MOST = 11, 33, 6
TARGETS = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
both = pytest.mark.parametrize("target", TARGETS)


@pytest.fixture
def fake(monkeypatch) -> FakeCuda:
    """A GPU with both libraries."""
    made = FakeCuda()
    made.install(monkeypatch)
    for name in TARGETS.values():
        monkeypatch.setitem(sys.modules, name, fake_tensorrt.module(made, name))
    return made


def built(folder: Path, target: str, facts: dict | bytes | None = None, **build: object) -> Path:
    """An engine and its manifest, with fields of `build` changed; the manifest's path."""
    plain = {
        "tensors": {"patch": [-1, SIZE, SIZE], "map": [-1, CELLS, CELLS]},
        "most": MOST,
        **(facts if isinstance(facts, dict) else {}),
    }
    model = folder / "linear.engine"
    model.write_bytes(facts if isinstance(facts, bytes) else json.dumps(plain).encode())
    fields = {
        "target": target,
        "model_sha256": sha256_of(model),
        "precision": "f16",
        "library": f"{TARGETS[target]} 11.0.0",
        "device": "NVIDIA Fake",
        "compute_capability": "8.6",
        "driver": "13.0",
        "batch": {"best": 4, "most": MOST},
        **build,
    }
    told = ["sigma_px"] if "sigma_px" in plain["tensors"] else []
    return write_engine(folder, max_batch=MOST, build=fields, conditions=told)


def patches(number: int, seed: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).random((number, SIZE, SIZE), np.float32)


def expected(patch: np.ndarray, sigma_px: float = 0.0) -> np.ndarray:
    rows = (2.0 * patch + np.float32(sigma_px)).reshape(len(patch), SIZE * SIZE)
    return np.stack([np.resize(row, (CELLS, CELLS)) for row in rows])


def refusal(path: Path, options: Options | None = None) -> str:
    with pytest.raises(EngineError) as caught:
        open_engine(path, options=options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- what it does ----------------------------------------------------------------------------


@both
@pytest.mark.parametrize("number", [1, 2, 3, MOST, MOST + 1, 3 * MOST - 1])
def test_maps_of_any_number_of_patches(
    fake: FakeCuda, tmp_path: Path, target: str, number: int
) -> None:
    with open_engine(built(tmp_path, target)) as engine:
        fake.calls.clear()
        patch = patches(number)
        np.testing.assert_array_equal(engine.infer(patch), expected(patch))
    counted = fake.counted()
    assert counted["cuGraphLaunch"] == -(-number // MOST)
    assert not {"cuMemAlloc", "cuMemHostAlloc", "cuGraphInstantiateWithFlags"} & set(counted)


@both
def test_batches_in_flight_keep_their_order(fake: FakeCuda, tmp_path: Path, target: str) -> None:
    with open_engine(built(tmp_path, target)) as engine:
        given = [patches(2 + n, seed=n) for n in range(IN_FLIGHT)]
        for patch in given:
            engine.submit(patch)
        assert "cuEventSynchronize" not in fake.calls[-4:]
        for patch in given:
            np.testing.assert_array_equal(engine.result(), expected(patch))


@both
def test_what_it_is_told_is_put_on_the_gpu_once(
    fake: FakeCuda, tmp_path: Path, target: str
) -> None:
    tensors = {"patch": [-1, SIZE, SIZE], "sigma_px": [1], "map": [-1, CELLS, CELLS]}
    path = built(tmp_path, target, {"tensors": tensors})
    with open_engine(path, options=Options(sigma_px=0.7)) as engine:
        for number in (1, 4):
            patch = patches(number)
            np.testing.assert_array_equal(engine.infer(patch), expected(patch, 0.7))
    assert fake.counted()["cuMemcpyHtoD"] == 1


@both
def test_two_engines_side_by_side_then_nothing_is_left(
    fake: FakeCuda, tmp_path: Path, target: str
) -> None:
    path = built(tmp_path, target)
    old, new = open_engine(path), open_engine(path)
    patch = patches(3)
    old.submit(patch)
    np.testing.assert_array_equal(new.infer(patch), expected(patch))
    old.close()  # with a batch in flight
    old.close()
    np.testing.assert_array_equal(new.infer(patch), expected(patch))
    with pytest.raises(RuntimeError, match="linear is closed"):
        old.submit(patch)
    new.close()
    assert not fake.memory and not fake.pinned and not fake.graphs and not fake.current
    assert fake.counted()["engine freed"] == 2
    assert fake.retained == 0


@both
def test_another_thread_can_neither_use_nor_close_it(
    fake: FakeCuda, tmp_path: Path, target: str
) -> None:
    engine = open_engine(built(tmp_path, target))
    caught: list[str] = []

    def attempt() -> None:
        for act in (lambda: engine.submit(patches(1)), engine.close):
            try:
                act()
            except EngineError as error:
                caught.append(str(error))

    thread = threading.Thread(target=attempt)
    thread.start()
    thread.join()
    assert len(caught) == 2 and all("belongs to the thread" in line for line in caught)
    np.testing.assert_array_equal(engine.infer(patches(2)), expected(patches(2)))
    engine.close()
    assert not fake.memory


# --- what it refuses -------------------------------------------------------------------------


@both
@pytest.mark.parametrize(
    ("fields", "here", "fault"),
    [
        ({"library": "{} 10.9.0"}, {}, "built for {} 10.9.0, here is {} 11.0.0"),
        ({"driver": "13.1"}, {}, "built with a driver for CUDA 13.1, here is 13.0"),
        ({}, {"gpus": 0}, "device 0: this machine has 0 GPUs"),
        ({}, {"fail": {"cuInit": 100}}, "no CUDA-capable device is detected"),
    ],
)
def test_another_machine(
    fake: FakeCuda, tmp_path: Path, target: str, fields: dict, here: dict, fault: str
) -> None:
    name = TARGETS[target]
    path = built(tmp_path, target, **{key: text.format(name) for key, text in fields.items()})
    for key, value in here.items():
        setattr(fake, key, value)
    message = refusal(path)
    assert fault.format(name, name) in message
    assert f"or run `trainer compile MODEL.onnx --target {target}` on the machine it" in message
    assert not fake.memory


@pytest.mark.parametrize(
    ("target", "fault"),
    [
        ("tensorrt", "built for compute capability 8.6, this NVIDIA Other has 9.0"),
        ("tensorrt-rtx", "runs on compute capability 8.6, 12.0, this NVIDIA Other has 9.0"),
    ],
)
def test_another_gpu(fake: FakeCuda, tmp_path: Path, target: str, fault: str) -> None:
    path = built(tmp_path, target)
    fake.name, fake.capability = "NVIDIA Other", (9, 0)
    assert fault in refusal(path)
    fake.capability = (7, 5)
    assert "has 7.5" in refusal(path)


def test_another_gpu_of_the_same_capability(fake: FakeCuda, tmp_path: Path) -> None:
    rtx = built(tmp_path, "tensorrt-rtx", device="any", compute_capability=None)
    fake.name = "NVIDIA Other"
    open_engine(rtx).close()
    assert "built for NVIDIA Fake, here is NVIDIA Other" in refusal(built(tmp_path, "tensorrt"))


@both
def test_no_driver(fake: FakeCuda, tmp_path: Path, target: str, monkeypatch) -> None:
    def missing() -> None:
        raise EngineError("no NVIDIA driver is installed here (libcuda.so.1: …)")

    monkeypatch.setattr(driver, "_driver", missing)
    assert "no NVIDIA driver is installed here" in refusal(built(tmp_path, target))


@both
def test_library_is_not_installed(fake: FakeCuda, tmp_path: Path, target: str, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, TARGETS[target], None)
    assert f"{TARGETS[target]} is not installed" in refusal(built(tmp_path, target))


@both
@pytest.mark.parametrize(
    ("facts", "fault"),
    [
        (
            {"tensors": {"patch": [-1, 13, 13], "map": [-1, 33, 33]}},
            "takes patches patch (-1, 13, 13), its manifest says float32 (-1, 11, 11)",
        ),
        (
            {"tensors": {"patch": [-1, 11, 11], "map": [-1, 55, 55]}},
            "gives maps map (-1, 55, 55), its manifest says float32 (-1, 33, 33)",
        ),
        ({"most": 4}, "takes 1 to 4 patches, its manifest says 1 to 6"),
        (b"not an engine", "cannot read it (IRuntime::deserializeCudaEngine: Error Code 1"),
        ({"broken": True}, "batch 1 does not run (IExecutionContext::enqueueV3: Error Code 1"),
    ],
)
def test_engine_that_is_not_what_its_manifest_says(
    fake: FakeCuda, tmp_path: Path, target: str, facts: dict | bytes, fault: str
) -> None:
    assert fault in refusal(built(tmp_path, target, facts))
    assert not fake.memory and not fake.pinned and not fake.graphs and not fake.current
    assert fake.retained == 0


@both
@pytest.mark.parametrize("batch", [-1, 1])
def test_of_a_network_that_takes_one_at_a_time_the_batch_may_be_fixed(
    fake: FakeCuda, tmp_path: Path, target: str, batch: int
) -> None:
    shapes = {"patch": [batch, SIZE, SIZE], "map": [batch, CELLS, CELLS]}
    path = built(tmp_path, target, {"tensors": shapes, "most": 1}, batch={"best": 1, "most": 1})
    if batch == 1:
        assert f"takes patches patch (1, {SIZE}, {SIZE}), its manifest says" in refusal(path)
    manifest = json.loads(path.read_text()) | {"max_batch": 1}
    path.write_text(json.dumps(manifest))
    with open_engine(path) as engine:
        np.testing.assert_array_equal(engine.infer(patches(3)), expected(patches(3)))


@both
def test_memory_is_full(fake: FakeCuda, tmp_path: Path, target: str) -> None:
    path = built(tmp_path, target)
    fake.fail["cuMemHostAlloc"] = 2
    assert "cuMemHostAlloc: out of memory (CUDA_ERROR_OUT_OF_MEMORY, 2)" in refusal(path)
    assert not fake.memory and fake.retained == 0


def test_device_that_is_not_there(fake: FakeCuda, tmp_path: Path) -> None:
    path = built(tmp_path, "tensorrt")
    assert "device 3: this machine has 1 GPUs" in refusal(path, Options(device=3))


@both
def test_portable_model(fake: FakeCuda, tmp_path: Path, target: str) -> None:
    with pytest.raises(EngineError, match=f"a portable model, .* --target {target}`"):
        open_engine(write_engine(tmp_path), loader.BACKEND[target])


@both
def test_file_that_others_can_write_to(fake: FakeCuda, tmp_path: Path, target: str) -> None:
    path = built(tmp_path, target)
    path.with_suffix(".engine").chmod(0o666)
    assert "can be written to by others" in refusal(path)


# --- the real library ------------------------------------------------------------------------


def test_names_used_here_are_those_of_the_real_library() -> None:
    trt = pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed")
    made = fake_tensorrt.module(FakeCuda(), "tensorrt_rtx")
    ours = {name: value for name, value in vars(made).items() if inspect.isclass(value)}
    for name, value in ours.items():
        real = getattr(trt, name)
        for attribute in vars(value):
            if not attribute.startswith("_") and attribute not in {"log"}:
                assert hasattr(real, attribute), f"{name}.{attribute}"
    assert trt.float32 == trt.DataType.FLOAT


def test_misfits_without_a_gpu_is_one_clear_line(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed")
    try:
        driver.gpu(0)
    except EngineError:
        pass
    else:
        pytest.skip("there is a GPU")
    path = built(tmp_path, "tensorrt-rtx")
    build = read_manifest(path).build
    assert build is not None
    (line,) = misfits(build)
    assert "NVIDIA" in line or "CUDA" in line
    assert line in refusal(path)


@both
def test_on_a_gpu_a_built_engine_gives_the_right_maps(tmp_path: Path, target: str) -> None:
    """The real libraries on a real GPU, where there is one that runs them."""
    from trainer.targets.tensorrt import build

    path = write_engine(tmp_path, max_batch=MOST)
    batch = Batch(best=4, most=MOST)
    model = path.with_suffix(".engine")
    try:
        driver.gpu(0)
        facts = build(
            path.with_suffix(".onnx").read_bytes(),
            model,
            batch,
            library=TARGETS[target],
            optimisation_level=3,
            progress=lambda line: None,
        )
    except EngineError as error:
        pytest.skip(str(error))
    made = Build(
        target=target,
        model_sha256=sha256_of(model),
        precision="f32",
        batch=batch,
        **facts._asdict(),
    )
    if unfit := misfits(made):
        pytest.skip(unfit[0])
    path = write_engine(tmp_path, max_batch=MOST, build=made.model_dump(mode="json"))
    with open_engine(path) as engine:
        for number in (1, 3, 4 * MOST + 1):
            patch = patches(number)
            wanted = (patch.reshape(number, -1) @ weights()).reshape(number, CELLS, CELLS)
            np.testing.assert_allclose(engine.infer(patch), wanted, atol=1e-4)


def test_default_passes_over_a_build_for_another_gpu(fake: FakeCuda, tmp_path: Path) -> None:
    class Sensor:
        sigma_px, full_scale, noiseless = 0.5, 255, True

    portable = write_engine(tmp_path, "plain")
    path = built(tmp_path, "tensorrt")
    path.with_suffix(".onnx").unlink()
    assert read_manifest(path).onnx_sha256 == read_manifest(portable).onnx_sha256
    for capability, name in (((8, 6), "linear"), ((9, 0), "plain")):
        fake.capability = capability
        engine: Engine = load("default", Sensor(), models=tmp_path)
        assert engine.manifest.name == name
        engine.close()
