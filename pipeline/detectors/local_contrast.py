"""Targets of unknown size in one picture of unknown camera: small islands that clutter is not like.

1. The picture in 256 grey levels: 8 bits as they are, more bits scaled so that 99.8 % fit.
2. Candidates: peaks of the directional contrast at four sizes (`imaging/islands.py`), each grown
   into the island it is the top of. Edges, ridges, poles and roofs are no islands.
3. Score: seventeen figures of each island, its rim, its ring, the other islands and the picture go
   through a discriminant of twenty hidden units, fitted to synthetic clutter by
   `trainer fit-discriminant`. It has learnt to weigh them, not what a picture looks like.
4. Equivalent sigmas: how often, a pixel, islands of held-out synthetic clutter get such a score.
   On clutter unlike it the set rate is met only as far as that holds.

An island that reaches the picture's edge is not whole, and left out.
"""

import json
from functools import cache
from importlib.resources import files
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.component import Settings
from pipeline.detector import Detector, Signal
from pipeline.imaging.islands import describe, directional_contrast, find_islands, smoothed
from pipeline.imaging.regions import Image

GREY_LEVELS = 255.0
RANGE_PERCENT = (0.1, 99.9)


class Discriminant(NamedTuple):
    """Logarithm of target : clutter among candidates, and how many sigmas each `score` is worth.

    score = output · tanh(hidden · (features − mean) / scale + hidden_bias) + output_bias
    """

    mean: NDArray[np.float64]
    scale: NDArray[np.float64]
    hidden: NDArray[np.float64]
    hidden_bias: NDArray[np.float64]
    output: NDArray[np.float64]
    output_bias: NDArray[np.float64]
    score: NDArray[np.float64]
    sigmas: NDArray[np.float64]

    def scores(self, features: NDArray[np.float64]) -> NDArray[np.float64]:
        """Of islands (N, F), (N,)."""
        hidden = np.tanh((features - self.mean) / self.scale @ self.hidden.T + self.hidden_bias)
        result: NDArray[np.float64] = hidden @ self.output + self.output_bias
        return result

    def equivalent_sigmas(self, score: NDArray[np.float64]) -> NDArray[np.float64]:
        """By linear interpolation, beyond the table by its last slope."""
        slope = (self.sigmas[-1] - self.sigmas[-2]) / (self.score[-1] - self.score[-2])
        beyond = np.maximum(score - self.score[-1], 0.0) * slope
        result: NDArray[np.float64] = np.interp(score, self.score, self.sigmas) + beyond
        return result


@cache
def shipped_discriminant() -> Discriminant:
    """The one that `trainer fit-discriminant` wrote."""
    path = files("pipeline.detectors") / "local_contrast.json"
    stored = json.loads(path.read_text(encoding="utf-8"))
    return Discriminant(**{name: np.asarray(stored[name]) for name in Discriminant._fields})


class LocalContrast(Detector):
    """Calibrated on clutter; uses nothing of the sensor."""

    judges_shape = True

    class Config(Settings):
        """Nothing to set."""

    def signal(self, clean_HW: NDArray[Any]) -> Signal:
        """Each candidate's equivalent sigmas at its peak, falling to 0 at the island's foot."""
        grey_HW = smoothed(in_grey_levels(clean_HW))
        contrast_HW = directional_contrast(grey_HW)
        islands = find_islands(grey_HW, contrast_HW)
        snr_HW = np.zeros(grey_HW.shape, np.float32)
        if islands:
            weights = shipped_discriminant()
            features = describe(grey_HW, contrast_HW, islands)
            worth = weights.equivalent_sigmas(weights.scores(features))
            for island, sigmas in zip(islands, worth.tolist(), strict=True):
                x, y = island.corner
                share = island.share()
                here = snr_HW[y : y + share.shape[0], x : x + share.shape[1]]
                np.maximum(here, np.float32(sigmas) * share, out=here)
        return Signal(contrast_HW, snr_HW, np.ones_like(snr_HW))


def in_grey_levels(clean_HW: NDArray[Any]) -> Image:
    """Counts as float32 in which 8-bit pictures keep their levels."""
    image_HW = clean_HW.astype(np.float32)
    if clean_HW.dtype == np.uint8:
        return image_HW
    low, high = np.percentile(image_HW, RANGE_PERCENT)
    scaled: Image = (image_HW - np.float32(low)) * np.float32(GREY_LEVELS / max(high - low, 1.0))
    return scaled
