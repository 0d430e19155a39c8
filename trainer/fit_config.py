"""What decides the result of a training run, and its YAML file."""

import math
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator

from engines.errors import first_fault
from engines.scaling import Scaling
from pipeline.errors import PipelineError
from pipeline.formats.yaml_map import read_yaml_map
from trainer.errors import TrainerError

VALIDATION_SEED = 900_001
BENCHMARK_SEED = 20261122
"""Of the benchmark's images; no run trains or validates on them."""

DETECTION_THRESHOLD = 50 / 255
"""Network units; the literature's 50 of 255."""


class FitConfig(BaseModel):
    """One training run; everything that decides its result."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    network: str = "dista_net"
    settings: dict[str, Any] = Field(default_factory=dict, description="the network's own Config")
    profile: str = "csist-100k"
    scaling: Scaling = "full_scale"
    seed: int = Field(1, ge=0, lt=VALIDATION_SEED)
    samples: int = Field(1_000_000, gt=0, description="patches seen in the whole run")
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
    initial_weights: str | None = Field(
        None, description="checkpoint.pt of another run, or a weights file, to start from"
    )
    dataset: str | None = Field(
        None, description="CSIST zarr to train on, over and over; without, patches are drawn"
    )

    @field_validator("dataset")
    @classmethod
    def _not_crowded(cls, dataset: str | None, others: ValidationInfo) -> str | None:
        if dataset is not None and others.data.get("crowded_share"):
            raise ValueError("cannot be crowded (set crowded_share to 0)")
        return dataset

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


def fit_config(fields: dict[str, Any], where: str) -> FitConfig:
    """Check the fields of a run; raises TrainerError naming `where` and the field."""
    try:
        return FitConfig.model_validate(fields)
    except ValidationError as error:
        known = ", ".join(FitConfig.model_fields)
        raise TrainerError(f"{where}: {first_fault(error)}; known: {known}") from error


def read_fit_config(path: Path | None, network: str, **overrides: int | str | None) -> FitConfig:
    """The run of `network`: what the YAML file says (nothing: the defaults), then `overrides`.

    Overrides that are None say nothing. Raises TrainerError naming file and field.
    """
    try:
        fields = read_yaml_map(path) if path else {}
    except PipelineError as error:
        raise TrainerError(str(error)) from error
    if fields.setdefault("network", network) != network:
        raise TrainerError(
            f"{path}: network: is for `{fields['network']}`; run `trainer fit {fields['network']}`"
        )
    fields.update({name: value for name, value in overrides.items() if value is not None})
    return fit_config(fields, str(path or "fit"))
