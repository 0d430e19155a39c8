"""Unmixing without a network: greedy on the imaging model, for sensors no engine was made for.

The patch's brightest point is the first target; the fit adds targets where the counts call for
more, merges what they do not need, and refines all together (`select`). It needs no training and
serves any σ, but where several numbers of targets explain the counts it knows no better than the
penalty: closely spaced targets are told apart later than by a network.
"""

import numpy as np

from pipeline.physics.candidates import Candidates
from pipeline.physics.fit import NOTHING_KNOWN, Priors, Window
from pipeline.physics.psf import peak_fraction
from pipeline.physics.refine import PENALTY, Refined, refine
from pipeline.physics.sensor import Sensor

MOST = 8
"""Targets of a patch."""

MODEL = "model"
"""What `engine` is called where there is none."""


def unmix_by_model(
    window: Window, sensor: Sensor, priors: Priors = NOTHING_KNOWN, penalty: float = PENALTY
) -> Refined:
    """Targets of each patch; none where nothing rises above the local background."""
    signal = np.where(window.usable_BHW, window.counts_BHW - window.background_BHW, 0.0)
    height, width = signal.shape[1:]
    flat = signal.reshape(len(signal), height * width)
    patch = np.flatnonzero(flat.max(axis=1, initial=0.0) > 0.0)
    place = flat[patch].argmax(axis=1)
    y, x = np.divmod(place, width)
    intensity = flat[patch, place] / peak_fraction(sensor.sigma_px)
    start = Candidates.unsure(patch, np.stack([x, y], axis=1).astype(np.float64), intensity)
    return refine(window, start, sensor, priors, penalty=penalty, additions=MOST - 1)
