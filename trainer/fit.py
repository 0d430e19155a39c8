"""The training loop: resumable to the bit, validated on unseen seeds, over one process or more."""

import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from pipeline.physics.groups import PROFILES, SIZE_PX, Profile
from trainer import registry
from trainer.curves import draw_curves
from trainer.data import DatasetPairs, DrawnPairs, Pairs, TorchRandom
from trainer.distributed import ALONE, LossFunction, Team
from trainer.errors import TrainerError, TrainingFailed
from trainer.fit_config import FitConfig, fit_config
from trainer.metrics import CsoMap
from trainer.network import UnmixingNetwork
from trainer.progress import shown
from trainer.tensors import read_tensors
from trainer.trained import load_weights, with_weights
from trainer.validation import held_out_cso_map

CHECKPOINT = "checkpoint.pt"
LOG = "log.jsonl"
INITIAL_PAIRS = 20_000
"""Pairs that `fit_initial` is given."""


class Run:
    """A training run in a folder, which keeps its checkpoint.pt and log.jsonl.

    In a team of processes each has its Run; only the one that leads has records and writes.
    Raises TrainerError for settings that cannot be.
    """

    def __init__(self, config: FitConfig, folder: Path, team: Team = ALONE) -> None:
        self.config, self.folder, self.team, self.device = config, folder, team, team.device
        if config.batch % team.world:
            raise TrainerError(
                f"batch: {config.batch} patches do not divide over {team.world} processes; "
                f"use a multiple of {team.world}"
            )
        if not registry.network_class(config.network).trained:
            raise TrainerError(
                f"network: {config.network} is a solver and has nothing to train; score it with "
                f"`trainer evaluate --network {config.network}`"
            )
        torch.manual_seed(config.seed)
        self.network = registry.build(config.network, config.settings).to(self.device)
        self.profile = profile_for(config.profile, self.network)
        self.network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.rng = TorchRandom(config.seed, self.device)
        self.pairs = self._pairs()
        if config.initial_weights is not None:
            self._start_from(Path(config.initial_weights))
        self.network.fit_initial(*self.pairs.initial(INITIAL_PAIRS))
        self.average = AveragedModel(
            self.network, multi_avg_fn=get_ema_multi_avg_fn(config.ema_decay), use_buffers=False
        )
        self.optimiser = torch.optim.Adam(self.network.parameters(), lr=config.learning_rate)
        self.step = 0
        self.seconds = 0.0
        self.records: list[dict[str, float]] = []

    def _start_from(self, path: Path) -> None:
        """Take over another network's weights; what `fit_initial` computes is not kept."""
        other = network_of(path)
        try:
            if type(other) is not type(self.network):
                raise RuntimeError(f"of {type(other).__name__}")
            self.network.start_from(other)
        except RuntimeError as error:
            raise TrainerError(
                f"initial_weights {path}: of another network or other settings; use the settings "
                "of that run, or for dista_net multiples of its channels"
            ) from error

    def _pairs(self) -> Pairs:
        if self.config.dataset is None:
            return DrawnPairs(self.config, self.profile, self.network, self.rng)
        return DatasetPairs(self.config, self.profile, self.network, self.device)

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
        loss = torch.compile(self.network.loss) if config.compile else self.network.loss
        loss_of = self.team.shared(self.network, loss)
        total, since = 0.0, 0
        started = time.monotonic() - self.seconds
        while self.step < config.steps:
            total, since = total + self._advance(loss_of), since + 1
            if on_step is not None:
                on_step(self.step)
            if self.step % config.validate_every == 0 or self.step == config.steps:
                mean_loss = self.team.mean(total / since)
                if not math.isfinite(mean_loss):
                    raise TrainingFailed(
                        f"step {self.step}: the loss is not finite; lower learning_rate "
                        f"(now {config.learning_rate}) and start again"
                    )
                if self.team.leads:
                    yield self._keep(mean_loss, started)
                self.team.wait()
                total, since = 0.0, 0

    def _advance(self, loss_of: LossFunction) -> float:
        """One optimiser step; the loss before it, of this process's rows."""
        config = self.config
        for group in self.optimiser.param_groups:
            group["lr"] = config.learning_rate * config.rate(self.step)
        patch, truth = map(self.team.rows, self.pairs.batch(self.step))
        kind = torch.device(self.device).type
        with torch.autocast(kind, torch.bfloat16, enabled=config.precision == "bf16"):
            loss = loss_of(patch, truth)
        self.optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.network.parameters(), config.clip_norm)
        self.optimiser.step()
        self.average.update_parameters(self.network)
        self.step += 1
        return loss.item()

    def _keep(self, loss: float, started: float) -> dict[str, float]:
        """Validate, and save checkpoint and record, which is returned."""
        scored = self.validate()
        self.seconds = time.monotonic() - started
        record = {
            "step": self.step,
            "samples": self.step * self.config.batch,
            "loss": loss,
            "cso_map": scored.mean,
            **{f"ap_{threshold:.2f}": ap for threshold, ap in scored.ap.items()},
            "seconds": round(self.seconds, 3),
        }
        self.records.append(record)
        self.save()
        return record

    def validate(self) -> CsoMap:
        """CSO-mAP of the averaged weights on held-out patches of the profile."""
        config = self.config
        return held_out_cso_map(
            self.average,
            self.network,
            self.profile,
            config.scaling,
            config.validate_samples,
            self.device,
        )


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


def network_of(path: Path) -> UnmixingNetwork:
    """The network of a run's checkpoint (its averaged weights), or of a weights file.

    Raises TrainerError if the file is neither, or not whole.
    """
    if "manifest" in read_tensors(path, set(), "checkpoint or weights file", "name one"):
        return load_weights(path).network
    state = load_checkpoint(path)
    config = fit_config(state["config"], str(path))
    try:
        return with_weights(config.network, config.settings, averaged_weights(state))
    except TrainerError as error:
        raise TrainerError(f"{path}: {error}") from error


def averaged_weights(state: dict[str, Any]) -> dict[str, Tensor]:
    """The averaged weights of a checkpoint, named as in the network."""
    prefix = "module."
    return {
        name.removeprefix(prefix): value
        for name, value in state["average"].items()
        if name.startswith(prefix)
    }


def fit(config: FitConfig, folder: Path, team: Team = ALONE) -> dict[str, float] | None:
    """Train (or go on training) in `folder` and show progress; returns the last record.

    The folder also gets the run's curves: loss.png, and a file for TensorBoard. In a team of
    processes all must see the same folder; only the one that leads returns a record. Raises
    TrainerError for settings that cannot be, TrainingFailed if the loss is lost.
    """
    run = Run(config, folder, team)
    folder.mkdir(parents=True, exist_ok=True)
    resumed = run.resume()
    if team.mean(run.step) != run.step:
        raise TrainerError(f"{folder}: not the same for all processes; use a folder they share")
    if resumed and team.leads:
        draw_curves(run.records, config, folder)
    with shown(config, run.step, hidden=not team.leads) as progress:
        for _ in run.train(progress.advance):
            draw_curves(run.records, config, folder)
            progress.tell(run.records)
    return run.records[-1] if team.leads else None
