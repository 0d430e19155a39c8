"""The training loop: resumable to the bit, honest about what it cannot do."""

import json
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import small_training
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.record_writer import masked_crc32c

from pipeline.formats.csist import read_csist, save_csist, write_csist
from pipeline.physics.grid import cell_index
from pipeline.physics.groups import PROFILES
from trainer import cli, registry
from trainer.curves import draw_curves, draw_picture
from trainer.data import DatasetPairs
from trainer.errors import TrainerError, TrainingFailed
from trainer.fit import INITIAL_PAIRS, Run, averaged_weights, fit, load_checkpoint, read_log
from trainer.fit_config import FitConfig, read_fit_config
from trainer.progress import patches_per_s
from trainer.trained import WEIGHTS, load_weights

ON_GRID = registry.build("ista", {})
CONFIG = FitConfig(
    settings={"stages": 1, "channels": 2, "hidden": 4},
    samples=48,
    batch=8,
    crowded_share=0.5,
    validate_every=2,
    validate_samples=8,
)


@pytest.fixture(autouse=True, scope="module")
def _quick():
    with small_training():
        yield


@pytest.fixture(scope="module")
def begun(tmp_path_factory, _quick) -> Path:
    """The folder of a run that ended after its first checkpoint; copied, not changed."""
    folder = tmp_path_factory.mktemp("begun")
    next(Run(CONFIG, folder).train())
    return folder


@pytest.fixture
def folder(begun: Path, tmp_path: Path) -> Path:
    """A copy of that run."""
    return Path(shutil.copytree(begun, tmp_path / "run"))


def changed(**fields: object) -> FitConfig:
    return CONFIG.model_copy(update=fields)


