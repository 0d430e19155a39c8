"""What every backend promises, by its file: the same tests run on each that can run here."""

import json
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from linear_engine import MAX_BATCH, SIZE, C, patches, weights, write_engine

from engines.backends import torch_program
from engines.base import IN_FLIGHT, Engine, Options
from engines.build import BACKEND, SUFFIX, Batch, Build
from engines.errors import EngineError
from engines.loader import available_backends, open_engine
from engines.manifest import sha256_of


def as_built(manifest: Path, target: str, model: Path, library: str, **fields: object) -> Path:
    """The same engine, its model built for a target."""
    build = Build(
        target=target,
        model_sha256=sha256_of(model),
        library=library,
        **{"precision": "f32", "device": "this one", "batch": Batch(best=8, most=16)} | fields,
    )
    plain = json.loads(manifest.read_text()) | {"build": build.model_dump(mode="json")}
    path = model.with_suffix(".json")
    path.write_text(json.dumps(plain))
    return path


def portable(folder: Path) -> Path:
    return write_engine(folder)


def openvino_build(folder: Path) -> Path:
    manifest = write_engine(folder)
    model = folder / "linear.openvino.onnx"
    model.write_bytes(manifest.with_suffix(".onnx").read_bytes())
    return as_built(manifest, "openvino", model, "openvino 2026.4.1", threads=1)


class Linear(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("w", torch.from_numpy(weights()))

    def forward(self, patch: torch.Tensor) -> torch.Tensor:
        return (patch.flatten(1) @ self.w).unflatten(1, (C * SIZE, C * SIZE))


def torch_build(folder: Path, library: str = f"torch {torch.__version__}") -> Path:
    model = folder / "linear.torch.pt2"
    batch = {0: torch.export.Dim("batch", min=1, max=4096)}
    example = (torch.zeros(2, SIZE, SIZE),)
    torch.export.save(torch.export.export(Linear(), example, dynamic_shapes=(batch,)), model)
    return as_built(write_engine(folder), "torch", model, library)


RUN_HERE = {
    "openvino_cpu": openvino_build,
    "openvino_cpu, portable": portable,
    "torch_program": torch_build,
}


@pytest.fixture(params=RUN_HERE)
def engine(request, tmp_path: Path):
    with open_engine(RUN_HERE[request.param](tmp_path)) as opened:
        yield opened


def expected(patch: np.ndarray) -> np.ndarray:
    return (patch.reshape(-1, SIZE**2) @ weights()).reshape(-1, C * SIZE, C * SIZE)


def test_every_target_has_a_backend_and_a_file_name() -> None:
    assert set(BACKEND) == set(SUFFIX)
    assert set(BACKEND.values()) >= set(available_backends())


@pytest.mark.parametrize("number", [0, 1, MAX_BATCH, MAX_BATCH + 1, 3 * MAX_BATCH - 1])
def test_maps_of_any_number_of_patches(engine: Engine, number: int) -> None:
    patch = patches(number)
    found = engine.infer(patch)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected(patch), atol=1e-5)


def test_maps_are_the_callers_own(engine: Engine) -> None:
    patch = patches(2)
    before = patch.copy()
    first = engine.infer(patch)
    kept = first.copy()
    second = engine.infer(patch + 1.0)
    np.testing.assert_array_equal(first, kept)  # a later call does not write into it
    second[:] = 0.0  # and writing into one does not reach the engine
    np.testing.assert_array_equal(engine.infer(patch), kept)
    np.testing.assert_array_equal(patch, before)


def test_patches_need_not_be_contiguous(engine: Engine) -> None:
    patch = patches(4)
    np.testing.assert_array_equal(engine.infer(patch[::-1])[::-1], engine.infer(patch))


def test_patches_may_be_read_only(tmp_path: Path) -> None:
    patch = patches(4)
    patch.flags.writeable = False
    with open_engine(portable(tmp_path)) as engine:
        for _ in range(IN_FLIGHT):
            engine.submit(patch)
        for _ in range(IN_FLIGHT):
            np.testing.assert_allclose(engine.result(), expected(patch), atol=1e-5)


@pytest.mark.parametrize(
    "patch",
    [
        np.zeros((2, SIZE, SIZE)),
        np.zeros((2, SIZE + 2, SIZE), np.float32),
        np.zeros((SIZE, SIZE), np.float32),
    ],
)
def test_wrong_patches_are_refused(engine: Engine, patch: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"float32 \(B, 11, 11\)"):
        engine.infer(patch)


def test_closed_engine_does_not_infer(engine: Engine) -> None:
    engine.close()
    engine.close()
    with pytest.raises(RuntimeError, match="closed"):
        engine.infer(patches(1))


