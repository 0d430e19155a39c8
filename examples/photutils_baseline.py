"""Grouped PSF photometry by photutils on a CSIST dataset, scored as `trainer evaluate` scores.

    pip install photutils
    trainer generate --profile interior --count 300 --seed 31 interior.zarr
    python examples/photutils_baseline.py interior.zarr --images 300

Pixel-integrated Gaussian PSF of the sensor's σ, saturated pixels masked, errors by the sensor's
noise, the local background taken away as the pipeline does. All stars of a patch are one group.
"""

import argparse
import json
import math
import time
import warnings
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from photutils.detection import DAOStarFinder
from photutils.psf import (
    CircularGaussianPRF,
    IterativePSFPhotometry,
    PSFPhotometry,
    SourceGrouper,
)

from pipeline.formats.csist import read_csist
from pipeline.physics.noise import pixel_noise
from pipeline.physics.sensor import Sensor
from trainer.metrics import count_accuracy, cso_map, cso_map_interval, matched_errors
from trainer.units import to_network_units

Array64 = NDArray[np.float64]


def photometry(sensor: Sensor, threshold: float, args: argparse.Namespace) -> PSFPhotometry:
    """The method with these settings; threshold: counts."""
    fwhm = 2.0 * math.sqrt(2.0 * math.log(2.0)) * sensor.sigma_px
    finder = DAOStarFinder(
        threshold,
        fwhm,
        sharpness_range=(-1e3, 1e3),
        roundness_range=(-1e3, 1e3),
        min_separation=0.0,
    )
    common = {
        "finder": finder,
        "grouper": SourceGrouper(11.0 * math.sqrt(2.0)),
        "aperture_radius": 2.0 * sensor.sigma_px + 0.5,
        "xy_bounds": args.bounds,
    }
    model = CircularGaussianPRF(fwhm=fwhm)
    shape = (args.fit_shape, args.fit_shape)
    if args.mode == "single":
        return PSFPhotometry(model, shape, **common)
    return IterativePSFPhotometry(model, shape, mode=args.mode, maxiters=args.rounds, **common)


def stars(image: Array64, background: Array64, sensor: Sensor, args: argparse.Namespace) -> Array64:
    """(n, 4) x px, y px, score (the flux), flux counts of the stars found."""
    signal = image - background
    noise = pixel_noise(image, np.ones(image.shape, dtype=np.bool_), sensor)
    mask = np.isinf(noise)
    error = np.where(mask, 1.0, noise)
    threshold = max(args.sigmas * float(np.median(error)), args.share * float(signal.max()))
    table = photometry(sensor, threshold, args)(signal, mask=mask, error=error)
    if table is None:
        return np.zeros((0, 4))
    x, y, flux = (np.asarray(table[name], float) for name in ("x_fit", "y_fit", "flux_fit"))
    good = np.isfinite(x + y + flux) & (flux > 0.0)
    good &= (np.abs(x - 5.0) < 5.5) & (np.abs(y - 5.0) < 5.5)
    good &= flux > args.faintest * np.max(flux, where=good, initial=0.0)
    return np.column_stack([x, y, flux, flux])[good]


def main() -> None:
    """Print one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("dataset", type=Path)
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--mode", choices=["single", "new", "all"], default="all")
    parser.add_argument("--rounds", type=int, default=3, help="of the iterative modes")
    parser.add_argument("--fit-shape", type=int, default=5, help="px, odd")
    parser.add_argument("--sigmas", type=float, default=5.0, help="of a detection, at least")
    parser.add_argument("--share", type=float, default=0.05, help="of the brightest pixel")
    parser.add_argument("--faintest", type=float, default=0.1, help="flux, of the brightest star's")
    parser.add_argument("--bounds", type=float, default=None, help="px a star may move")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    data = read_csist(args.dataset)
    sensor, images = data.sensor, data.image[: args.images].astype(np.float64)
    known = to_network_units(images, sensor, "peak", background=data.background > 0.0)
    background = np.broadcast_to(known.background, images.shape)
    began = time.perf_counter()
    found, failed = [], 0
    for image, level in zip(images, background, strict=True):
        try:
            found.append(stars(image, level, sensor, args))
        except (ValueError, TypeError, IndexError, np.linalg.LinAlgError):
            found.append(np.zeros((0, 4)))
            failed += 1
    seconds = time.perf_counter() - began
    true = data.truths()[: len(images)]
    error = matched_errors(found, true)[1]
    figures = {
        "images": len(images),
        "cso_map": cso_map(found, true).mean,
        "cso_map_interval": cso_map_interval(found, true),
        "count_accuracy": count_accuracy(found, true),
        "rmse_px": float(np.sqrt(np.mean(np.sum(error[:, :2] ** 2, axis=1)))),
        "failed": failed,
        "patches_per_s": len(images) / seconds,
    }
    print(json.dumps(vars(args) | {"dataset": args.dataset.name} | figures))


if __name__ == "__main__":
    main()