def equal(a: object, b: object) -> bool:
    """Equality to the bit, tensors and nested containers included."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


def test_interrupted_run_ends_with_the_same_bits(tmp_path: Path) -> None:
    (tmp_path / "whole").mkdir()
    (tmp_path / "killed").mkdir()
    whole = Run(CONFIG, tmp_path / "whole")
    records = list(whole.train())
    assert [record["step"] for record in records] == [2, 4, 6]

    next(Run(CONFIG, tmp_path / "killed").train())  # ends after its first checkpoint
    (tmp_path / "killed" / "checkpoint.pt.part").write_bytes(b"killed while writing")
    resumed = Run(CONFIG, tmp_path / "killed")
    assert resumed.resume()
    assert resumed.step == 2
    list(resumed.train())

    states = [load_checkpoint(tmp_path / name / "checkpoint.pt") for name in ("whole", "killed")]
    for state in states:
        del state["seconds"]
    assert equal(*states)
    for mine, theirs in zip(whole.records, resumed.records, strict=True):
        assert (mine["loss"], mine["cso_map"]) == (theirs["loss"], theirs["cso_map"])


def test_checkpoint_from_before_a_field_existed_is_accepted(folder: Path) -> None:
    path = folder / "checkpoint.pt"
    state = torch.load(path, weights_only=True)
    del state["config"]["initial_weights"]
    torch.save(state, path)
    assert Run(CONFIG, folder).resume()


def test_another_config_is_refused_by_field(folder: Path) -> None:
    with pytest.raises(TrainerError, match="made with another learning_rate; use its config"):
        Run(changed(learning_rate=0.5), folder).resume()


@pytest.mark.parametrize("damage", ["truncated", "other", "no log"])
def test_damaged_run_is_refused(folder: Path, damage: str) -> None:
    path = folder / "checkpoint.pt"
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-500])
    elif damage == "other":
        torch.save({"weights": torch.zeros(3)}, path)
    else:
        (folder / "log.jsonl").unlink()
    with pytest.raises(TrainerError, match=r"(checkpoint\.pt|log\.jsonl): .*;"):
        Run(CONFIG, folder).resume()


def test_starts_from_another_runs_averaged_weights(folder: Path) -> None:
    path = folder / "checkpoint.pt"
    tuned = Run(
        changed(initial_weights=str(path), profile="field", scaling="peak"), folder / "tuned"
    )
    before = averaged_weights(load_checkpoint(path))
    for name, parameter in tuned.network.named_parameters():
        assert torch.equal(parameter, before[name]), name
    # what is computed from the data is computed from the new data
    assert not torch.equal(tuned.network.get_buffer("initial"), before["initial"])
    with pytest.raises(TrainerError, match="of another network or other settings"):
        Run(changed(initial_weights=str(path), settings={"stages": 2, "channels": 3}), folder)
    with pytest.raises(TrainerError, match="of another network or other settings"):
        Run(changed(initial_weights=str(path), network="focus", settings={}), folder)


def test_starts_from_a_weights_file() -> None:
    shipped = WEIGHTS / "focus.pt"
    run = Run(changed(network="focus", settings={}, initial_weights=str(shipped)), shipped.parent)
    assert equal(dict(run.network.state_dict()), dict(load_weights(shipped).network.state_dict()))


@pytest.mark.parametrize("ablation", [{}, {"dynamic_transform": False, "dynamic_threshold": False}])
def test_a_larger_dista_net_begins_as_a_smaller_one(ablation: dict[str, bool]) -> None:
    torch.manual_seed(1)
    small = registry.build("dista_net", CONFIG.settings | ablation | {"stages": 2})
    large = registry.build("dista_net", {"stages": 3, "channels": 6, "hidden": 8} | ablation)
    small.fit_initial(torch.rand(60, 11, 11), torch.rand(60, 33, 33))
    large.start_from(small)
    patch = torch.rand(4, 11, 11)
    torch.testing.assert_close(large(patch), small(patch), rtol=1e-4, atol=1e-5)
    copies = large.get_parameter("unfolded.0.inverse_in.weight")[0].reshape(3, 2, -1)
    assert not torch.allclose(copies[0], copies[1])  # else training would keep them alike
    with pytest.raises(RuntimeError):
        small.start_from(large)
    settings = small.config.model_dump()
    settings["dynamic_transform"] = not settings["dynamic_transform"]
    other = registry.build("dista_net", settings)
    with pytest.raises(RuntimeError, match="dynamic_transform"):
        other.start_from(small)


def test_validation_does_not_disturb_training(tmp_path: Path) -> None:
    weights = []
    for every in (1, 6):
        (tmp_path / str(every)).mkdir()
        run = Run(changed(validate_every=every), tmp_path / str(every))
        list(run.train())
        weights.append(run.network.state_dict())
    assert equal(*weights)


def test_a_lost_loss_is_a_failed_run(tmp_path: Path) -> None:
    with pytest.raises(TrainingFailed, match="not finite; lower learning_rate"):
        list(Run(changed(learning_rate=1e30, warmup=0.0), tmp_path).train())
    assert not (tmp_path / "checkpoint.pt").exists()


@pytest.mark.parametrize(
    ("settings", "fault"),
    [
        ({"sigma_px": 0.7}, "sigma_px is 0.7, profile csist-100k has 0.5"),
        ({"size_px": 13}, "size_px is 13, profile csist-100k has 11"),
    ],
)
def test_network_must_match_the_profile(tmp_path: Path, settings: dict, fault: str) -> None:
    with pytest.raises(TrainerError, match=fault):
        Run(changed(settings={**CONFIG.settings, **settings}), tmp_path)


def test_rate_rises_then_falls_to_nothing() -> None:
    config = FitConfig(samples=64_000, batch=64, warmup=0.1)
    rates = [config.rate(step) for step in range(config.steps)]
    assert rates[0] == pytest.approx(0.01)
    assert max(rates) == 1.0 and rates.index(1.0) == 99
    assert all(a >= b for a, b in pairwise(rates[99:]))
    assert rates[-1] < 1e-4


def test_config_file_and_overrides(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({"samples": 10, "seed": 3, "settings": {"stages": 1}}))
    config = read_fit_config(path, "dista_net", samples=20, seed=None)
    assert (config.samples, config.seed, config.settings) == (20, 3, {"stages": 1})
    assert read_fit_config(None, "dista_net") == FitConfig(network="dista_net")


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("sample: 3", "unknown field `sample`"),
        ("samples: -3", "samples: input should be greater than 0, got -3"),
        ("- 3", "must be a map"),
        ("a: [", "not valid YAML"),
        ("seed: 2001-99-99", "not valid YAML"),
        ("network: focus", "is for `focus`; run `trainer fit focus`"),
    ],
)
def test_wrong_config_names_file_and_field(tmp_path: Path, text: str, fault: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(TrainerError) as caught:
        read_fit_config(path, "dista_net")
    assert str(path) in str(caught.value) and fault in str(caught.value)


# --- a fixed dataset -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    """Twelve patches of the benchmark: one and a half batches."""
    path = tmp_path_factory.mktemp("dataset") / "data.zarr"
    write_csist(path, PROFILES["csist-100k"], 12, seed=5)
    return path


def on_dataset(path: Path, **fields: object) -> FitConfig:
    return changed(dataset=str(path), crowded_share=0.0, **fields)


def image_of(patch_HW: torch.Tensor, images: np.ndarray) -> int:
    """Which of the dataset's images a patch in network units is."""
    same = np.abs(images / 255.0 - patch_HW.numpy()).max(axis=(1, 2)) < 1e-6
    (index,) = np.flatnonzero(same)
    return int(index)


