"""The training loop: data drawn as it trains, resumable to the bit, validated on unseen seeds."""

import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from pipeline.physics.groups import PROFILES, SIZE_PX, Profile, draw_patches
from trainer import registry
from trainer.data import TorchRandom, training_pairs
from trainer.errors import TrainerError, TrainingFailed
from trainer.fit_config import DETECTION_THRESHOLD, VALIDATION_SEED, FitConfig, fit_config
from trainer.metrics import cso_map, grid_rows
from trainer.network import UnmixingNetwork
from trainer.tensors import read_tensors
from trainer.units import to_network_units

CHECKPOINT = "checkpoint.pt"
LOG = "log.jsonl"
INITIAL_PAIRS = 20_000
"""Pairs that `fit_initial` is given."""


class Run:
    """A training run in a folder: checkpoint.pt, log.jsonl and loss.png are kept there."""

    def __init__(self, config: FitConfig, folder: Path, device: str = "cpu") -> None:
        self.config, self.folder, self.device = config, folder, device
        torch.manual_seed(config.seed)
        self.network = registry.build(config.network, config.settings).to(device)
        self.c: int = self.network.config.c
        self.profile = profile_for(config.profile, self.network)
        self.network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.rng = TorchRandom(config.seed, device)
        if config.initial_weights is not None:
            self._start_from(Path(config.initial_weights))
        self.network.fit_initial(*self._pairs(INITIAL_PAIRS, crowded=False))
        self.average = AveragedModel(
            self.network, multi_avg_fn=get_ema_multi_avg_fn(config.ema_decay), use_buffers=False
        )
        self.optimiser = torch.optim.Adam(self.network.parameters(), lr=config.learning_rate)
        self.step = 0
        self.seconds = 0.0
        self.records: list[dict[str, float]] = []

    def _start_from(self, path: Path) -> None:
        """Take over another run's averaged weights; what `fit_initial` computes is not kept."""
        try:
            self.network.load_state_dict(averaged_weights(load_checkpoint(path)))
        except RuntimeError as error:
            raise TrainerError(
                f"initial_weights {path}: of another network or other settings; "
                "use the settings of that run"
            ) from error

    def _pairs(self, number: int, *, crowded: bool) -> tuple[Tensor, Tensor]:
        return training_pairs(
            self.profile, number, self.c, self.config.scaling, self.rng, crowded=crowded
        )

    def save(self) -> None:
        """Write log, then checkpoint, each beside the old one it replaces: a kill leaves one whole.

        So the log always holds the record of the checkpoint's step.
        """
        state = {
            "config": self.config.model_dump(),
            "step": self.step,
            "seconds": self.seconds,
            "network": self.network.state_dict(),
            "average": self.average.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "generator": self.rng.generator.get_state(),
        }
        partial = self.folder / (LOG + ".part")
        partial.write_text("".join(json.dumps(record) + "\n" for record in self.records))
        partial.replace(self.folder / LOG)
        partial = self.folder / (CHECKPOINT + ".part")
        torch.save(state, partial)
        partial.replace(self.folder / CHECKPOINT)

    def resume(self) -> bool:
        """Continue from the folder's checkpoint, if there is one made with the same config."""
        path = self.folder / CHECKPOINT
        if not path.exists():
            return False
        state = load_checkpoint(path)
        before = fit_config(state["config"], str(path))  # fields it does not know: the defaults
        if before != self.config:
            was = before.model_dump()
            changed = [k for k, v in self.config.model_dump().items() if was[k] != v]
            raise TrainerError(
                f"{path}: made with another {', '.join(changed)}; use its config or another --out"
            )
        self.step, self.seconds = state["step"], state["seconds"]
        self.records = read_log(self.folder, self.step)
        self.network.load_state_dict(state["network"])
        self.average.load_state_dict(state["average"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.rng.generator.set_state(state["generator"].cpu())
        return True

    def train(self, on_step: Callable[[int], None] | None = None) -> Iterator[dict[str, float]]:
        """Train to the end; yields a record at every validation, after saving the checkpoint.

        on_step: called with the number of steps done, after each.
        """
        config = self.config
        loss_of = torch.compile(self.network.loss) if config.compile else self.network.loss
        kind = torch.device(self.device).type
        total, since = 0.0, 0
        started = time.monotonic() - self.seconds
        while self.step < config.steps:
            for group in self.optimiser.param_groups:
                group["lr"] = config.learning_rate * config.rate(self.step)
            crowded = self.step < config.crowded_share * config.steps
            patch, truth = self._pairs(config.batch, crowded=crowded)
            with torch.autocast(kind, torch.bfloat16, enabled=config.precision == "bf16"):
                loss = loss_of(patch, truth)
            self.optimiser.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(self.network.parameters(), config.clip_norm)
            self.optimiser.step()
            self.average.update_parameters(self.network)
            self.step += 1
            total, since = total + loss.item(), since + 1
            if on_step is not None:
                on_step(self.step)
            if self.step % config.validate_every == 0 or self.step == config.steps:
                if not math.isfinite(total):
                    raise TrainingFailed(
                        f"step {self.step}: the loss is not finite; lower learning_rate "
                        f"(now {config.learning_rate}) and start again"
                    )
                ap = self.validate()
                self.seconds = time.monotonic() - started
                record = {
                    "step": self.step,
                    "samples": self.step * config.batch,
                    "loss": total / since,
                    "cso_map": ap,
                    "seconds": round(self.seconds, 1),
                }
                self.records.append(record)
                self.save()
                yield record
                total, since = 0.0, 0

    def validate(self) -> float:
        """Grid CSO-mAP of the averaged weights on held-out patches of the profile."""
        patch, groups = draw_patches(
            self.profile, self.config.validate_samples, TorchRandom(VALIDATION_SEED)
        )
        signal, unit = to_network_units(
            patch,
            background=self.profile.background > 0.0,
            scaling=self.config.scaling,
            full_scale=self.profile.sensor.full_scale,
        )
        with torch.no_grad():
            maps = [self.average(part.to(self.device)).cpu() for part in signal.split(256)]
        found = grid_rows(torch.cat(maps).numpy(), unit.numpy(), self.c, DETECTION_THRESHOLD)
        true = [
            xy_px[:count]
            for xy_px, count in zip(groups.xy_px.numpy(), groups.count.tolist(), strict=True)
        ]
        return cso_map(found, true).mean


def profile_for(name: str, network: UnmixingNetwork) -> Profile:
    """The profile as a network's sensor sees it.

    A profile of real sensors (σ uncertain) takes the σ of the network, so that an engine can be
    trained for any sensor; a benchmark is what it is. Raises TrainerError if they do not agree.
    """
    if name not in PROFILES:
        raise TrainerError(f"profile: no `{name}`; use {', '.join(PROFILES)}")
    profile, config = PROFILES[name], network.config
    if profile.sigma_spread:
        profile = profile.at_sigma(config.sigma_px)
    for field, wanted in (("size_px", SIZE_PX), ("sigma_px", profile.sensor.sigma_px)):
        value = getattr(config, field)
        if value != wanted:
            raise TrainerError(
                f"settings: {field} is {value}, profile {name} has {wanted}; make them equal"
            )
    return profile


def read_log(folder: Path, step: int) -> list[dict[str, float]]:
    """The records of a run up to the checkpoint of `step`, that one included."""
    path = folder / LOG
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        records = [line for line in lines if line["step"] <= step]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TrainerError(
            f"{path}: cannot be read ({error}); restore it or train again"
        ) from error
    if not records or records[-1]["step"] != step:
        raise TrainerError(f"{path}: has no record of step {step}; restore it or train again")
    return records


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a run's checkpoint; raises TrainerError if it is none, or not whole."""
    keys = {"config", "step", "average"}
    return read_tensors(path, keys, "checkpoint of a run", "`trainer fit` writes one")


def averaged_weights(state: dict[str, Any]) -> dict[str, Tensor]:
    """The averaged weights of a checkpoint, named as in the network."""
    prefix = "module."
    return {
        name.removeprefix(prefix): value
        for name, value in state["average"].items()
        if name.startswith(prefix)
    }


def fit(config: FitConfig, folder: Path, device: str = "cpu") -> dict[str, float]:
    """Train (or go on training) in `folder` with a progress bar; returns the last record.

    Raises TrainerError for settings that cannot be, TrainingFailed if the loss is lost.
    """
    check_device(device)
    run = Run(config, folder, device)
    folder.mkdir(parents=True, exist_ok=True)
    run.resume()
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:.1f} %"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns) as progress:
        task = progress.add_task(config.network, total=config.steps, completed=run.step)
        for record in run.train(lambda step: progress.update(task, completed=step)):
            draw_curves(run.records, folder / "loss.png", config.network)
            text = f"{config.network}  loss {record['loss']:.2e}  CSO-mAP {record['cso_map']:.3f}"
            progress.update(task, description=text)
            if not progress.console.is_terminal:
                progress.console.print(f"{text}  step {record['step']} of {config.steps}")
    return run.records[-1]


def check_device(device: str) -> None:
    """Refuse a device torch does not have here."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise TrainerError(f"--device: no `{device}` here; use cpu") from error


def draw_curves(records: list[dict[str, float]], path: Path, title: str) -> None:
    """Loss and validation CSO-mAP over samples, as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4), layout="constrained")
    samples = [record["samples"] for record in records]
    left = figure.subplots()
    left.semilogy(samples, [record["loss"] for record in records], color="tab:blue")
    left.set(xlabel="samples seen", ylabel="training loss", title=title)
    right = left.twinx()
    right.plot(samples, [record["cso_map"] for record in records], color="tab:orange")
    right.set(ylabel="CSO-mAP on held-out patches", ylim=(0.0, 0.6))
    figure.savefig(path, dpi=100)
