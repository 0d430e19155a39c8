"""The manifest of a detector of whole frames in the layout of YOLO, `NAME.json` for `NAME.onnx`."""

import math
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from engines.frame_input import Stretch
from engines.manifest import EngineManifest, parse_manifest

MAX_SCORE = 1.0 - 1e-6
"""Scores are taken as no surer than this: their log-odds stay finite."""

Platt = tuple[float, Annotated[float, Field(ge=-20.0, le=20.0)]]
Label = Annotated[str, Field(min_length=1, max_length=64)]


class DetectorManifest(EngineManifest):
    """Of a network that boxes objects in frames (B, channels, height, width).

    It answers with (B, 4 + classes, candidates), a box and a score for each class in every column
    (`raw`), or with (B, candidates, 6), each row a box's corners, score and class (`nms`). Boxes
    are in pixels of the input, of which the first spans 0 to 1.

    calibration: of a class, a and b by which a box of score s holds a point source with log-odds
    a · log(s/(1 − s)) + b (Platt). Without, a score is believed as it is, and a box of a class
    that is no point source is one with 1 − s.
    """

    format: Literal["irst-detector/1"] = "irst-detector/1"  # type: ignore[assignment]
    classes: tuple[Label, ...] = Field(min_length=1, max_length=1000)
    point_sources: tuple[Label, ...] = Field(description="those of the classes that are targets")
    channels: Literal[1, 3] = Field(3, description="3: the frame thrice")
    height: int = Field(ge=32, le=8192)
    width: int = Field(ge=32, le=8192)
    candidates: int = Field(ge=1, le=1_000_000)
    output: Literal["raw", "nms"] = "raw"
    box: Literal["cxcywh", "xyxy"] = Field("cxcywh", description="what a raw column begins with")
    stretch: Stretch = "percentile"
    resize: bool = Field(
        True, description="frames are scaled to fit, as pictures are; false: tiles, pixel by pixel"
    )
    min_score: float = Field(0.1, gt=0.0, lt=1.0, description="boxes below are not looked at")
    overlap: float = Field(0.5, gt=0.0, lt=1.0, description="IoU above which the weaker goes")
    max_objects: int = Field(300, ge=1, le=1000, description="of a frame, the best")
    margin_px: float = Field(0.0, ge=0.0, description="of a box round its target, frame pixels")
    centre_sigma_px: float = Field(
        1.0, gt=0.0, description="error of a box's middle along an axis, frame pixels"
    )
    calibration: dict[Label, Platt] = Field(default_factory=dict)
    prior: float = Field(
        0.5, gt=0.0, lt=1.0, description="share of boxes that are point sources, where calibrated"
    )
    missed: float = Field(
        1.0,
        gt=0.0,
        description="how much rarer it is that a point source has no box than that clutter has "
        "none: the ratio of likelihoods of seeing nothing",
    )
    ece: float | None = Field(None, ge=0.0, le=1.0, description="calibration error, held out")
    data: str = Field("", description="what it was trained on")

    @model_validator(mode="after")
    def _consistent(self) -> "DetectorManifest":
        if len(set(self.classes)) < len(self.classes):
            raise ValueError("classes: a name is there twice")
        for field in ("point_sources", "calibration"):
            for label in getattr(self, field):
                if label not in self.classes:
                    raise ValueError(f"{field}: `{label}` is none of {', '.join(self.classes)}")
        return self

    @property
    def patch_shape(self) -> tuple[int, ...]:
        """Of one input: (channels, height, width)."""
        return (self.channels, self.height, self.width)

    @property
    def map_shape(self) -> tuple[int, ...]:
        """Of one output."""
        if self.output == "nms":
            return (self.candidates, 6)
        return (4 + len(self.classes), self.candidates)

    def is_point_source(self, label_K: NDArray[np.int32]) -> NDArray[np.bool_]:
        """Which of these classes (rows of `classes`) are targets."""
        return np.isin(label_K, [self.classes.index(label) for label in self.point_sources])

    def target_odds(
        self, label_K: NDArray[np.int32], score_K: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        """Log-odds (K,) that boxes of these classes and scores hold a point source."""
        table = np.array(
            [self.calibration.get(label, self._believed(label)) for label in self.classes]
        )
        score = np.clip(score_K, 1.0 - MAX_SCORE, MAX_SCORE)
        a, b = table[label_K].T if len(label_K) else (0.0, 0.0)
        odds: NDArray[np.float64] = a * np.log(score / (1.0 - score)) + b
        return odds

    def _believed(self, label: str) -> tuple[float, float]:
        return (1.0, 0.0) if label in self.point_sources else (-1.0, 0.0)

    @property
    def prior_odds(self) -> float:
        """Log-odds of a point source before a box's score is known."""
        return math.log(self.prior / (1.0 - self.prior))


def read_detector_manifest(path: Path) -> DetectorManifest:
    """Read and check a manifest; raises EngineError naming the field that is wrong."""
    return parse_manifest(path, DetectorManifest)