def test_each_epoch_takes_every_image_once_in_its_own_order(dataset: Path) -> None:
    images = read_csist(dataset).image
    orders = []
    for seed in (1, 2):
        pairs = DatasetPairs(on_dataset(dataset, seed=seed), PROFILES["csist-100k"], ON_GRID, "cpu")
        seen = [image_of(patch, images) for step in range(3) for patch in pairs.batch(step)[0]]
        orders += [seen[:12], seen[12:]]
        assert torch.equal(pairs.batch(1)[0], pairs.batch(1)[0])  # a batch follows from its step
    for order in orders:
        assert Counter(order) == Counter(range(12))
    assert all(order != other for order, other in pairwise(orders))


def test_pairs_of_a_dataset_are_its_images_and_its_targets(dataset: Path) -> None:
    stored = read_csist(dataset)
    pairs = DatasetPairs(on_dataset(dataset), PROFILES["csist-100k"], ON_GRID, "cpu")
    for patch, found in zip(*pairs.initial(1000), strict=True):
        wanted = np.zeros((33, 33))
        for x, y, intensity in stored.truths()[image_of(patch, stored.image)]:
            column, row = np.clip(cell_index(np.array([x, y]), 3), 0, 32).astype(int)
            wanted[row, column] += intensity / 255.0
        np.testing.assert_allclose(found.numpy(), wanted, atol=1e-6)


def test_interrupted_run_on_a_dataset_ends_with_the_same_bits(
    dataset: Path, tmp_path: Path
) -> None:
    config = on_dataset(dataset)
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    whole = Run(config, tmp_path / "whole")
    list(whole.train())
    next(Run(config, tmp_path / "killed").train())
    resumed = Run(config, tmp_path / "killed")
    assert resumed.resume()
    list(resumed.train())
    assert equal(whole.network.state_dict(), resumed.network.state_dict())
    assert whole.records[-1]["loss"] == resumed.records[-1]["loss"]


