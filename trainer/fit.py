"""The training loop: data drawn as it trains, resumable to the bit, validated on unseen seeds."""

import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from engines.scaling import Scaling
from pipeline.physics.grid import grid_detections
from pipeline.physics.groups import PROFILES, draw_patches
from pipeline.physics.score import cso_map
from trainer import registry
from trainer.data import TorchRandom, to_network_units, training_pairs
from trainer.errors import TrainerError

VALIDATION_SEED = 900_001
DETECTION_THRESHOLD = 50 / 255
CHECKPOINT = "checkpoint.pt"


class FitConfig(BaseModel):
    """One training run; everything that decides its result."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    network: str = "dista_net"
    settings: dict[str, Any] = Field(default_factory=dict, description="the network's own Config")
    profile: str = "csist-100k"
    scaling: Scaling = "full_scale"
    seed: int = Field(1, ge=0, lt=VALIDATION_SEED)
    samples: int = Field(1_000_000, gt=0, description="patches drawn in the whole run")
    crowded_share: float = Field(
        0.0, ge=0.0, le=1.0, description="share of the run on crowded patches"
    )
    batch: int = Field(64, gt=0)
    learning_rate: float = Field(1e-3, gt=0)
    warmup: float = Field(0.02, ge=0.0, lt=1.0, description="share of the run with rising rate")
    ema_decay: float = Field(0.999, ge=0.0, lt=1.0)
    clip_norm: float = Field(1.0, gt=0)
    precision: Literal["fp32", "bf16"] = "fp32"
    compile: bool = False
    validate_every: int = Field(500, gt=0, description="steps")
    validate_samples: int = Field(1000, gt=0)

    @property
    def steps(self) -> int:
        """Optimiser steps in the whole run."""
        return math.ceil(self.samples / self.batch)

    def rate(self, step: int) -> float:
        """Learning rate as a share of the peak: linear warm-up, then a cosine to zero."""
        warm = max(1, round(self.warmup * self.steps))
        if step < warm:
            return (step + 1) / warm
        return 0.5 * (1.0 + math.cos(math.pi * (step - warm) / max(1, self.steps - warm)))


class Run:
    """A training run in a folder: checkpoint.pt, log.jsonl and loss.png are kept there."""

    def __init__(self, config: FitConfig, folder: Path, device: str = "cpu") -> None:
        if config.profile not in PROFILES:
            raise TrainerError(f"profile: no `{config.profile}`; use {', '.join(PROFILES)}")
        self.config, self.folder, self.device = config, folder, device
        self.profile = PROFILES[config.profile]
        torch.manual_seed(config.seed)
        self.network = registry.build(config.network, config.settings).to(device)
        self.c: int = self.network.config.c
        self.network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.rng = TorchRandom(config.seed, device)
        self.network.fit_initial(*self._pairs(20_000, crowded=False))
        self.average = AveragedModel(
            self.network, multi_avg_fn=get_ema_multi_avg_fn(config.ema_decay), use_buffers=False
        )
        self.optimiser = torch.optim.Adam(self.network.parameters(), lr=config.learning_rate)
        self.step = 0
        self.seconds = 0.0

    def _pairs(self, number: int, *, crowded: bool) -> tuple[Tensor, Tensor]:
        return training_pairs(
            self.profile, number, self.c, self.config.scaling, self.rng, crowded=crowded
        )

    def save(self) -> None:
        """Write the checkpoint beside the old one, then replace it: a kill leaves one whole."""
        state = {
            "config": self.config.model_dump(),
            "step": self.step,
            "seconds": self.seconds,
            "network": self.network.state_dict(),
            "average": self.average.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "generator": self.rng.generator.get_state(),
        }
        partial = self.folder / (CHECKPOINT + ".part")
        torch.save(state, partial)
        partial.replace(self.folder / CHECKPOINT)

    def resume(self) -> bool:
        """Continue from the folder's checkpoint, if there is one made with the same config."""
        path = self.folder / CHECKPOINT
        if not path.exists():
            return False
        state = load_checkpoint(path)
        if state["config"] != self.config.model_dump():
            changed = [
                k for k, v in self.config.model_dump().items() if state["config"].get(k) != v
            ]
            raise TrainerError(
                f"{path}: made with another {', '.join(changed)}; use its config or another --out"
            )
        self.step, self.seconds = state["step"], state["seconds"]
        self.network.load_state_dict(state["network"])
        self.average.load_state_dict(state["average"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.rng.generator.set_state(state["generator"].cpu())
        return True

    def train(self) -> Iterator[dict[str, float]]:
        """Train to the end; yields a record at every validation, after saving the checkpoint."""
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
            if self.step % config.validate_every == 0 or self.step == config.steps:
                if not math.isfinite(total):
                    raise TrainerError(
                        f"step {self.step}: the loss is not finite; lower learning_rate "
                        f"(now {config.learning_rate}) and start again"
                    )
                ap = self.validate()
                self.seconds = time.monotonic() - started
                self.save()
                yield {
                    "step": self.step,
                    "samples": self.step * config.batch,
                    "loss": total / since,
                    "cso_map": ap,
                    "seconds": round(self.seconds, 1),
                }
                total, since = 0.0, 0

    def validate(self) -> float:
        """Grid CSO-mAP of the averaged weights on held-out patches of the profile."""
        truth_rng = TorchRandom(VALIDATION_SEED)
        patch, groups = draw_patches(self.profile, self.config.validate_samples, truth_rng)
        signal, unit = to_network_units(patch, self.profile, self.config.scaling)
        with torch.no_grad():
            chunks = [self.average(chunk.to(self.device)).cpu() for chunk in signal.split(256)]
        peaks = grid_detections(torch.cat(chunks).numpy(), self.c, DETECTION_THRESHOLD)
        score = peaks.value * unit.numpy()[peaks.image]
        rows = torch.tensor(score)[:, None].numpy()
        found = [
            torch.cat([torch.tensor(peaks.xy_px), torch.tensor(rows)], dim=1).numpy()[
                peaks.image == i
            ]
            for i in range(len(patch))
        ]
        true = [
            xy[:count].numpy()
            for xy, count in zip(groups.xy_px, groups.count.tolist(), strict=True)
        ]
        return cso_map(found, true).mean


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint: tensors and plain types only, never code."""
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise TrainerError(
            f"{path}: not a readable checkpoint ({error}); delete it or restore it"
        ) from error
    return state


def fit(config: FitConfig, folder: Path, device: str = "cpu") -> dict[str, float]:
    """Train (or go on training) in `folder` with a progress bar; returns the last record."""
    folder.mkdir(parents=True, exist_ok=True)
    run = Run(config, folder, device)
    resumed = run.resume()
    log = folder / "log.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()] if resumed else []
    records: list[dict[str, float]] = [line for line in lines if line["step"] <= run.step]
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:.1f} %"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns) as progress:
        task = progress.add_task(config.network, total=config.steps, completed=run.step)
        for record in run.train():
            records.append(record)
            log.write_text("".join(json.dumps(line) + "\n" for line in records))
            draw_curves(records, folder / "loss.png", config.network)
            text = f"{config.network}  loss {record['loss']:.2e}  CSO-mAP {record['cso_map']:.3f}"
            progress.update(task, completed=record["step"], description=text)
            if not progress.console.is_terminal:
                progress.console.print(f"{text}  step {record['step']} of {config.steps}")
    return records[-1]


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
