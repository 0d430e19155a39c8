"""The buffers, streams and graphs of GPU engines: on a CUDA of our own, and on a GPU if one is."""

import ctypes
import sys
import threading

import numpy as np
import pytest
from fake_cuda import FakeCuda

from engines.base import IN_FLIGHT
from engines.cuda.context import Context
from engines.cuda.driver import call, gpu
from engines.cuda.lane import Lane, sizes_up_to
from engines.errors import EngineError

SHAPE, MOST = (11, 11), 6
ALLOCATIONS = ("cuMemAlloc", "cuMemHostAlloc", "cuStreamCreate", "cuEventCreate")

PTX = """
.version 6.4
.target sm_75
.address_size 64
.visible .entry twice_plus_one(.param .u64 given, .param .u64 made, .param .u32 number)
{
    .reg .pred %p<2>; .reg .f32 %f<3>; .reg .b32 %r<6>; .reg .b64 %rd<8>;
    ld.param.u64 %rd1, [given];
    ld.param.u64 %rd2, [made];
    ld.param.u32 %r2, [number];
    mov.u32 %r3, %ctaid.x;
    mov.u32 %r4, %ntid.x;
    mov.u32 %r5, %tid.x;
    mad.lo.s32 %r1, %r3, %r4, %r5;
    setp.ge.s32 %p1, %r1, %r2;
    @%p1 bra end;
    cvta.to.global.u64 %rd3, %rd1;
    mul.wide.s32 %rd4, %r1, 4;
    add.s64 %rd5, %rd3, %rd4;
    ld.global.f32 %f1, [%rd5];
    fma.rn.f32 %f2, %f1, 0f40000000, 0f3F800000;
    cvta.to.global.u64 %rd6, %rd2;
    add.s64 %rd7, %rd6, %rd4;
    st.global.f32 [%rd7], %f2;
end:
    ret;
}
"""
"""2 x + 1, for any GPU from compute capability 7.5; the driver compiles it."""


@pytest.fixture
def fake(monkeypatch) -> FakeCuda:
    made = FakeCuda()
    made.install(monkeypatch)
    return made


def twice_plus_one(fake: FakeCuda):
    """The kernel, on the CUDA of our own; and the batches it was queued for."""
    batches: list[int] = []

    def enqueue(stream: int, given: int, made: int, batch: int) -> None:
        batches.append(batch)
        number = batch * SHAPE[0] * SHAPE[1]
        given_, made_ = fake.floats(given, number), fake.floats(made, number)
        fake.queue(stream, lambda: np.copyto(made_, 2.0 * given_ + 1.0))

    return enqueue, batches


def lane(fake: FakeCuda, context: Context, most: int = MOST) -> Lane:
    with context:
        return Lane(context, twice_plus_one(fake)[0], SHAPE, SHAPE, most)


def patches(number: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).random((number, *SHAPE), np.float32)


@pytest.mark.parametrize(
    ("most", "sizes"), [(1, [1]), (2, [1, 2]), (6, [1, 2, 4, 6]), (16, [1, 2, 4, 8, 16])]
)
def test_sizes_in_use(most: int, sizes: list[int]) -> None:
    assert sizes_up_to(most) == sizes


def test_maps_of_every_number_of_patches(fake: FakeCuda) -> None:
    context = Context(0)
    made = lane(fake, context)
    for number in range(1, MOST + 1):
        patch, found = patches(number, number), np.empty((number, *SHAPE), np.float32)
        with context:
            made.begin(patch)
            made.finish(found)
        np.testing.assert_array_equal(found, 2.0 * patch + 1.0)


def test_a_batch_is_one_launch_and_allocates_nothing(fake: FakeCuda) -> None:
    context = Context(0)
    made = lane(fake, context)
    fake.calls.clear()
    with context:
        made.begin(patches(5))
        made.finish(np.empty((5, *SHAPE), np.float32))
    assert fake.calls == [
        "cuCtxPushCurrent",
        "cuGraphLaunch",
        "cuEventRecord",
        "cuEventSynchronize",
        "cuCtxPopCurrent",
    ]


