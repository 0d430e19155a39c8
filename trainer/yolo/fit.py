"""Trains the detector on frames drawn as it trains; interrupted, it goes on."""

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from engines.errors import first_fault
from engines.frame_input import Stretch, stretched
from pipeline.errors import PipelineError
from pipeline.formats.yaml_map import read_yaml_map
from trainer.clutter import KINDS
from trainer.errors import TrainerError, TrainingFailed
from trainer.tensors import read_tensors
from trainer.yolo.network import YoloNetwork
from trainer.yolo.scenes import LabelledFrame, SceneDraw, draw_frame

STRETCH: Stretch = "noise"
CHECKPOINT = "checkpoint.pt"
LOG = "log.jsonl"
MAX_OBJECTS = 40
"""Boxes of a frame that are learnt from."""


class YoloFit(BaseModel):
    """One training run; everything that decides its result."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    settings: YoloNetwork.Config = YoloNetwork.Config()
    kinds: tuple[str, ...] = Field(tuple(KINDS), min_length=1, description="of `trainer.clutter`")
    height: int = Field(128, ge=64, multiple_of=16)
    width: int = Field(160, ge=64, multiple_of=16)
    seed: int = Field(1, ge=0, lt=800_001, description="of frames to learn from, and weights")
    samples: int = Field(32_000, gt=0, description="frames seen in the whole run")
    batch: int = Field(16, gt=0)
    learning_rate: float = Field(3e-3, gt=0)
    warmup: float = Field(0.03, ge=0.0, lt=1.0)
    ema_decay: float = Field(0.99, ge=0.0, lt=1.0)
    clip_norm: float = Field(5.0, gt=0)
    save_every: int = Field(100, gt=0, description="steps")

    @property
    def steps(self) -> int:
        """Optimiser steps in the whole run."""
        return math.ceil(self.samples / self.batch)

    @property
    def draw(self) -> SceneDraw:
        """The frames it is trained on."""
        return SceneDraw(self.height, self.width, self.kinds)

    def rate(self, step: int) -> float:
        """Learning rate as a share of the peak: linear warm-up, then a cosine to zero."""
        warm = max(1, round(self.warmup * self.steps))
        if step < warm:
            return (step + 1) / warm
        return 0.5 * (1.0 + math.cos(math.pi * (step - warm) / max(1, self.steps - warm)))


def read_yolo_fit(path: Path | None, **overrides: int | None) -> YoloFit:
    """What the YAML file says (nothing: the defaults), then `overrides` that are not None."""
    try:
        fields = read_yaml_map(path) if path else {}
    except PipelineError as error:
        raise TrainerError(str(error)) from error
    fields.update({name: value for name, value in overrides.items() if value is not None})
    return checked_fit(fields, str(path or "fit yolo"))


def checked_fit(fields: dict[str, Any], where: str) -> YoloFit:
    """The fields of a run; raises TrainerError naming `where` and the field."""
    try:
        config = YoloFit.model_validate(fields)
    except ValidationError as error:
        known = ", ".join(YoloFit.model_fields)
        raise TrainerError(f"{where}: {first_fault(error)}; known: {known}") from error
    for kind in config.kinds:
        if kind not in KINDS:
            raise TrainerError(f"{where}: kinds: no `{kind}`; use {', '.join(KINDS)}")
    return config


def batch_of(frames: list[LabelledFrame], full_scale: int) -> tuple[Tensor, Tensor]:
    """Inputs (B, 1, H, W) and targets (B, K, 5): class, x0, y0, x1, y1 as shares of the frame."""
    images = np.stack([stretched(frame.pixels_HW, STRETCH, full_scale) for frame in frames])
    height, width = images.shape[1:]
    targets = np.zeros((len(frames), MAX_OBJECTS, 5), np.float32)
    for row, frame in zip(targets, frames, strict=True):
        number = min(len(frame.label), MAX_OBJECTS)
        chosen = np.argsort(frame.label, kind="stable")[:number]  # clutter last
        row[:number, 0] = frame.label[chosen]
        row[:number, 1:] = (frame.box_px[chosen] + 0.5) / (width, height, width, height)
    return torch.from_numpy(images[:, None]), torch.from_numpy(targets)


def fit_yolo(config: YoloFit, folder: Path, on_step: Callable[[int], None]) -> dict[str, float]:
    """Train (or go on training) in `folder`, which keeps checkpoint.pt and log.jsonl.

    Returns the last record: step, samples, loss, seconds. Raises TrainingFailed if the loss is
    lost.
    """
    torch.manual_seed(config.seed)
    network = YoloNetwork(config.settings).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    average = AveragedModel(
        network, multi_avg_fn=get_ema_multi_avg_fn(config.ema_decay), use_buffers=True
    )
    optimiser = torch.optim.AdamW(network.parameters(), lr=config.learning_rate, weight_decay=1e-3)
    parts: dict[str, Any] = {"network": network, "average": average, "optimiser": optimiser}
    step, seconds, records = _resumed(config, folder, parts)
    started = time.monotonic() - seconds
    folder.mkdir(parents=True, exist_ok=True)
    total, since = 0.0, 0
    network.train()
    while step < config.steps:
        for group in optimiser.param_groups:
            group["lr"] = config.learning_rate * config.rate(step)
        numbers = range(step * config.batch, (step + 1) * config.batch)
        frames = [draw_frame(config.draw, np.random.default_rng([config.seed, n])) for n in numbers]
        loss = network(*batch_of(frames, config.draw.sensor.full_scale))
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), config.clip_norm)
        optimiser.step()
        average.update_parameters(network)
        step, total, since = step + 1, total + loss.item(), since + 1
        on_step(step)
        if step % config.save_every == 0 or step == config.steps:
            if not math.isfinite(total):
                raise TrainingFailed(
                    f"step {step}: the loss is not finite; lower learning_rate "
                    f"(now {config.learning_rate}) and start again"
                )
            seconds = time.monotonic() - started
            record = {"step": step, "samples": step * config.batch, "loss": total / since}
            records.append({**record, "seconds": round(seconds, 3)})
            _save(config, folder, parts, step, seconds, records)
            total, since = 0.0, 0
    return records[-1]


def _save(
    config: YoloFit,
    folder: Path,
    parts: dict[str, Any],
    step: int,
    seconds: float,
    records: list[dict[str, float]],
) -> None:
    (folder / LOG).write_text("".join(json.dumps(record) + "\n" for record in records))
    partial = folder / (CHECKPOINT + ".part")
    state = {name: part.state_dict() for name, part in parts.items()}
    facts = {"config": config.model_dump(mode="json"), "step": step, "seconds": seconds}
    torch.save({**state, **facts, "records": records}, partial)
    partial.replace(folder / CHECKPOINT)


def _resumed(
    config: YoloFit, folder: Path, parts: dict[str, Any]
) -> tuple[int, float, list[dict[str, float]]]:
    """Where to go on, the state taken over; the beginning without a checkpoint."""
    path = folder / CHECKPOINT
    if not path.exists():
        return 0, 0.0, []
    state = load_run(path)
    if checked_fit(state["config"], str(path)) != config:
        raise TrainerError(f"{path}: made with another config; use that one or another --out")
    for name, part in parts.items():
        part.load_state_dict(state[name])
    return state["step"], state["seconds"], state["records"]


def load_run(path: Path) -> dict[str, Any]:
    """A run's checkpoint; raises TrainerError if it is none, or not whole."""
    keys = {"config", "step", "average", "records"}
    return read_tensors(path, keys, "checkpoint of a run", "`trainer fit yolo` writes one")


def trained_network(state: dict[str, Any]) -> YoloNetwork:
    """The averaged network of a checkpoint, ready to infer."""
    network = YoloNetwork(checked_fit(state["config"], "checkpoint").settings)
    average = AveragedModel(network, use_buffers=True)
    average.load_state_dict(state["average"])
    trained = average.module
    assert isinstance(trained, YoloNetwork)  # noqa: S101, what was put in
    return trained.eval()
