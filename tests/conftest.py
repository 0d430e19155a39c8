"""Shared pieces of the tests: small recordings, and a way to run the commands as a user does."""

import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import hypothesis
import numpy as np
import pytest

from pipeline.formats.recording import RecordingWriter
from pipeline.physics.scene import Scene, SceneSettings

# Whoever started this may ignore them (a script's background, nohup), and so would its processes.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

# An example may meet a machine that stands still for a while.
hypothesis.settings.register_profile("here", deadline=None)
hypothesis.settings.load_profile("here")

BIN = Path(sys.executable).parent
Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def command() -> Command:
    """Run `pipeline` or `trainer` in a process of its own, with a limit on its time."""

    def run(*words: object, timeout_s: float = 100.0) -> subprocess.CompletedProcess[str]:
        program, *arguments = (str(word) for word in words)
        return subprocess.run(
            [str(BIN / program), *arguments], capture_output=True, text=True, timeout=timeout_s
        )

    return run


def assert_one_line_error(
    result: subprocess.CompletedProcess[str], *fragments: str, exit_code: int = 2
) -> None:
    """A user's mistake: exit code 2 and one line on standard error that names all fragments."""
    assert result.returncode == exit_code, result.stderr
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, result.stderr
    for fragment in fragments:
        assert fragment in lines[0], lines[0]


@contextmanager
def small_training() -> Iterator[None]:
    """Torch on one thread, which is quick for small networks, and few pairs to begin with."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("trainer.fit.INITIAL_PAIRS", 500)
        yield
    torch.set_num_threads(threads)


def write_scene(path: Path, frames: int, seed: int = 3, **settings: object) -> Scene:
    """A recording of a scene with its truth."""
    scene = Scene(SceneSettings(seed=seed, **settings))  # type: ignore[arg-type]
    shape = (scene.settings.height, scene.settings.width)
    with RecordingWriter(path, shape, scene.settings.sensor) as writer:
        for index in range(frames):
            pixels_HW, xy_px, target_id, intensity = scene.frame(index)
            writer.append(
                pixels_HW,
                index * 10_000_000,
                xy_px=xy_px,
                target_id=target_id,
                intensity=intensity,
            )
    return scene


@pytest.fixture(scope="session")
def scene_recording(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve frames of 160 × 128 with four singles and three groups."""
    path = tmp_path_factory.mktemp("recording") / "scene.zarr"
    write_scene(path, 12, width=160, height=128, singles=4, groups=3)
    return path


@pytest.fixture
def rng() -> np.random.Generator:
    """Random numbers with a seed."""
    return np.random.default_rng(20261121)
