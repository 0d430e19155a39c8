"""`trainer benchmark`: the whole table from the shipped weights, and what it computes itself."""

import json
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import yaml

from trainer import cli, registry
from trainer.benchmark import SYSTEMS, System, chosen, draw_images, grid_ceiling, multiply_adds, run
from trainer.benchmark_report import markdown
from trainer.fit import profile_for
from trainer.fit_config import BENCHMARK_SEED, VALIDATION_SEED, read_fit_config
from trainer.trained import WEIGHTS, read_weights

CONFIGS = Path(__file__).parents[1] / "configs" / "fit"
QUICK = (System("ISTA", solver="ista", settings={"iterations": 5}), *chosen(["FOCUS", "DISTA-Net"]))


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def images():
    return draw_images(24, seed=3)


@pytest.fixture(scope="module")
def results(images):
    return run(images, QUICK)


def test_every_network_and_every_weights_file_has_a_row() -> None:
    networks = {system.load().manifest.network for system in SYSTEMS}
    # a design that was tried and is not shipped, and the one for any sensor
    assert networks | {"off_grid_any", "dista_off_grid"} == set(registry.available())
    listed = {f"{system.weights}.pt" for system in SYSTEMS if system.weights}
    names = ("dista_net_field", "off_grid_any", "variants/off_grid_any_first")
    sensors = {f"{name}.pt" for name in names}
    shipped = {str(path.relative_to(WEIGHTS)) for path in WEIGHTS.rglob("*.pt")}
    assert shipped == listed | sensors


@pytest.mark.parametrize("system", SYSTEMS, ids=lambda system: system.title)
def test_shipped_weights_are_of_a_run_that_never_saw_the_test_images(system: System) -> None:
    manifest = system.load().manifest
    assert manifest.profile == ("none" if system.solver else "csist-100k")
    assert (manifest.samples > 0) is (system.solver is None)
    assert manifest.seed not in (BENCHMARK_SEED, VALIDATION_SEED)


UNMIXING = [path for path in sorted(CONFIGS.glob("*.yaml")) if path.stem != "yolo"]


@pytest.mark.parametrize("path", UNMIXING, ids=lambda path: path.stem)
def test_weights_are_of_the_run_their_config_describes(path: Path) -> None:
    name = yaml.safe_load(path.read_text())["network"]
    config = read_fit_config(path, name)
    network = registry.build(name, config.settings)
    profile_for(config.profile, network)
    (weights,) = WEIGHTS.rglob(f"{path.stem}.pt")
    manifest, _ = read_weights(weights)
    assert manifest.settings == network.config.model_dump(mode="json")
    assert (manifest.profile, manifest.scaling) == (config.profile, config.scaling)
    assert (manifest.seed, manifest.samples) == (config.seed, config.steps * config.batch)


def test_rows_hold_what_was_measured(results, images) -> None:
    ista, focus, dista = results["systems"]
    assert results["images"] == 24 and results["seed"] == 3
    assert (ista["parameters"], focus["parameters"], dista["parameters"]) == (0, 46_037, 1_209_280)
    assert ista["samples_seen"] == 0 and dista["samples_seen"] == 480_000
    assert dista["cso_map"] > focus["cso_map"] - 0.05 and dista["cso_map"] > 0.35
    assert dista["published"]["cso_map"] == 0.4674
    assert dista["against_reference"] is None
    low, high = ista["against_reference"]
    assert low < ista["cso_map"] - dista["cso_map"] < high < 0.0
    json.dumps(results, allow_nan=False)


def test_ceiling_rises_with_the_grid(images) -> None:
    assert list(np.diff([grid_ceiling(images, c) for c in (3, 5, 7)]) > 0.0) == [True, True]


def test_multiply_adds_are_those_of_the_paper() -> None:
    patch = torch.zeros(1, 11, 11)
    # 25.6 M and 548 M are published
    assert multiply_adds(registry.build("focus", {}), patch) == pytest.approx(25.6e6, rel=0.02)
    assert multiply_adds(registry.build("dista_net", {}), patch) == pytest.approx(548e6, rel=0.03)


def test_report_says_what_is_smaller_than_published(results) -> None:
    lines = markdown(results).splitlines()
    row = {line.split(" | ")[0].strip("| "): line for line in lines if line.count("|") > 12}
    assert "†" in row["DISTA-Net"] and "†" not in row["FOCUS"]
    assert "480,000" in row["DISTA-Net"] and "46.74" in row["DISTA-Net"]
    assert any(line.startswith("| perfect detection on the grid | c = 3") for line in lines)


def trainer(monkeypatch, *words: object) -> int:
    monkeypatch.setattr(sys, "argv", ["trainer", *map(str, words)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    return int(end.value.code or 0)


def test_command_writes_table_and_pictures(monkeypatch, capsys, tmp_path: Path) -> None:
    words = ["benchmark", "--out", tmp_path, "--count", 12, "--seed", 5, "--only", "FOCUS"]
    assert trainer(monkeypatch, *words) == 0
    assert "| FOCUS | 3 | 0.046 M |" in capsys.readouterr().out
    written = json.loads((tmp_path / "benchmark.json").read_text())
    assert [row["title"] for row in written["systems"]] == ["FOCUS"]
    assert (tmp_path / "benchmark.md").read_text().startswith("12 images of `csist-100k`, seed 5")
    for name in ("benchmark.png", "maps.png"):
        picture = cv2.imread(str(tmp_path / name))
        assert picture.shape[0] > 100 and picture.std() > 10.0


def test_unknown_system_and_unfit_dataset_are_named(monkeypatch, capsys, tmp_path: Path) -> None:
    assert trainer(monkeypatch, "benchmark", "--out", tmp_path, "--only", "YOLO") == 2
    assert "--only: no system `YOLO`; use ISTA, SRFBN" in capsys.readouterr().err
    field = tmp_path / "field.zarr"
    assert (
        trainer(monkeypatch, "generate", "--profile", "field", "--count", 2, "--seed", 1, field)
        == 0
    )
    assert trainer(monkeypatch, "benchmark", "--out", tmp_path, "--dataset", field) == 2
    assert "use a dataset of profile csist-100k" in capsys.readouterr().err


def test_solver_is_scored_and_not_trained(monkeypatch, capsys, tmp_path: Path) -> None:
    data = tmp_path / "data.zarr"
    words = ["generate", "--profile", "csist-100k", "--count", 4, "--seed", 1, data]
    assert trainer(monkeypatch, *words) == 0
    assert trainer(monkeypatch, "evaluate", "--network", "ista", "--dataset", data) == 0
    capsys.readouterr()
    assert trainer(monkeypatch, "fit", "ista", "--out", tmp_path / "run") == 2
    assert "ista is a solver and has nothing to train" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