def test_each_size_is_run_then_recorded_once_with_copies_around_the_work(fake: FakeCuda) -> None:
    context = Context(0)
    enqueue, batches = twice_plus_one(fake)
    with context:
        made = Lane(context, enqueue, SHAPE, SHAPE, 2)
        for _ in range(3):
            made.begin(patches(2))
            made.finish(np.empty((2, *SHAPE), np.float32))
    assert batches == [1, 1, 2, 2]
    way = ["cuMemcpyHtoDAsync", "cuMemcpyDtoHAsync"]
    size = [
        *way,
        "cuStreamSynchronize",
        "cuStreamBeginCapture_v2",
        *way,
        "cuStreamEndCapture",
        "cuGraphInstantiateWithFlags",
        "cuGraphDestroy",
    ]
    began = fake.calls.index("cuMemcpyHtoDAsync")
    assert fake.calls[began : began + 2 * len(size)] == 2 * size
    assert fake.counted()["cuGraphLaunch"] == 3
    counted = fake.counted()
    assert [counted[name] for name in ALLOCATIONS] == [2, 2, 1, 1]


def test_lanes_overlap(fake: FakeCuda) -> None:
    context = Context(0)
    lanes = [lane(fake, context) for _ in range(IN_FLIGHT)]
    given = [patches(4, seed) for seed in range(IN_FLIGHT)]
    with context:
        for made, patch in zip(lanes, given, strict=True):
            made.begin(patch)
        assert all(fake.streams[100 + n] for n in range(IN_FLIGHT))  # all queued, none waited for
        for made, patch in reversed(list(zip(lanes, given, strict=True))):
            found = np.empty_like(patch)
            made.finish(found)
            np.testing.assert_array_equal(found, 2.0 * patch + 1.0)


def test_all_is_freed_even_with_a_batch_in_flight(fake: FakeCuda) -> None:
    context = Context(0)
    made = lane(fake, context)
    with context:
        made.begin(patches(3))
        fake.calls.clear()
        made.close()
    context.close()
    assert fake.calls[1:3] == ["cuGraphExecDestroy"] * 2  # after a wait, before the buffers
    assert fake.calls[0] == "cuStreamSynchronize"
    assert not fake.memory and not fake.pinned and not fake.graphs
    assert not fake.current and fake.retained == 0


def test_a_lane_that_cannot_be_made_frees_what_it_had(fake: FakeCuda) -> None:
    context = Context(0)

    def enqueue(stream: int, given: int, made: int, batch: int) -> None:
        if batch == 4:
            raise EngineError("batch 4 is refused")

    with pytest.raises(EngineError, match="batch 4 is refused"), context:
        Lane(context, enqueue, SHAPE, SHAPE, MOST)
    assert not fake.memory and not fake.pinned and not fake.graphs and not fake.current


def test_a_failure_while_recording_ends_the_recording(fake: FakeCuda) -> None:
    context = Context(0)
    times = []

    def enqueue(stream: int, given: int, made: int, batch: int) -> None:
        times.append(batch)
        if len(times) == 2:
            context.cuda.mem_alloc(4)  # what a graph cannot hold

    words = r"cuMemAlloc: .*CAPTURE_UNSUPPORTED, 900\); the engine"
    with pytest.raises(EngineError, match=words), context:
        Lane(context, enqueue, SHAPE, SHAPE, MOST)
    assert not fake.recording and not fake.memory