def test_the_command_trains_on_the_dataset_it_is_given(
    dataset: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(on_dataset(Path("other.zarr")).model_dump()))
    words = ["--config", config, "--dataset", dataset, "--out", tmp_path / "run"]
    monkeypatch.setattr(sys, "argv", ["trainer", "fit", "dista_net", *map(str, words)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 0, capsys.readouterr().err
    state = load_checkpoint(tmp_path / "run" / "checkpoint.pt")
    assert (state["config"]["dataset"], state["step"]) == (str(dataset), 6)


@pytest.mark.parametrize(
    ("profile", "change", "fault"),
    [
        ("field", {}, "full_scale is 255, profile field has 16383"),
        ("csist-100k", {"sigma_px": 0.7}, "sigma_px is 0.7, profile csist-100k has 0.5"),
        ("csist-100k", {"read_noise": 2.0}, "noiseless is False, profile csist-100k has True"),
    ],
)
def test_dataset_must_be_of_the_profiles_sensor(
    dataset: Path, tmp_path: Path, profile: str, change: dict, fault: str
) -> None:
    stored = read_csist(dataset)
    path = tmp_path / "data.zarr"
    save_csist(path, replace(stored, sensor=replace(stored.sensor, **change)))
    with pytest.raises(TrainerError, match=rf"data\.zarr: {fault}"):
        Run(on_dataset(path, profile=profile), tmp_path)


def test_empty_or_crowded_dataset_is_refused(dataset: Path, tmp_path: Path) -> None:
    stored = read_csist(dataset)
    arrays = ("image", "target_count", "target_xy_px", "target_intensity")
    save_csist(tmp_path / "e.zarr", replace(stored, **{a: getattr(stored, a)[:0] for a in arrays}))
    with pytest.raises(TrainerError, match=r"e\.zarr: has no images"):
        Run(on_dataset(tmp_path / "e.zarr"), tmp_path)
    path = tmp_path / "run.yaml"
    path.write_text("crowded_share: 0.5")
    with pytest.raises(TrainerError, match=r"run\.yaml: dataset: .*set crowded_share to 0"):
        read_fit_config(path, "dista_net", dataset=str(dataset))


# --- what it shows ---------------------------------------------------------------------------


def events(folder: Path) -> list[Event]:
    """What TensorBoard reads in the folder: length, checksum, event, checksum, again and again."""
    (path,) = folder.glob("*tfevents*")
    data, found = path.read_bytes(), []
    while data:
        length = struct.unpack("<Q", data[:8])[0]
        body, sums = data[12 : 12 + length], data[8:12] + data[12 + length : 16 + length]
        assert struct.unpack("<II", sums) == (masked_crc32c(data[:8]), masked_crc32c(body))
        found.append(Event.FromString(body))
        data = data[16 + length :]
    assert found[0].file_version == "brain.Event:2"
    return found[1:]


def test_tensorboard_finds_each_record_once_even_after_a_kill(folder: Path) -> None:
    begun = Run(CONFIG, folder)
    begun.resume()
    future = [*begun.records, {**begun.records[-1], "step": 4, "samples": 32}]
    draw_curves(future, CONFIG, folder)  # as if killed before the checkpoint of step 4 was whole
    fit(CONFIG, folder)
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    found = events(folder)
    assert [event.step for event in found] == [2, 4, 6]
    for event, record, rate in zip(found, records, patches_per_s(records), strict=True):
        wanted = {k: v for k, v in record.items() if k not in ("step", "samples", "seconds")}
        wanted["learning_rate"] = CONFIG.learning_rate * CONFIG.rate(int(record["step"]) - 1)
        wanted["patches_per_s"] = rate
        scalars = {value.tag: value.simple_value for value in event.summary.value}
        assert {"ap_0.05", "ap_0.25", "cso_map", "loss"} < scalars.keys()
        assert scalars == pytest.approx(wanted, rel=1e-6)


def test_curves_of_a_log_without_ap_are_drawn(tmp_path: Path) -> None:
    old = [
        {"step": 2 * i, "samples": 16 * i, "loss": 1 / i, "cso_map": 0.1 * i, "seconds": 0.1 * i}
        for i in (1, 2, 3)
    ]
    draw_picture(old, tmp_path / "old.png", "dista_net")
    draw_picture([*old[:2], {**old[2], "ap_0.05": 0.2}], tmp_path / "mixed.png", "dista_net")
    pictures = [(tmp_path / f"{name}.png").read_bytes() for name in ("old", "mixed")]
    assert all(picture.startswith(b"\x89PNG") for picture in pictures)
    assert pictures[0] != pictures[1]


def test_speed_is_that_since_the_last_record() -> None:
    records = [{"samples": 100, "seconds": 10.0}, {"samples": 400, "seconds": 20.0}]
    assert patches_per_s(records) == [10.0, 30.0]


def test_without_a_terminal_each_validation_is_one_line(folder: Path, capsys) -> None:
    fit(CONFIG, folder)
    lines = capsys.readouterr().err.splitlines()
    form = r"dista_net  step {} of 6  loss \S+  CSO-mAP \S+  \d+ patches/s  0:00:0\d left"
    assert len(lines) == 2
    for line, step in zip(lines, (4, 6), strict=True):
        assert re.fullmatch(form.format(step), line), line


# --- killed ----------------------------------------------------------------------------------


def test_killed_command_run_again_ends_with_the_same_bits(tmp_path: Path, monkeypatch) -> None:
    config = changed(profile="field", scaling="peak", samples=64)  # quickly drawn
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(config.model_dump()))
    checkpoint = tmp_path / "killed" / "checkpoint.pt"
    words = ["fit", "dista_net", "--config", str(path), "--out", str(checkpoint.parent)]

    def start() -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, "-m", "trainer", *words],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    with start() as killed:
        while killed.poll() is None and not checkpoint.exists():
            time.sleep(0.01)
        killed.kill()
    assert killed.returncode == -signal.SIGKILL
    assert load_checkpoint(checkpoint)["step"] < config.steps
    with start() as resumed:
        assert resumed.wait() == 0

    monkeypatch.setattr("trainer.fit.INITIAL_PAIRS", INITIAL_PAIRS)
    whole = Run(config, tmp_path)
    list(whole.train())
    states = [load_checkpoint(tmp_path / "checkpoint.pt"), load_checkpoint(checkpoint)]
    logs = [read_log(tmp_path, config.steps), read_log(checkpoint.parent, config.steps)]
    for entry in (*states, *logs[0], *logs[1]):
        del entry["seconds"]
    assert [record["step"] for record in logs[0]] == [2, 4, 6, 8]
    assert equal(*states)
    assert logs[0] == logs[1]
