"""The `trainer` command: from data to a scored engine, and one line for every mistake."""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import yaml
from conftest import small_training

from engines.manifest import read_manifest
from pipeline.formats.csist import read_csist
from pipeline.formats.recording import open_recording
from trainer import cli, trained

SMALL = {
    "settings": {"stages": 1, "channels": 2, "hidden": 4},
    "samples": 64,
    "batch": 8,
    "validate_every": 4,
    "validate_samples": 8,
}


@dataclass
class Result:
    returncode: int
    stdout: str
    stderr: str


@pytest.fixture(autouse=True, scope="module")
def _quick():
    with small_training():
        yield


@pytest.fixture
def trainer(monkeypatch, capsys):
    """Run the command in this process, which has imported torch already."""

    def run(*words: object) -> Result:
        monkeypatch.setattr(sys, "argv", ["trainer", *map(str, words)])
        with pytest.raises(SystemExit) as end:
            cli.main()
        return Result(end.value.code, *capsys.readouterr())

    return run


@pytest.fixture(scope="module")
def folder(tmp_path_factory, _quick) -> Path:
    """data.zarr, and a trained and exported engine: run/, tiny.onnx, tiny.json, tiny.pt."""
    folder = tmp_path_factory.mktemp("trainer")
    (folder / "small.yaml").write_text(yaml.safe_dump(SMALL))
    commands = (
        f"generate --profile csist-100k --count 40 --seed 8 {folder}/data.zarr",
        f"generate --profile field --count 10 --seed 8 {folder}/field.zarr",
        f"fit dista_net --config {folder}/small.yaml --out {folder}/run --seed 2",
        f"export dista_net --run {folder}/run --out {folder} --name tiny",
    )
    for command in commands:
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(sys, "argv", ["trainer", *command.split()])
            with pytest.raises(SystemExit) as end:
                cli.main()
        assert end.value.code == 0, command
    return folder


def refused(result: Result, *fragments: str) -> None:
    assert result.returncode == 2, result.stderr
    assert result.stderr.count("\n") == 1, result.stderr
    for fragment in ("trainer: ", *fragments):
        assert fragment in result.stderr


# --- what it does ----------------------------------------------------------------------------


def test_generate_is_reproducible(trainer, folder: Path, tmp_path: Path) -> None:
    again = tmp_path / "again.zarr"
    result = trainer("generate", "--profile", "csist-100k", "--count", 40, "--seed", 8, again)
    assert result.returncode == 0
    first, second = read_csist(folder / "data.zarr"), read_csist(again)
    np.testing.assert_array_equal(first.image, second.image)
    assert (second.profile, second.seed, len(second)) == ("csist-100k", 8, 40)


def test_generate_scene_writes_recording_truth_and_bad_pixels(trainer, tmp_path: Path) -> None:
    out = tmp_path / "scene.zarr"
    assert trainer("generate", "--profile", "scene", "--count", 2, out).returncode == 0
    recording = open_recording(out)
    assert len(recording) == 2 and recording.shape == (512, 640)
    assert recording.truth is not None and len(recording.truth.of_frame(1)) > 8
    assert (tmp_path / "scene.bad_pixels.png").exists()


def test_generate_and_engine_need_no_torch(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "patches.zarr"
    code = (
        "import sys\n"
        "sys.modules['torch'] = None\n"
        "from trainer.cli import main\n"
        "sys.argv = ['trainer', *{words!r}]\n"
        "main()\n"
    )

    def run(*words: object) -> subprocess.CompletedProcess[str]:
        script = code.format(words=[str(word) for word in words])
        return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)

    made = run("generate", "--profile", "csist-100k", "--count", 5, "--seed", 1, out)
    assert made.returncode == 0, made.stderr
    scored = run("evaluate", "--dataset", out, "--engine", folder / "tiny.json")
    assert scored.returncode == 0, scored.stderr
    network = run("evaluate", "--dataset", out, "--network", "dista_net")
    refused(network, "needs torch", 'pip install "irst-pipeline[train]"')


