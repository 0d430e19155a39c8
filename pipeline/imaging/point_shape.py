"""Is a bright place shaped like point sources? Two tests that tell edges and hot pixels apart."""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.imaging.sampling import Integers, square_ring, surroundings, values_at
from pipeline.physics.psf import pixel_response

STANDS_OUT = 0.35
"""Least contrast over greatest. On generated scenes 0.53 and more for targets of peak SNR 8 and
more; 99 of 100 pieces of a horizon have less than 0.17."""

SPIKE_SHARE, SPIKE_SIGMAS = 0.75, 2.0
"""A spike's neighbours fall short of SPIKE_SHARE of a centred point source's by SPIKE_SIGMAS.
The share allows for a PSF 10 % narrower than it should be."""


def stands_out(image_HW: NDArray[Any], xy: Integers, far_px: int) -> NDArray[np.bool_]:
    """Places (N, 2) that are brighter than their surroundings, all round, (N,).

    A place's 3 × 3 pixels are compared with those of eight places far_px away. Against the mean
    of two that lie opposite each other, a ridge or a straight edge has no contrast in its own
    direction; against the third brightest, a corner has none, while up to two neighbouring
    targets are let be. The far levels are medians, which heed no hot pixel.
    """
    diagonal = round(far_px / math.sqrt(2.0))
    step = np.array([[far_px, 0], [0, far_px], [diagonal, diagonal], [diagonal, -diagonal]])
    far = surroundings(image_HW, xy[:, None, :] + np.concatenate([step, -step]))  # (N, 8, 9)
    level = np.sort(far, axis=-1)[..., 4].astype(np.float64)
    here = surroundings(image_HW, xy).mean(axis=1)
    across = here[:, None] - 0.5 * (level[:, :4] + level[:, 4:])
    around = here - np.sort(level, axis=1)[:, -3]
    least = np.minimum(across.min(axis=1), around)
    result: NDArray[np.bool_] = least >= STANDS_OUT * across.max(axis=1)
    return result


class SpikeTest:
    """Tells a single hot pixel from a point source seen through a PSF of sigma_px.

    A point source is least peaked off the middle of a pixel, so its eight neighbours show at
    least what they show of a centred one. Their excess over the local level, as a least-squares
    estimate of the central pixel, is compared with that pixel. At sigma_px 0.5 the estimate's
    noise is 2.1 sigma: spikes of 12 sigma and more are told in nearly all cases.
    """

    def __init__(self, sigma_px: float) -> None:
        response = pixel_response(np.asarray(1.0), 3, sigma_px)
        share = np.outer(response, response).ravel() / response[1] ** 2
        share[4] = 0.0
        self._weight = (share / (share @ share)).astype(np.float32)
        self._ring = square_ring(math.ceil(3.0 * sigma_px) + 1)
        # A median's variance is π/2 of a mean's.
        level_variance = 0.5 * math.pi / len(self._ring)
        level_share = float(self._weight.sum()) - SPIKE_SHARE
        self._deviation = math.sqrt(
            1.0 / float(share @ share) + SPIKE_SHARE**2 + level_share**2 * level_variance
        )

    def __call__(
        self, image_HW: NDArray[np.float32], xy: Integers, sigma: NDArray[np.float32]
    ) -> NDArray[np.bool_]:
        """Places (N, 2) that are single pixels, (N,); sigma (N,) is the noise of a pixel there."""
        ring = np.sort(values_at(image_HW, xy[:, None, :] + self._ring), axis=1)
        near = surroundings(image_HW, xy) - ring[:, len(self._ring) // 2, None]
        shortfall = SPIKE_SHARE * near[:, 4] - near @ self._weight
        result: NDArray[np.bool_] = shortfall > SPIKE_SIGMAS * self._deviation * sigma
        return result
