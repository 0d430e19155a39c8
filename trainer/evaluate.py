"""Scores an engine or a network on a CSIST dataset, beside what the measurement allows at best."""

import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from engines.base import Engine
from pipeline.formats.csist import CsistDataset
from pipeline.physics.fit import Window
from pipeline.physics.grid import cell_variance_px2
from pipeline.physics.groups import MAX_TARGETS
from pipeline.physics.select import Candidates, refine
from pipeline.physics.sensor import Sensor
from trainer.errors import TrainerError
from trainer.metrics import (
    MATCH_GATE_PX,
    count_accuracy,
    cso_map,
    cso_map_interval,
    grid_rows,
    group_bounds,
    matched_errors,
    nees,
)
from trainer.units import to_network_units

_PATCHES_AT_ONCE = 256


def evaluate(
    dataset: CsistDataset,
    engine: Engine,
    progress: Callable[[int], None] | None = None,
    *,
    refined: bool = False,
) -> dict[str, Any]:
    """Every figure of merit as plain JSON types; null where a figure does not exist.

    cso_map, cso_map_interval (95 %, bootstrap over images), ap: grid detections, every cell at or
    above the manifest's threshold. count_accuracy: share of images with the right number.
    rmse_px: root mean square distance of found and true position over the targets matched
    one to one within 0.5 px (`matched`). crb_px: the same figure for an estimator at the
    Cramér–Rao bound that knows how many targets there are: root mean square over an image's
    targets, median over images; crb_px_by_count: by number of targets. Unlike rmse_px it is not
    cut off at 0.5 px. intensity_rmse_relative: of the matched. nees: mean per dimension of their
    position errors, with the covariance the pipeline publishes: the bound at the estimated group
    plus, unless refined, the variance within a grid cell. patches_per_s: of the network and, if
    refined, the fit. progress: called
    with the number of patches done.
    """
    if len(dataset) == 0:
        raise TrainerError("dataset: has no images; generate one with --count 1 or more")
    found, seconds = detect(dataset, engine, progress, refined=refined)
    true = dataset.truths()
    scored = cso_map(found, true)
    matched, error = matched_errors(found, true)
    by_count = _bounds_by_count(dataset, true)
    manifest = engine.manifest
    figures = {
        "engine": manifest.name,
        "refined": refined,
        "network": manifest.network,
        "onnx_sha256": manifest.onnx_sha256,
        "threshold": manifest.detection_threshold,
        "profile": dataset.profile,
        "seed": dataset.seed,
        "images": len(dataset),
        "targets": sum(len(rows) for rows in true),
        "cso_map": scored.mean,
        "cso_map_interval": list(cso_map_interval(found, true)),
        "ap": {f"{threshold:.2f}": ap for threshold, ap in scored.ap.items()},
        "count_accuracy": count_accuracy(found, true),
        "matched": len(error),
        "match_gate_px": MATCH_GATE_PX,
        "rmse_px": _rms(np.hypot(error[:, 0], error[:, 1])),
        "crb_px": _median(np.concatenate(list(by_count.values()) or [np.empty(0)])),
        "crb_px_by_count": {str(count): _median(values) for count, values in by_count.items()},
        "intensity_rmse_relative": _rms(error[:, 2]),
        "nees": _nees(dataset, found, matched, error, 0.0 if refined else 1.0 / manifest.c),
        "patches_per_s": len(dataset) / seconds,
    }
    return {key: _finite(value) for key, value in figures.items()}