def test_maps_are_written_where_the_caller_wants_them(engine: Engine) -> None:
    out = np.full((3, C * SIZE, C * SIZE), np.nan, np.float32)
    assert engine.infer(patches(3), out) is out
    np.testing.assert_allclose(out, expected(patches(3)), atol=1e-5)


@pytest.mark.parametrize(
    "out",
    [
        np.empty((2, C * SIZE, C * SIZE), np.float32),
        np.empty((3, C * SIZE, C * SIZE)),
        np.empty((3, C * SIZE, 2 * C * SIZE), np.float32)[..., ::2],
    ],
)
def test_maps_do_not_go_where_they_do_not_fit(engine: Engine, out: np.ndarray) -> None:
    with pytest.raises(ValueError, match="out must be"):
        engine.infer(patches(3), out)


def test_results_come_in_the_order_of_what_was_submitted(engine: Engine) -> None:
    batches = [patches(size) * size for size in (3, 1, MAX_BATCH, 2)]
    found = []
    for number, batch in enumerate(batches):
        if number >= IN_FLIGHT:
            found.append(engine.result())
        engine.submit(batch)
    found += [engine.result() for _ in range(IN_FLIGHT)]
    for maps, batch in zip(found, batches, strict=True):
        np.testing.assert_allclose(maps, expected(batch), rtol=1e-5, atol=1e-5)


def test_no_more_is_in_flight_than_there_is_room_for(engine: Engine) -> None:
    with pytest.raises(RuntimeError, match="nothing was submitted"):
        engine.result()
    for _ in range(IN_FLIGHT):
        engine.submit(patches(2))
    with pytest.raises(RuntimeError, match="in flight"):
        engine.submit(patches(2))
    with pytest.raises(RuntimeError, match="before inferring"):
        engine.infer(patches(2))
    for _ in range(IN_FLIGHT):
        engine.result()
    np.testing.assert_allclose(engine.infer(patches(2)), expected(patches(2)), atol=1e-5)


@pytest.mark.parametrize("number", [0, MAX_BATCH + 1])
def test_a_batch_too_large_or_empty_is_not_submitted(engine: Engine, number: int) -> None:
    with pytest.raises(ValueError, match="use infer"):
        engine.submit(patches(number))


def test_a_program_of_another_release_of_torch_is_refused(tmp_path: Path) -> None:
    path = torch_build(tmp_path, "torch 1.13.1")
    with pytest.raises(EngineError, match=r"built for torch 1.13, here is torch .*trainer compile"):
        open_engine(path)


def test_a_graph_of_more_patches_than_it_is_given(monkeypatch) -> None:
    """No GPU here: what would be recorded is kept, and run again by `replay`."""

    def recorded(queue, stream):
        queue()
        return SimpleNamespace(replay=queue)

    monkeypatch.setattr(torch_program, "_recorded", recorded)
    waited = SimpleNamespace(synchronize=lambda: None)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: waited)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    graph = torch_program._Graph(Linear(), (SIZE, SIZE), 8, torch.device("cpu"))
    for number in (8, 3, 1):
        maps = graph.launch(torch.from_numpy(patches(number))).wait()
        assert len(maps) == 8
        np.testing.assert_allclose(maps[:number].numpy(), expected(patches(number)), atol=1e-5)


def test_a_program_others_can_write_to_is_refused(tmp_path: Path) -> None:
    path = torch_build(tmp_path)
    model = path.with_suffix(".pt2")
    model.chmod(0o664)
    with pytest.raises(EngineError, match=r"linear.torch.pt2: can be written to by others.*chmod"):
        open_engine(path)
    model.chmod(0o644)
    tmp_path.chmod(0o777)
    with pytest.raises(EngineError, match="can be written to by others"):
        open_engine(path)


def test_a_file_that_is_no_program_is_refused(tmp_path: Path) -> None:
    model = tmp_path / "linear.torch.pt2"
    model.write_bytes(b"no zip archive")
    path = as_built(write_engine(tmp_path), "torch", model, f"torch {torch.__version__}")
    with pytest.raises(EngineError, match=r"linear.torch.pt2: torch .* cannot read it"):
        open_engine(path)


def test_a_program_of_other_shapes_is_refused(tmp_path: Path) -> None:
    path = torch_build(tmp_path)
    plain = json.loads(path.read_text()) | {"c": 5}
    path.write_text(json.dumps(plain))
    with pytest.raises(EngineError, match="its manifest says so"):
        open_engine(path)


