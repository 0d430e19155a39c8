"""The training loop: resumable to the bit, honest about what it cannot do."""

import shutil
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import yaml
from conftest import small_training

from trainer.errors import TrainerError, TrainingFailed
from trainer.fit import Run, averaged_weights, load_checkpoint
from trainer.fit_config import FitConfig, read_fit_config

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
        Run(changed(initial_weights=str(path), settings={"stages": 2}), folder)


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
