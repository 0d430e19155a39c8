"""Building engines with the real TensorRT-RTX, which needs no GPU; and with it in TensorRT's place.

`tensorrt` itself cannot be tested without a GPU. `tensorrt_rtx` has the same interface, so it takes
its place here with a driver of our own, for the timing cache and what is written of the GPU.
"""

import hashlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from fake_cuda import FakeCuda
from onnx import TensorProto, helper
from test_precision import inputs

from engines.build import Batch
from engines.cuda.driver import gpu
from engines.errors import EngineError
from engines.loader import MODELS, open_engine
from engines.manifest import read_manifest, sha256_of
from engines.tensorrt_log import logger
from trainer.errors import TrainerError, TrainingFailed
from trainer.int8 import quantized
from trainer.precision import read_model, with_precision
from trainer.targets.tensorrt import ANY_RTX, build
from trainer.targets.timing_cache import timing_cache

trt = pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed")
BATCH = Batch(best=16, most=64)
pytestmark = pytest.mark.filterwarnings("ignore:.*no-ops in TensorRT-RTX:DeprecationWarning")


def in_precision(name: str, precision: str) -> bytes:
    model = read_model(MODELS / f"{name}.onnx")
    if precision == "int8":
        model, precision = quantized(model, inputs(name, 64)), "f16"
    return (model if precision == "f32" else with_precision(model, precision)).SerializeToString()


def quiet(line: str) -> None:
    pass


def build_rtx(onnx_bytes: bytes, out: Path, progress=quiet):
    return build(
        onnx_bytes, out, BATCH, library="tensorrt_rtx", optimisation_level=3, progress=progress
    )


@pytest.mark.parametrize("precision", ["f32", "f16", "bf16", "int8"])
def test_rtx_builds_the_shipped_network(tmp_path: Path, precision: str) -> None:
    said: list[str] = []
    facts = build_rtx(in_precision("off_grid", precision), tmp_path / "a.engine", said.append)
    assert facts == (f"tensorrt_rtx {trt.__version__}", ANY_RTX, None, None, 3, None)
    assert [path.name for path in tmp_path.iterdir()] == ["a.engine"]
    assert (tmp_path / "a.engine").stat().st_size > 300_000
    assert said and all("steps)" in line for line in said)


@pytest.mark.parametrize("precision", ["f16", "int8"])
@pytest.mark.parametrize("name", ["off_grid_any", "dista_net"])
def test_rtx_builds_the_other_shipped_networks(tmp_path: Path, name: str, precision: str) -> None:
    build_rtx(in_precision(name, precision), tmp_path / "a.engine")
    assert (tmp_path / "a.engine").stat().st_size > 300_000


def test_the_command_builds_without_a_gpu_and_the_engine_is_refused_here(
    command, tmp_path: Path
) -> None:
    result = command(
        *("trainer", "compile", MODELS / "off_grid.onnx", "--target", "tensorrt-rtx"),
        *("--precision", "int8", "--max-batch", 32, "--out", tmp_path),
    )
    assert result.returncode == 0, result.stderr
    path = tmp_path / "off_grid.tensorrt-rtx.json"
    manifest = read_manifest(path)
    made = manifest.build
    assert made is not None and made.target == "tensorrt-rtx" and made.precision == "int8"
    assert made.model_sha256 == sha256_of(path.with_suffix(".engine"))
    assert made.library == f"tensorrt_rtx {trt.__version__}" and made.device == ANY_RTX
    assert (made.batch.least, made.batch.best, made.batch.most) == (1, 16, 32)
    assert manifest.max_batch == 32
    assert manifest.onnx_sha256 == read_manifest(MODELS / "off_grid.json").onnx_sha256
    if no_gpu():
        assert made.parity is None and not made.latency
        with pytest.raises(EngineError, match=r"off_grid.tensorrt-rtx.json: .*(NVIDIA|CUDA)"):
            open_engine(path)


