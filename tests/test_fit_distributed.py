"""One training over two real processes: the same as over one, and no hang when one fails."""

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from trainer.distributed import Team
from trainer.errors import TrainerError
from trainer.fit import Run, load_checkpoint, read_log
from trainer.fit_config import FitConfig

CONFIG = FitConfig(
    settings={"stages": 1, "channels": 2, "hidden": 4},
    profile="field",
    scaling="peak",
    samples=48,
    batch=8,
    crowded_share=0.5,
    validate_every=2,
    validate_samples=8,
)
LIMIT_S = 100


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> list[Path]:
    """The folder of the same run in one process: after its first checkpoint, and at its end."""
    folder = tmp_path_factory.mktemp("alone")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    steps = Run(CONFIG, folder).train()
    next(steps)
    begun = Path(shutil.copytree(folder, folder.with_name("begun")))
    list(steps)
    torch.set_num_threads(threads)
    return [begun, folder]


@pytest.fixture(scope="module")
def failed(tmp_path_factory) -> tuple[Path, list[subprocess.CompletedProcess[str]]]:
    """A run whose leading process, after the first checkpoint, cannot draw its curves."""
    folder = tmp_path_factory.mktemp("failed")
    (folder / "run" / "loss.png").mkdir(parents=True)
    return folder / "run", two_processes(command(folder))


def command(folder: Path) -> list[str]:
    """`trainer fit` of a run in the folder `run`."""
    config = folder / "run.yaml"
    config.write_text(yaml.safe_dump(CONFIG.model_dump()))
    run = str(folder / "run")
    return ["-m", "trainer", "fit", "dista_net", "--config", str(config), "--out", run]


def two_processes(words: list[str]) -> list[subprocess.CompletedProcess[str]]:
    """The command in two processes with the environment torchrun gives them, and nothing else.

    So nobody ends the one when the other has failed.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = [
        subprocess.Popen(
            [sys.executable, *words],
            env={
                **os.environ,
                **{"OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)},
                **{"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"},
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    try:
        ended = [(process, *process.communicate(timeout=LIMIT_S)) for process in started]
    finally:
        for process in started:
            process.kill()
    return [subprocess.CompletedProcess(words, p.returncode, out, err) for p, out, err in ended]


def assert_same(mine: Path, theirs: Path) -> None:
    """Losses and weights of two runs are the same, up to the rounding of float32."""
    states = [load_checkpoint(folder / "checkpoint.pt") for folder in (mine, theirs)]
    assert states[0]["step"] == states[1]["step"]
    logs = [read_log(folder, states[0]["step"]) for folder in (mine, theirs)]
    for a, b in zip(*logs, strict=True):
        assert a["step"] == b["step"]
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
    for name, weights in states[1]["network"].items():
        torch.testing.assert_close(states[0]["network"][name], weights, rtol=1e-5, atol=1e-6)


def test_two_processes_begin_as_one_does(alone: list[Path], failed) -> None:
    assert_same(failed[0], alone[0])


def test_two_processes_under_torchrun_go_on_and_end_as_one_does(
    alone: list[Path], tmp_path: Path
) -> None:
    run = Path(shutil.copytree(alone[0], tmp_path / "run"))
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    words = [sys.executable, *launcher, *command(tmp_path)]
    result = subprocess.run(words, capture_output=True, text=True, timeout=LIMIT_S)
    assert result.returncode == 0, result.stderr
    assert_same(run, alone[1])
    assert result.stdout.count("trainer export") == 1  # only one of them speaks
    assert result.stderr.count("step 6 of 6") == 1
    files = {"checkpoint.pt", "events.out.tfevents.fit", "log.jsonl", "loss.png"}
    assert {path.name for path in run.iterdir()} == files


def test_a_fault_in_one_process_ends_all_with_one_message(failed) -> None:
    run, ended = failed
    assert [process.returncode for process in ended] == [2, 2]
    text = "".join(process.stderr for process in ended)
    messages = [line for line in text.splitlines() if line.startswith("trainer: ")]
    assert messages == [f"trainer: {run}/loss.png: Is a directory"]
    assert "Traceback" not in text


def test_a_batch_must_divide_over_the_processes(tmp_path: Path) -> None:
    with pytest.raises(TrainerError, match="8 patches do not divide over 3 processes; use a mul"):
        Run(CONFIG, tmp_path, Team(rank=1, world=3))


@pytest.mark.parametrize("world", [1, 2, 4])
def test_rows_of_all_processes_are_the_batch_and_their_first_quarters_its_first(world) -> None:
    batch = torch.arange(16)
    rows = [Team(rank, world).rows(batch) for rank in range(world)]
    assert torch.equal(torch.cat(rows).sort()[0], batch)
    quarters = torch.cat([own[: len(own) // 4] for own in rows])
    assert torch.equal(quarters.sort()[0], batch[:4])
