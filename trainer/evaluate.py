"""Scores an engine or a network on a CSIST dataset, beside what the measurement allows at best."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from engines.base import Engine
from engines.manifest import Manifest
from pipeline.formats.csist import CsistDataset
from pipeline.physics.fit import Window
from pipeline.physics.grid import cell_variance_px2, target_map
from pipeline.physics.groups import MAX_TARGETS
from pipeline.physics.refine import refine
from trainer.errors import TrainerError
from trainer.map_quality import psnr_db, ssim
from trainer.metrics import (
    MATCH_GATE_PX,
    count_accuracy,
    cso_map,
    cso_map_by_count,
    cso_map_interval,
    group_bounds,
    matched_errors,
    nees,
)
from trainer.reading import Detections, Reading, detections, read_maps
from trainer.units import to_network_units

Progress = Callable[[int], None]

_PATCHES_AT_ONCE = 256


@dataclass(frozen=True)
class Unmixed:
    """What an engine made of the images of a dataset."""

    found: list[Detections]  # for each image, see `trainer.reading`
    refined: bool
    psnr_db: NDArray[np.float64]  # (N,) of maps of intensity against the true ones, else NaN
    ssim: NDArray[np.float64]  # (N,)
    seconds: float  # of the network, of reading its maps and, if refined, of the fit


def evaluate(
    dataset: CsistDataset,
    engine: Engine,
    progress: Progress | None = None,
    *,
    refined: bool = False,
) -> dict[str, Any]:
    """Unmix a dataset and score it: `figures` of `unmix`."""
    return figures(dataset, engine.manifest, unmix(dataset, engine, progress, refined=refined))


def figures(dataset: CsistDataset, manifest: Manifest, unmixed: Unmixed) -> dict[str, Any]:
    """Every figure of merit as plain JSON types; null where a figure does not exist.

    cso_map, cso_map_interval (95 %, bootstrap over images), ap: of the detections.
    cso_map_by_count: over the images with as many targets. psnr_db, ssim: of the network's maps,
    mean over images. count_accuracy: share of images with the right number. rmse_px: root mean
    square distance of found and true position over the targets matched one to one within 0.5 px
    (`matched`). crb_px: the same figure for an estimator at the Cramér–Rao bound that knows how
    many targets there are: root mean square over an image's targets, median over images;
    crb_px_by_count: by number of targets. Unlike rmse_px it is not cut off at 0.5 px.
    intensity_rmse_relative: of the matched. nees: mean per dimension of their position errors,
    with the covariance the pipeline publishes: that of the fit or the network, or, for a network
    on the grid, the bound at the estimated group plus the variance within a cell. patches_per_s: of
    the network and, if refined, the fit.
    """
    found, true = unmixed.found, dataset.truths()
    scored = cso_map(found, true)
    matched, error = matched_errors(found, true)
    bounds = _bounds_by_count(dataset, true)
    values = {
        "engine": manifest.name,
        "refined": unmixed.refined,
        "network": manifest.network,
        "onnx_sha256": manifest.onnx_sha256,
        "threshold": manifest.detection_threshold,
        "profile": dataset.profile,
        "seed": dataset.seed,
        "images": len(dataset),
        "targets": sum(len(rows) for rows in true),
        "cso_map": scored.mean,
        "cso_map_interval": list(cso_map_interval(found, true)),
        "cso_map_by_count": {
            str(count): part.mean for count, part in cso_map_by_count(found, true).items()
        },
        "ap": {f"{threshold:.2f}": ap for threshold, ap in scored.ap.items()},
        "psnr_db": float(unmixed.psnr_db.mean()),
        "ssim": float(unmixed.ssim.mean()),
        "count_accuracy": count_accuracy(found, true),
        "matched": len(error),
        "match_gate_px": MATCH_GATE_PX,
        "rmse_px": _rms(np.hypot(error[:, 0], error[:, 1])),
        "crb_px": _median(np.concatenate(list(bounds.values()) or [np.empty(0)])),
        "crb_px_by_count": {str(count): _median(rms) for count, rms in bounds.items()},
        "intensity_rmse_relative": _rms(error[:, 2]),
        "nees": _nees(dataset, found, matched, error, manifest.c),
        "patches_per_s": len(dataset) / unmixed.seconds,
    }
    return {key: _finite(value) for key, value in values.items()}


def unmix(
    dataset: CsistDataset,
    engine: Engine,
    progress: Progress | None = None,
    *,
    refined: bool = False,
) -> Unmixed:
    """Run an engine over a dataset; progress: called with the number of patches done.

    Detections are read as `read_maps` says; refined: what the likelihood makes of these. Raises
    TrainerError for an empty dataset or one of another patch size.
    """
    manifest = engine.manifest
    if len(dataset) == 0:
        raise TrainerError("dataset: has no images; generate one with --count 1 or more")
    if dataset.image.shape[1:] != (manifest.size_px, manifest.size_px):
        raise TrainerError(
            f"engine {manifest.name}: is for patches of {manifest.size_px} px, the dataset's have "
            f"{dataset.image.shape[1]}; train one of that size"
        )
    found: list[Detections] = []
    psnr, similarity = np.full((2, len(dataset)), np.nan)
    seconds = 0.0
    for start in range(0, len(dataset), _PATCHES_AT_ONCE):
        part = slice(start, start + _PATCHES_AT_ONCE)
        counts = dataset.image[part].astype(np.float32)
        patch, unit, background = to_network_units(
            counts,
            dataset.sensor,
            manifest.scaling,
            background=dataset.background > 0.0,
            planes=manifest.planes,
        )
        began = time.perf_counter()
        maps = engine.infer(patch)
        read = read_maps(maps, unit, Reading.of(manifest, dataset.sensor))
        if refined:
            usable = np.ones(counts.shape, dtype=np.bool_)
            window = Window(counts.astype(np.float64), background.astype(np.float64), usable)
            read = refine(window, read, dataset.sensor).candidates
        seconds += time.perf_counter() - began
        found += detections(read, len(counts))
        if manifest.output == "intensity-map":
            truth = true_maps(dataset, part, manifest.c, unit)
            psnr[part], similarity[part] = psnr_db(maps, truth), ssim(maps, truth)
        if progress is not None:
            progress(len(found))
    return Unmixed(found, refined, psnr, similarity, seconds)


def true_maps(
    dataset: CsistDataset, part: slice, c: int, unit: NDArray[np.floating]
) -> NDArray[np.float64]:
    """The maps of a perfect network on the grid, in network units of `unit` counts (B,)."""
    intensity = np.nan_to_num(dataset.target_intensity[part]) / unit[:, None]
    xy_px = np.nan_to_num(dataset.target_xy_px[part])
    maps: NDArray[np.float64] = target_map(xy_px, intensity, dataset.image.shape[1], c)
    return maps


def _bounds_by_count(
    dataset: CsistDataset, true: list[NDArray[np.float64]]
) -> dict[int, NDArray[np.float64]]:
    """Number of targets → for each image with as many, the rms bound of their positions, px."""
    bounds = group_bounds(true, dataset.sensor, dataset.image.shape[1], dataset.background)
    rms = np.array(
        [math.sqrt(np.trace(b, axis1=1, axis2=2).mean()) if len(b) else math.nan for b in bounds]
    )
    count = np.array([len(b) for b in bounds])
    return {int(number): rms[count == number] for number in np.unique(count[count > 0])}


def _nees(
    dataset: CsistDataset,
    found: list[NDArray[np.float64]],
    matched: NDArray[np.int64],
    error: NDArray[np.float64],
    c: int,
) -> float:
    """With the covariance that the pipeline publishes: its own, or bound + cell²/12.

    Bounds are for images with at most twice as many detections as there can be targets: with more,
    the bound says nothing but costs a lot.
    """
    covariance = np.array([found[image][row, [3, 4, 4, 5]] for image, row in matched])
    covariance = covariance.reshape(-1, 2, 2)
    if np.isnan(covariance).any():
        sane = [rows if len(rows) <= 2 * MAX_TARGETS else rows[:0] for rows in found]
        bounds = group_bounds(sane, dataset.sensor, dataset.image.shape[1], dataset.background)
        cell = cell_variance_px2(1.0 / c) * np.eye(2)
        known = np.full_like(covariance, np.nan)
        for place, (image, row) in enumerate(matched):
            if len(bounds[image]) > 0:
                known[place] = bounds[image][row] + cell
        covariance = np.where(np.isnan(covariance), known, covariance)
    kept = ~np.isnan(covariance).any(axis=(1, 2))
    return nees(error[kept, :2], covariance[kept])


def _rms(values: NDArray[np.float64]) -> float:
    return float(np.sqrt(np.mean(values**2))) if len(values) else math.nan


def _median(values: NDArray[np.float64]) -> float | None:
    return float(np.median(values)) if len(values) else None


def _finite(value: Any) -> Any:
    """NaN and infinity, which JSON does not have, become null."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def print_figures(values: dict[str, Any], console: Console) -> None:
    """The figures as a small table."""
    table = Table(
        title=f"{values['engine']} on {values['images']} images of {values['profile']}",
        show_header=False,
    )
    low, high = values["cso_map_interval"]
    rows = [
        ("CSO-mAP", f"{values['cso_map']:.4f}  (95 %: {low:.4f} to {high:.4f})"),
        *((f"AP at {t} px", f"{ap:.4f}") for t, ap in values["ap"].items()),
        ("PSNR of the maps", _text(values["psnr_db"], "dB")),
        ("SSIM of the maps", _text(values["ssim"])),
        ("right number of targets", f"{100 * values['count_accuracy']:.1f} %"),
        ("RMSE, matched", _text(values["rmse_px"], "px")),
        ("Cramér–Rao bound, median", _text(values["crb_px"], "px")),
        ("intensity RMSE, relative", _text(values["intensity_rmse_relative"])),
        ("NEES a dimension", _text(values["nees"])),
        ("patches/s", f"{values['patches_per_s']:.0f}"),
    ]
    for row in rows:
        table.add_row(*row)
    console.print(table)


def _text(value: float | None, unit: str = "") -> str:
    return "none" if value is None else f"{value:.4g} {unit}".strip()