def detect(
    dataset: CsistDataset,
    engine: Engine,
    progress: Callable[[int], None] | None = None,
    *,
    refined: bool = False,
) -> tuple[list[NDArray[np.float64]], float]:
    """Detections (n, 3) x px, y px, counts of each image, and the seconds they took.

    Every cell at or above the manifest's threshold; refined: what the likelihood makes of these.
    """
    manifest = engine.manifest
    if dataset.image.shape[1:] != (manifest.size_px, manifest.size_px):
        raise TrainerError(
            f"engine {manifest.name}: is for patches of {manifest.size_px} px, the dataset's have "
            f"{dataset.image.shape[1]}; train one of that size"
        )
    found: list[NDArray[np.float64]] = []
    seconds = 0.0
    for start in range(0, len(dataset), _PATCHES_AT_ONCE):
        counts = dataset.image[start : start + _PATCHES_AT_ONCE].astype(np.float32)
        signal, unit = to_network_units(
            counts,
            background=dataset.background > 0.0,
            scaling=manifest.scaling,
            full_scale=dataset.sensor.full_scale,
        )
        began = time.perf_counter()
        maps = engine.infer(signal)
        rows = grid_rows(maps, unit, manifest.c, manifest.detection_threshold)
        if refined:
            background = counts - signal * unit[:, None, None]
            rows = _refined(rows, counts, background, dataset.sensor)
        seconds += time.perf_counter() - began
        found += rows
        if progress is not None:
            progress(len(found))
    return found, seconds


def _refined(
    rows: list[NDArray[np.float64]],
    counts_BHW: NDArray[np.float32],
    background_BHW: NDArray[np.float32],
    sensor: Sensor,
) -> list[NDArray[np.float64]]:
    """The same lists after the fit; an image without candidates stays without."""
    patch = np.repeat(np.arange(len(rows)), [len(row) for row in rows])
    table = np.concatenate(rows)
    start = Candidates(patch, table[:, :2], table[:, 2], np.zeros(len(patch), dtype=np.bool_))
    usable = np.ones(counts_BHW.shape, dtype=np.bool_)
    window = Window(counts_BHW.astype(np.float64), background_BHW.astype(np.float64), usable)
    found = refine(window, start, sensor)
    table = np.column_stack([found.xy_px, found.intensity])
    return np.split(table, np.searchsorted(found.patch, np.arange(1, len(rows))))


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
    cell_px: float,
) -> float:
    """With the covariance that the pipeline publishes for a grid engine: bound + cell²/12.

    Over the images with at most twice as many detections as there can be targets: with more, the
    bound says nothing but costs a lot.
    """
    sane = [rows if len(rows) <= 2 * MAX_TARGETS else rows[:0] for rows in found]
    bounds = group_bounds(sane, dataset.sensor, dataset.image.shape[1], dataset.background)
    kept = np.array([len(bounds[image]) > 0 for image, _ in matched], dtype=bool)
    covariance = [bounds[image][row] for image, row in matched[kept]]
    cell = cell_variance_px2(cell_px) * np.eye(2)
    return nees(error[kept, :2], np.reshape(covariance, (-1, 2, 2)) + cell)


def _rms(values: NDArray[np.float64]) -> float:
    return float(np.sqrt(np.mean(values**2))) if len(values) else math.nan


def _median(values: NDArray[np.float64]) -> float | None:
    return float(np.median(values)) if len(values) else None


def _finite(value: Any) -> Any:
    """NaN and infinity, which JSON does not have, become null."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def print_figures(figures: dict[str, Any], console: Console) -> None:
    """The figures as a small table."""
    table = Table(
        title=f"{figures['engine']} on {figures['images']} images of {figures['profile']}",
        show_header=False,
    )
    low, high = figures["cso_map_interval"]
    rows = [
        ("CSO-mAP", f"{figures['cso_map']:.4f}  (95 %: {low:.4f} to {high:.4f})"),
        *((f"AP at {t} px", f"{ap:.4f}") for t, ap in figures["ap"].items()),
        ("right number of targets", f"{100 * figures['count_accuracy']:.1f} %"),
        ("RMSE, matched", _text(figures["rmse_px"], "px")),
        ("Cramér–Rao bound, median", _text(figures["crb_px"], "px")),
        ("intensity RMSE, relative", _text(figures["intensity_rmse_relative"])),
        ("NEES a dimension", _text(figures["nees"])),
        ("patches/s", f"{figures['patches_per_s']:.0f}"),
    ]
    for row in rows:
        table.add_row(*row)
    console.print(table)


def _text(value: float | None, unit: str = "") -> str:
    return "none" if value is None else f"{value:.4g} {unit}".strip()