@pytest.mark.parametrize(
    ("call", "code", "words"),
    [
        ("cuMemAlloc", 2, "cuMemAlloc: out of memory (CUDA_ERROR_OUT_OF_MEMORY, 2); the GPU's"),
        ("cuMemHostAlloc", 2, "cuMemHostAlloc: out of memory"),
        ("cuGraphLaunch", 700, "cuGraphLaunch: an illegal memory access was encountered (CUDA_"),
        ("cuEventSynchronize", 700, "(CUDA_ERROR_ILLEGAL_ADDRESS, 700); the engine wrote outside"),
        ("cuDevicePrimaryCtxRetain", 2, "cuDevicePrimaryCtxRetain: out of memory"),
    ],
)
def test_what_cuda_says_in_words(fake: FakeCuda, call: str, code: int, words: str) -> None:
    fake.fail[call] = code

    def run() -> None:
        context = Context(0)
        made = lane(fake, context)
        with context:
            made.begin(patches(1))
            made.finish(np.empty((1, *SHAPE), np.float32))

    with pytest.raises(EngineError) as caught:
        run()
    assert words in str(caught.value) and "\n" not in str(caught.value)
    assert not fake.current


def test_another_thread_is_refused(fake: FakeCuda) -> None:
    context = Context(0)
    caught = []

    def use() -> None:
        try:
            with context:
                pass
        except EngineError as error:
            caught.append(str(error))

    thread = threading.Thread(target=use, name="elsewhere")
    thread.start()
    thread.join()
    assert caught[0].startswith("used from thread elsewhere; a GPU engine belongs to the thread")


def test_gpu_is_named(fake: FakeCuda) -> None:
    assert gpu(0) == ("NVIDIA Fake", "8.6", "13.0")
    with pytest.raises(EngineError, match="device 1: this machine has 1 GPUs, from 0"):
        gpu(1)
    fake.fail["cuInit"] = 100
    with pytest.raises(EngineError, match=r"no CUDA-capable device is detected .*100\); is one"):
        gpu(0)


def test_without_pycuda(fake: FakeCuda, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "pycuda.driver", None)
    with pytest.raises(EngineError, match=r"pycuda is not installed .*irst-pipeline\[gpu\]"):
        Context(0)


def real_gpu() -> str | None:
    """Why the real one cannot be tested; None if it can."""
    try:
        gpu(0)
        import pycuda.driver  # noqa: F401
    except (EngineError, ImportError) as error:
        return str(error)
    return None


def test_on_a_gpu_with_a_kernel_of_its_own() -> None:
    if (reason := real_gpu()) is not None:
        pytest.skip(reason)
    most, context = 100, Context(0)
    with context:
        module, kernel = ctypes.c_void_p(), ctypes.c_void_p()
        call("cuModuleLoadData", ctypes.byref(module), PTX.encode())
        call("cuModuleGetFunction", ctypes.byref(kernel), module, b"twice_plus_one")

        def enqueue(stream: int, given: int, made: int, batch: int) -> None:
            number = batch * SHAPE[0] * SHAPE[1]
            values = [ctypes.c_uint64(given), ctypes.c_uint64(made), ctypes.c_int(number)]
            places = (ctypes.c_void_p * 3)(*(ctypes.addressof(value) for value in values))
            blocks = (-(-number // 256), 1, 1, 256, 1, 1, 0)
            call("cuLaunchKernel", kernel, *blocks, ctypes.c_void_p(stream), places, None)

        lanes = [Lane(context, enqueue, SHAPE, SHAPE, most) for _ in range(IN_FLIGHT)]
        free = context.cuda.mem_get_info()[0]
        for seed in range(200):
            given = [patches(1 + (seed * 7 + n * 13) % most, seed + n) for n in range(IN_FLIGHT)]
            for made, patch in zip(lanes, given, strict=True):
                made.begin(patch)
            for made, patch in zip(lanes, given, strict=True):
                found = np.empty_like(patch)
                made.finish(found)
                np.testing.assert_array_equal(found, 2.0 * patch + 1.0)
        assert context.cuda.mem_get_info()[0] == free  # nothing was allocated on the way
        for made in lanes:
            made.close()
    context.close()