def test_fit_keeps_checkpoint_log_and_curves(folder: Path) -> None:
    records = [json.loads(line) for line in (folder / "run/log.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [4, 8]
    assert (folder / "run/loss.png").read_bytes().startswith(b"\x89PNG")
    assert (folder / "run/checkpoint.pt").exists()


def test_finished_run_is_not_trained_again(trainer, folder: Path) -> None:
    before = (folder / "run/checkpoint.pt").read_bytes()
    words = ("--config", folder / "small.yaml", "--out", folder / "run")
    result = trainer("fit", "dista_net", *words, "--seed", 2)
    assert result.returncode == 0
    assert (folder / "run/checkpoint.pt").read_bytes() == before
    refused(trainer("fit", "dista_net", *words, "--seed", 3), "made with another seed")


def test_export_writes_what_it_trained(folder: Path) -> None:
    manifest = read_manifest(folder / "tiny.json")
    last = json.loads((folder / "run/log.jsonl").read_text().splitlines()[-1])
    assert manifest.name == "tiny" and manifest.network == "dista_net"
    assert (manifest.samples, manifest.seed, manifest.profile) == (64, 2, "csist-100k")
    assert (manifest.loss, manifest.cso_map) == (last["loss"], last["cso_map"])
    needs = manifest.sensor.model_dump(exclude_none=True)
    assert needs == {"sigma_px": 0.5, "full_scale": 255, "noiseless": True}
    assert manifest.settings["channels"] == 2
    stored, weights = trained.read_weights(folder / "tiny.pt")
    assert stored == manifest
    assert sum(w.numel() for w in weights.values()) == manifest.parameters + 1089 * 121
    assert sorted(path.name for path in folder.glob(".*")) == []  # nothing left aside


def test_engine_that_differs_from_torch_is_not_written(
    trainer, folder: Path, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr("trainer.export.PARITY_TOLERANCE", -1.0)
    result = trainer("export", "dista_net", "--run", folder / "run", "--out", tmp_path)
    assert result.returncode == 1
    assert result.stderr.count("\n") == 1 and "differs from torch" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_engine_and_network_score_alike(trainer, folder: Path, tmp_path: Path) -> None:
    ways = {
        "engine": ("--engine", folder / "tiny.onnx"),
        "network": ("--network", "dista_net", "--weights", folder / "tiny.pt"),
    }
    figures = {}
    for name, words in ways.items():
        out = tmp_path / "new" / f"{name}.json"
        result = trainer("evaluate", "--dataset", folder / "data.zarr", *words, "--json", out)
        assert result.returncode == 0, result.stderr
        assert "CSO-mAP" in result.stdout and "Cramér–Rao" in result.stdout
        figures[name] = json.loads(out.read_text())
    keys = {
        *("cso_map", "cso_map_interval", "ap", "count_accuracy", "rmse_px", "crb_px", "nees"),
        *("intensity_rmse_relative", "patches_per_s", "images", "network", "engine", "threshold"),
        *("profile", "seed"),
    }
    assert keys <= figures["engine"].keys()
    assert figures["engine"]["images"] == 40
    assert figures["engine"]["cso_map"] == pytest.approx(figures["network"]["cso_map"], abs=1e-6)
    assert figures["engine"]["crb_px"] == figures["network"]["crb_px"]


def test_shipped_weights_are_chosen_by_sensor(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "tiny.pt").write_bytes((folder / "tiny.pt").read_bytes())
    sensor = read_csist(folder / "data.zarr").sensor
    found = trained.load_trained("dista_net", None, sensor, shipped=tmp_path)
    assert found.manifest.name == "tiny"


# --- mistakes --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "fragments"),
    [
        ("nosuch", ["No such command 'nosuch'"]),
        ("evaluate", ["--dataset"]),
        ("fit dista_net --samples 0", ["--samples"]),
        ("fit nosuch", ["no `nosuch`", "dista_net"]),
        ("fit dista_net --device abacus", ["no `abacus`", "cpu"]),
        ("fit dista_net --config nosuch.yaml", ["nosuch.yaml", "cannot read"]),
        ("generate --profile x --count 1 o.zarr", ["no `x`", "csist-100k", "scene"]),
        ("generate --profile field --count 0 o.zarr", ["--count"]),
        ("generate --profile field --count 1 {}/data.zarr", ["data.zarr", "exists"]),
        ("evaluate --dataset nosuch.zarr --engine default", ["nosuch.zarr"]),
        ("evaluate --dataset {}/data.zarr", ["--network", "--engine"]),
        ("evaluate --dataset {}/data.zarr --engine a --network b", ["either"]),
        ("evaluate --dataset {}/data.zarr --engine default --weights w.pt", ["--weights"]),
        ("evaluate --dataset {}/data.zarr --engine nosuch", ["no `nosuch`"]),
        ("evaluate --dataset {}/data.zarr --network nosuch", ["no `nosuch`"]),
        (
            "evaluate --dataset {}/field.zarr --engine {}/tiny.json",
            ["full_scale 255, the sensor has 16383"],
        ),
        (
            "evaluate --dataset {}/data.zarr --network dista_net --weights {}/run/checkpoint.pt",
            ["checkpoint.pt", "trainer export"],
        ),
        (
            "evaluate --dataset {}/field.zarr --network dista_net --weights {}/tiny.pt",
            ["tiny.pt is made for full_scale 255"],
        ),
        (
            "evaluate --dataset {}/data.zarr --engine {}/tiny.json --json {}",
            ["cannot be written (Is a directory)"],
        ),
        (
            "evaluate --dataset nosuch.zarr --engine default --json /proc/self/x.json",
            ["/proc/self/x.json: cannot be written"],
        ),
        (
            "evaluate --dataset nosuch.zarr --engine default --picture new/x.jpg",
            ["x.jpg: a picture is a PNG"],
        ),
        ("robustness --json /proc/self/x.json", ["/proc/self/x.json: cannot be written"]),
        ("compile nosuch.onnx --target torch", ["nosuch.onnx: no such model"]),
        ("compile {}/tiny.json --target torch", ["tiny.json: not an .onnx"]),
        ("import-csist nosuch o.zarr", ["nosuch: no such folder"]),
        ("import-csist nosuch o.zarr --split val", ["nosuch: no such folder"]),
        ("export dista_net --run nosuch", ["no such checkpoint", "trainer fit"]),
        ("export nosuch --run {}/run", ["a run of `dista_net`"]),
        ("export dista_net --run {}/run --name a/b", ["--name", "'a/b'"]),
    ],
)
def test_a_mistake_is_one_line(trainer, folder: Path, monkeypatch, tmp_path, words, fragments):
    monkeypatch.chdir(tmp_path)
    refused(trainer(*words.replace("{}", str(folder)).split()), *fragments)
    assert list(tmp_path.iterdir()) == []


def test_altered_or_truncated_weights_are_refused(folder: Path, tmp_path: Path) -> None:
    sensor = read_csist(folder / "data.zarr").sensor
    manifest, state = trained.read_weights(folder / "tiny.pt")
    path = tmp_path / "bad.pt"
    state = {**state, "initial": state["initial"] + 1.0}
    trained.write_weights(path, manifest, state)
    with pytest.raises(trained.TrainerError, match=r"bad\.pt: the weights were altered"):
        trained.load_trained("dista_net", path, sensor)
    path.write_bytes((folder / "tiny.pt").read_bytes()[:-300])
    with pytest.raises(
        trained.TrainerError, match=r"bad\.pt: not a readable weights file, truncated"
    ):
        trained.load_trained("dista_net", path, sensor)


def test_help_is_there_for_every_command(trainer) -> None:
    for name in (
        "",
        "generate",
        "import-csist",
        "export-csist",
        "fit",
        "evaluate",
        "benchmark",
        "export",
    ):
        words = [name] if name else []
        result = trainer(*words, "--help")
        assert result.returncode == 0
        assert "Usage: trainer" in result.stdout and "completion" not in result.stdout