def no_gpu() -> bool:
    try:
        gpu(0)
    except EngineError:
        return True
    return False


def test_half_precision_makes_a_smaller_engine(tmp_path: Path) -> None:
    """By about half of the weights."""
    sizes = {}
    for precision in ("f32", "f16"):
        build_rtx(in_precision("off_grid", precision), tmp_path / precision)
        sizes[precision] = (tmp_path / precision).stat().st_size
    assert sizes["f32"] - sizes["f16"] > 0.4 * (MODELS / "off_grid.onnx").stat().st_size


def bad_model() -> bytes:
    graph = helper.make_graph(
        [helper.make_node("Unheard", ["patch"], ["map"], name="odd", domain="nowhere")],
        "bad",
        [helper.make_tensor_value_info("patch", TensorProto.FLOAT, ["batch", 11, 11])],
        [helper.make_tensor_value_info("map", TensorProto.FLOAT, ["batch", 11, 11])],
    )
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("nowhere", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()


@pytest.mark.parametrize(
    ("given", "fault"),
    [(bad_model, "node odd (Unheard): "), (lambda: b"not a network", "cannot take the model: ")],
)
def test_model_it_cannot_parse_is_told_in_one_line(tmp_path: Path, given, fault: str) -> None:
    with pytest.raises(TrainerError) as caught:
        build_rtx(given(), tmp_path / "a.engine")
    assert fault in str(caught.value) and "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_model_it_cannot_build(tmp_path: Path) -> None:
    """A batch the graph has no room for: the error is the logger's."""
    graph = helper.make_graph(
        [helper.make_node("Reshape", ["patch", "shape"], ["map"])],
        "narrow",
        [helper.make_tensor_value_info("patch", TensorProto.FLOAT, ["batch", 4])],
        [helper.make_tensor_value_info("map", TensorProto.FLOAT, [3, 4])],
        [onnx.numpy_helper.from_array(np.array([3, 4]), "shape")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    with pytest.raises(TrainingFailed, match=r"no engine was built \(.{20,}\)") as caught:
        build_rtx(model.SerializeToString(), tmp_path / "a.engine")
    assert "\n" not in str(caught.value)
    assert not logger(trt).said


STOPPED = """
import signal, sys
from pathlib import Path
from test_compile_tensorrt import build_rtx, in_precision

def interrupted(line):
    print(line)
    signal.raise_signal(signal.SIGINT)

def gone(line):
    raise BrokenPipeError(line)

by = {"int": (interrupted, KeyboardInterrupt), "pipe": (gone, BrokenPipeError)}
progress, error = by[sys.argv[1]]
try:
    build_rtx(in_precision("off_grid", "f32"), Path(sys.argv[2]), progress)
except error as stopped:
    print("stopped", stopped)
"""


@pytest.mark.parametrize(("by", "said"), [("int", "steps)\nstopped"), ("pipe", "stopped ")])
def test_a_build_can_be_stopped_and_writes_nothing(tmp_path: Path, by: str, said: str) -> None:
    # In a process of its own: stopped in one that has loaded torch and OpenVINO, too, the library
    # sometimes takes the whole process with it.
    result = subprocess.run(
        [sys.executable, "-c", STOPPED, by, str(tmp_path / "a.engine")],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert said in result.stdout and "steps" in result.stdout, result.stderr
    assert not list(tmp_path.iterdir())


def test_library_is_not_installed(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    with pytest.raises(EngineError, match="tensorrt_rtx is not installed"):
        build_rtx(b"", tmp_path / "a.engine")


# --- TensorRT itself: a GPU and a timing cache -------------------------------------------------


def build_cuda(out: Path, cache: Path, progress=quiet):
    model = read_model(MODELS / "off_grid.onnx").SerializeToString()
    return build(
        model,
        out,
        BATCH,
        library="tensorrt",
        optimisation_level=2,
        cache=cache,
        progress=progress,
    )


@pytest.fixture
def stood_in(monkeypatch) -> FakeCuda:
    monkeypatch.setitem(sys.modules, "tensorrt", trt)
    fake = FakeCuda()
    fake.install(monkeypatch)
    return fake


def test_tensorrt_says_for_which_gpu(stood_in: FakeCuda, tmp_path: Path) -> None:
    facts = build_cuda(tmp_path / "a.engine", tmp_path / "cache")
    (timings,) = (tmp_path / "cache").glob("*.timings")
    assert timings.stem == f"{trt.__version__}-NVIDIA_Fake"
    assert facts == (
        f"tensorrt {trt.__version__}",
        "NVIDIA Fake",
        "8.6",
        "13.0",
        2,
        hashlib.sha256(timings.read_bytes()).hexdigest(),
    )
    again = build_cuda(tmp_path / "b.engine", tmp_path / "cache")
    assert again.timing_cache_sha256 is not None


def test_tensorrt_needs_a_gpu(stood_in: FakeCuda, tmp_path: Path, monkeypatch) -> None:
    stood_in.fail["cuInit"] = 100
    with pytest.raises(EngineError, match="builds on the GPU it is for, `--target tensorrt-rtx`"):
        build_cuda(tmp_path / "a.engine", tmp_path / "cache")
    assert not list(tmp_path.iterdir())


def test_timing_cache_of_nonsense_is_begun_anew(stood_in: FakeCuda, tmp_path: Path) -> None:
    build_cuda(tmp_path / "a.engine", tmp_path / "cache")
    (timings,) = (tmp_path / "cache").glob("*.timings")
    timings.write_bytes(b"nonsense")
    build_cuda(tmp_path / "a.engine", tmp_path / "cache")
    assert timings.read_bytes() != b"nonsense"


KILLED = """
import sys, time
from pathlib import Path
import pytest, tensorrt_rtx, warnings
from fake_cuda import FakeCuda
import test_compile_tensorrt as tests
warnings.simplefilter("ignore")
with pytest.MonkeyPatch.context() as patch:
    patch.setitem(sys.modules, "tensorrt", tensorrt_rtx)
    FakeCuda().install(patch)
    def tell(line):
        print(line, flush=True)
        time.sleep(60.0)
    tests.build_cuda(Path(sys.argv[1]), Path(sys.argv[2]), tell)
"""


def test_killed_half_way_leaves_the_timing_cache_whole(stood_in: FakeCuda, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    known = build_cuda(tmp_path / "first.engine", cache).timing_cache_sha256
    out = tmp_path / "second.engine"
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(out), str(cache)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parent,
    )
    assert process.stdout is not None
    assert "steps)" in process.stdout.readline()  # it is building, and holds the cache
    process.send_signal(signal.SIGKILL)
    process.wait(10.0)
    process.stdout.close()
    (timings,) = cache.glob("*.timings")
    assert hashlib.sha256(timings.read_bytes()).hexdigest() == known
    assert not out.exists()
    said: list[str] = []
    build_cuda(out, cache, said.append)
    assert out.exists() and not [line for line in said if "waiting" in line]


HOLDS = """
import sys, time
from pathlib import Path
from trainer.targets.timing_cache import timing_cache
with timing_cache(Path(sys.argv[1]), print) as timings:
    print("held", flush=True)
    time.sleep(0.5)
    timings.replace(b"theirs")
"""


def test_second_compilation_waits_for_the_first(tmp_path: Path) -> None:
    path = tmp_path / "a.timings"
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDS, str(path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    said: list[str] = []
    with timing_cache(path, said.append) as timings:
        assert timings.held == b"theirs"
        assert timings.replace(b"ours") == hashlib.sha256(b"ours").hexdigest()
    assert said == [f"waiting for another compilation, which holds {path}"]
    process.wait(10.0)
    process.stdout.close()
    assert path.read_bytes() == b"ours"
