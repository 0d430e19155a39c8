"""TensorRT and TensorRT-RTX: the ONNX graph, with the precision it holds, becomes an engine.

TensorRT measures kernels on the GPU before it and builds for that one. TensorRT-RTX builds without
a GPU and finishes on the one it is run on; it has no timing cache.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from engines import tensorrt_log
from engines.build import Batch
from engines.cuda.driver import Gpu, gpu
from engines.errors import EngineError
from engines.tensorrt_log import Library, logger, told
from trainer.errors import TrainerError, TrainingFailed
from trainer.targets import BuildFacts
from trainer.targets.timing_cache import TimingCache, timing_cache

ANY_RTX = "any GPU of TensorRT-RTX"


def build(
    onnx: bytes,
    out: Path,
    batch: Batch,
    *,
    library: Library,
    optimisation_level: int,
    cache: Path | None = None,
    progress: Callable[[str], None],
) -> BuildFacts:
    """Write the serialised engine to `out`; → for whom it is.

    cache: folder of the timing cache, None: none is kept. Raises TrainerError for a graph it
    cannot parse, EngineError without the library or, for TensorRT, a GPU; TrainingFailed if the
    building fails.
    """
    trt = tensorrt_log.library(library)
    device = _device(library)
    builder = trt.Builder(logger(trt))
    network = _parsed(trt, builder, onnx)
    config = builder.create_builder_config()
    config.builder_optimization_level = optimisation_level
    config.clear_flag(trt.BuilderFlag.TF32)  # f32 in the graph means f32
    config.add_optimization_profile(_profile(builder, network, batch))
    monitor = config.progress_monitor = _monitor(trt, progress)
    if device is None:
        # What a stream records (a CUDA graph) must not allocate.
        config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)
    with _timings(config, device, trt, cache, progress) as timings:
        engine = builder.build_serialized_network(network, config)
        if monitor.stopped is not None:
            raise monitor.stopped
        if engine is None:
            raise TrainingFailed(f"{library} {trt.__version__}: no engine was built ({told(trt)})")
        known = timings.replace(_measured(config)) if timings else None
    out.write_bytes(engine)
    return BuildFacts(
        library=f"{library} {trt.__version__}",
        device=device.name if device else ANY_RTX,
        compute_capability=device.compute_capability if device else None,
        driver=device.driver if device else None,
        optimisation_level=optimisation_level,
        timing_cache_sha256=known,
    )


@contextmanager
def _timings(
    config: Any, device: Gpu | None, trt: Any, cache: Path | None, progress: Callable[[str], None]
) -> Iterator[TimingCache | None]:
    """The timing cache of this library and kind of GPU, in use by this configuration."""
    if device is None or cache is None:
        yield None
        return
    name = f"{trt.__version__}-{device.name}".replace(" ", "_").replace("/", "_")
    with timing_cache(cache / f"{name}.timings", progress) as timings:
        # False: one of another GPU or version is refused; then it is begun anew.
        if not config.set_timing_cache(config.create_timing_cache(timings.held), False):
            config.set_timing_cache(config.create_timing_cache(b""), False)
        yield timings


def _measured(config: Any) -> bytes:
    return bytes(config.get_timing_cache().serialize())


def _device(library: Library) -> Gpu | None:
    """The GPU it is built for; None: for any."""
    if library == "tensorrt_rtx":
        return None
    try:
        return gpu(0)
    except EngineError as error:
        raise EngineError(
            f"{error}; TensorRT builds on the GPU it is for, `--target tensorrt-rtx` without one"
        ) from error


def _parsed(trt: Any, builder: Any, onnx: bytes) -> Any:
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger(trt))
    if not parser.parse(onnx):
        raise TrainerError(
            f"{trt.__name__} {trt.__version__} cannot take the model: {_fault(parser)}"
        )
    return network


def _fault(parser: Any) -> str:
    """The first error of the parser, with the node it is about."""
    if not parser.num_errors:
        return "it does not say why"
    error = parser.get_error(0)
    node = error.node_name() or error.node()
    place = f"node {node} ({error.node_operator()}): " if error.node_operator() else ""
    return place + " ".join(error.desc().split())


def _profile(builder: Any, network: Any, batch: Batch) -> Any:
    """From the least to the largest batch, and the one to be fastest at, of every batched input."""
    profile = builder.create_optimization_profile()
    for place in range(network.num_inputs):
        given = network.get_input(place)
        size, *shape = given.shape
        if size == -1:
            sizes = (batch.least, batch.best, batch.most)
            profile.set_shape(given.name, *((number, *shape) for number in sizes))
    return profile


def _monitor(trt: Any, progress: Callable[[str], None]) -> Any:
    """Tells the outermost phases.

    Nothing may be raised through TensorRT: Ctrl-C and whatever `progress` raises stop the build at
    its next step, and are kept in `stopped`.
    """

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.stopped: BaseException | None = None

        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
            try:
                if parent is None:
                    progress(f"{phase} ({steps} steps)")
            except BaseException as error:  # noqa: BLE001
                self.stopped = error

        def step_complete(self, phase: str, step: int) -> bool:  # noqa: ARG002
            try:
                return self.stopped is None
            except KeyboardInterrupt as error:  # it may come at any line
                self.stopped = error
                return False

        def phase_finish(self, phase: str) -> None:
            pass

    return Monitor()
