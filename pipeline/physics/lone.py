"""One bright target that saturates its core, recognised by the model before the network is asked.

A network has seen few saturated cores, and takes a wide one for several targets. The model knows
better: the wings of such a target stand far above the noise, so a companion would show in the χ²
of a fit with one target, and where it does not, the fit is the answer.
"""

import numpy as np

from pipeline.physics.candidates import Candidates
from pipeline.physics.fit import Groups, Window, fit
from pipeline.physics.inverse import inverses
from pipeline.physics.psf import peak_fraction
from pipeline.physics.sensor import Sensor

MAX_CHI2 = 1.5
"""Reduced; of 400 lone saturated targets 90 % are below 1.2, of six together above 32."""


def lone_targets(window: Window, sensor: Sensor) -> Candidates:
    """The target of each patch with saturated pixels that one target explains."""
    saturated = window.usable_BHW & (window.counts_BHW >= sensor.full_scale)
    rows = np.flatnonzero(saturated.any(axis=(1, 2)))
    here, core = window.take(rows), saturated[rows]
    number = core.sum(axis=(1, 2))
    x = np.sum(core.sum(axis=1) * np.arange(core.shape[2]), axis=1) / np.maximum(number, 1)
    y = np.sum(core.sum(axis=2) * np.arange(core.shape[1]), axis=1) / np.maximum(number, 1)
    intensity = (1 + number) * sensor.full_scale / peak_fraction(sensor.sigma_px)
    xy_px = np.stack([x, y], axis=1)
    start = Groups.start(xy_px[:, None], intensity[:, None], np.ones((len(rows), 1), np.bool_))
    found = fit(here, start, sensor, iterations=40)
    good = found.converged & (found.reduced_chi2 < MAX_CHI2)
    bound = (
        inverses(found.information)[good] * np.maximum(found.reduced_chi2, 1.0)[good, None, None]
    )
    certain = np.ones(int(good.sum()))
    return Candidates(
        patch=rows[good],
        xy_px=found.xy_px[good, 0],
        intensity=found.intensity[good, 0],
        refined=certain > 0.0,
        p_exist=certain,
        p_count=certain,
        cov_px2=bound[:, [0, 0, 1], [0, 1, 1]],
        intensity_sigma=np.sqrt(bound[:, 2, 2]),
    )


def with_lone(candidates: Candidates, lone: Candidates) -> Candidates:
    """The candidates, those of a patch with a lone target replaced by it."""
    others = candidates.take(~np.isin(candidates.patch, lone.patch))
    joined = Candidates(
        **{
            name: np.concatenate([getattr(others, name), getattr(lone, name)])
            for name in Candidates._fields
        }
    )
    return joined.take(np.argsort(joined.patch, kind="stable"))
