"""Runs the stage `detect` over frames and scores what it finds."""

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.component import Context, available
from pipeline.errors import PipelineError
from pipeline.evaluation.frames import Frames
from pipeline.evaluation.score import DetectionScore, predicted_mask, regions_of
from pipeline.stages.detect import Detect

RATES = tuple(np.geomspace(0.003, 30.0, 9).tolist())
"""False alarms a frame set for the points of a ROC."""

UNKNOWN_CAMERA = Detect.Config(
    detector={"kind": "local_contrast"}, false_alarms_per_frame=0.03, min_sigmas=4.0
)
"""For pictures of cameras of which nothing is known, targets being of any size: one false alarm in
33 pictures, whatever their size. On synthetic clutter that was 13e-6 of the pixels."""


def evaluate(
    frames: Frames, config: Detect.Config, bad_pixels_HW: NDArray[np.bool_] | None = None
) -> DetectionScore:
    """Score one configuration of the stage; a detector that remembers sees them as a sequence."""
    score, stage = DetectionScore(), Detect.build(config, Context(frames.sensor, bad_pixels_HW))
    for frame in frames:
        started = time.perf_counter()
        try:
            found = stage.search(frame.pixels_HW)
        except PipelineError as error:
            raise PipelineError(f"{frame.name}: {error}") from error
        seconds = time.perf_counter() - started
        predicted = regions_of(predicted_mask(found.snr_HW, found.points))
        score.add(frame.true_xy_px, predicted, frame.pixels_HW.size, seconds)
    return score


def roc(
    frames: Frames,
    configs: dict[str, Detect.Config],
    rates: Sequence[float] = RATES,
    bad_pixels_HW: NDArray[np.bool_] | None = None,
) -> dict[str, list[dict[str, Any]]]:
    """For each named configuration its scores at all rates; thresholds have no lower limit."""
    return {
        name: [
            {
                "set_false_alarms_per_frame": rate,
                **evaluate(
                    frames,
                    config.model_copy(update={"false_alarms_per_frame": rate, "min_sigmas": 2.0}),
                    bad_pixels_HW,
                ).to_json(),
            }
            for rate in rates
        ]
        for name, config in configs.items()
    }


def all_detectors(frames: Frames) -> dict[str, Detect.Config]:
    """Every detector with its defaults; those that need a sequence only where there is one."""
    names = [name for name in available("detector") if frames.in_sequence or name != "temporal"]
    return {name: Detect.Config(detector={"kind": name}) for name in names}