def test_a_precision_the_cpu_would_only_imitate_is_refused(tmp_path: Path, monkeypatch) -> None:
    path = openvino_build(tmp_path)
    plain = json.loads(path.read_text())
    plain["build"]["precision"] = "bf16"
    path.write_text(json.dumps(plain))
    core = pytest.importorskip("engines.backends.openvino_cpu").openvino.Core
    monkeypatch.setattr(core, "get_property", lambda *_: ["FP32", "INT8"])
    with pytest.raises(EngineError, match=r"precision bf16: this CPU has no .*trainer compile"):
        open_engine(path)


def test_a_build_does_not_run_on_another_backend(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="built for openvino, not for backend torch_program"):
        open_engine(openvino_build(tmp_path), "torch_program")


def test_an_error_in_one_part_does_not_hold_up_the_next_call(engine: Engine, monkeypatch) -> None:
    finish, calls = engine._finish, []

    def failing(slot: int, maps: np.ndarray) -> None:
        calls.append(slot)
        finish(slot, maps)
        if len(calls) == 1:
            raise RuntimeError("once")

    monkeypatch.setattr(engine, "_finish", failing)
    with pytest.raises(RuntimeError, match="once"):
        engine.infer(patches(3 * MAX_BATCH))
    np.testing.assert_allclose(engine.infer(patches(3)), expected(patches(3)), atol=1e-5)


several_cores = pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one core, one lane")


def affinity_of_threads() -> list[set[int]]:
    return [os.sched_getaffinity(int(task.name)) for task in Path("/proc/self/task").iterdir()]


@several_cores
def test_each_lane_stays_on_its_core_and_whoever_calls_goes_where_it_likes(tmp_path: Path) -> None:
    cores = os.sched_getaffinity(0)
    with open_engine(portable(tmp_path)) as engine:
        assert [lane.core for lane in engine._lanes] == sorted(cores)[:MAX_BATCH]
        assert os.sched_getaffinity(0) == cores
        for core in cores:
            assert {core} in affinity_of_threads()


@several_cores
def test_fewer_threads_than_cores_are_one_lane_that_may_run_anywhere(tmp_path: Path) -> None:
    with open_engine(portable(tmp_path), options=Options(threads=1)) as engine:
        assert [lane.core for lane in engine._lanes] == [None]


@several_cores
def test_a_network_compiled_after_lanes_still_has_all_cores(tmp_path: Path) -> None:
    """OpenVINO counts them once a process: not while this one is on the core of a lane."""
    count = f"""
from pathlib import Path
import openvino
from engines.loader import open_engine
open_engine(Path({str(portable(tmp_path))!r}))
whole = openvino.compile_model({str(tmp_path / "linear.onnx")!r}, "CPU", {{"NUM_STREAMS": 1}})
print(whole.get_property("INFERENCE_NUM_THREADS"))
"""
    told = subprocess.run([sys.executable, "-c", count], capture_output=True, text=True, check=True)
    assert int(told.stdout) == len(os.sched_getaffinity(0))


def test_signals_are_handled_after_engines_end_in_the_order_they_began(tmp_path: Path) -> None:
    """OpenVINO's plugins set the stack for that, and the second set that of the first again."""
    end = f"""
import signal
from pathlib import Path
from engines.loader import open_engine
engines = [open_engine(Path({str(portable(tmp_path))!r})) for _ in range(2)]
for engine in engines:
    engine.close()
signal.signal(signal.SIGTERM, lambda *_: print("handled"))
signal.raise_signal(signal.SIGTERM)
"""
    told = subprocess.run([sys.executable, "-c", end], capture_output=True, text=True)
    assert (told.returncode, told.stdout) == (0, "handled\n"), told.stderr


@several_cores
def test_a_lane_that_fails_leaves_no_other_reading_the_patches(tmp_path: Path, monkeypatch) -> None:
    with open_engine(portable(tmp_path)) as engine:
        waited = []

        def failing(slot: int, patch: np.ndarray) -> None:
            raise RuntimeError("no memory")

        for lane in engine._lanes[1:]:
            monkeypatch.setattr(lane, "begin", failing)
        first = engine._lanes[0]
        monkeypatch.setattr(first, "core", -1)  # on no core, so the first to begin
        wait = first.wait
        monkeypatch.setattr(first, "wait", lambda slot: (waited.append(slot), wait(slot)))
        with pytest.raises(RuntimeError, match="no memory"):
            engine.submit(patches(8))
        assert waited == [0]
        monkeypatch.undo()
        np.testing.assert_allclose(engine.infer(patches(8)), expected(patches(8)), atol=1e-5)
