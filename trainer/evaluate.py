"""Scores an engine or a network on a CSIST dataset, beside what the measurement allows at best."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from engines.base import Engine
from pipeline.formats.csist import CsistDataset
from pipeline.physics.candidates import at_least
from pipeline.physics.fit import Priors, Window, compile_fit
from pipeline.physics.grid import target_map
from pipeline.physics.groups import MAX_TARGETS, PROFILES
from pipeline.physics.model_only import MODEL, unmix_by_model
from pipeline.physics.refine import refine
from trainer.errors import TrainerError
from trainer.honesty import bound_figures, honesty_figures, published_covariances, true_bounds
from trainer.map_quality import psnr_db, ssim
from trainer.metrics import (
    MATCH_GATE_PX,
    count_accuracy,
    cso_map,
    cso_map_by_count,
    cso_map_interval,
    matched_errors,
)
from trainer.reading import Detections, Reading, detections, read_maps
from trainer.units import to_network_units

Progress = Callable[[int], None]

_PATCHES_AT_ONCE = 256


@dataclass(frozen=True)
class Unmixed:
    """What an engine made of the images of a dataset."""

    found: list[Detections]  # for each image, see `trainer.reading`
    at_least: NDArray[np.float64]  # (N, K) that an image has 1, 2, … targets or more; NaN: unsaid
    refined: bool
    priors: bool  # the benchmark's own rules were used
    psnr_db: NDArray[np.float64]  # (N,) of maps of intensity against the true ones, else NaN
    ssim: NDArray[np.float64]  # (N,)
    seconds: float  # of the network, of reading its maps and, if refined, of the fit


class Method(NamedTuple):
    """What is scored."""

    name: str
    network: str = ""
    onnx_sha256: str = ""
    threshold: float = 0.0  # of maps of intensity, network units
    c: int = 1

    @classmethod
    def of(cls, engine: Engine | None) -> "Method":
        """The engine, or the imaging model alone."""
        if engine is None:
            return cls(MODEL)
        m = engine.manifest
        return cls(m.name, m.network, m.onnx_sha256, m.detection_threshold, m.c)


def evaluate(
    dataset: CsistDataset,
    engine: Engine | None,
    progress: Progress | None = None,
    *,
    refined: bool = False,
    priors: bool = False,
    picture: Path | None = None,
) -> dict[str, Any]:
    """Unmix a dataset and score it: `figures` of `unmix`.

    picture: a PNG of how honest it is and how near the bound, see `trainer.reliability`.
    """
    unmixed = unmix(dataset, engine, progress, refined=refined, priors=priors)
    if picture is not None:
        from trainer.reliability import draw_reliability

        method = Method.of(engine)
        draw_reliability(dataset, unmixed.found, unmixed.at_least, method.name, method.c, picture)
    return figures(dataset, Method.of(engine), unmixed)


def figures(dataset: CsistDataset, method: Method, unmixed: Unmixed) -> dict[str, Any]:
    """Every figure of merit as plain JSON types; null where a figure does not exist.

    cso_map, cso_map_interval (95 %, bootstrap over images), ap: of the detections.
    cso_map_by_count: over the images with as many targets. psnr_db, ssim: of the network's maps,
    mean over images. count_accuracy: share of images with the right number. rmse_px: root mean
    square distance of found and true position over the targets matched one to one within 0.5 px
    (`matched`). crb_px: the same figure for an estimator at the Cramér–Rao bound that knows how
    many targets there are: root mean square over an image's targets, median over images;
    crb_px_by_count: by number of targets. Unlike rmse_px it is not cut off at 0.5 px.
    intensity_rmse_relative: of the matched. rmse_over_bound: root mean square, over the matched, of
    their distance over its bound's. nees: mean per dimension of their position errors, within_95:
    share of them inside their 95 % ellipse, both with the covariance the pipeline publishes: that
    of the fit or the network, or, for a network on the grid, the bound at the estimated group plus
    the variance within a cell; with _few the last three of images of 1 to 3 targets only, with
    _few_counted of those of these in which the right number was found: the bound is that of an
    estimator that knows the number, and a pair seen as one misses its targets by what the bound
    of a pair does not describe.
    patches_per_s: of the network and, if refined, the fit.
    """
    found, true = unmixed.found, dataset.truths()
    scored = cso_map(found, true)
    matched, error = matched_errors(found, true)
    bounds = true_bounds(dataset, true)
    covariance = published_covariances(dataset, found, matched, method.c)
    values = {
        "engine": method.name,
        "refined": unmixed.refined,
        "priors": unmixed.priors,
        "network": method.network,
        "onnx_sha256": method.onnx_sha256,
        "threshold": method.threshold,
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
        **bound_figures(bounds),
        "intensity_rmse_relative": _rms(error[:, 2]),
        **honesty_figures(error, covariance, bounds, matched, found),
        "patches_per_s": len(dataset) / unmixed.seconds,
    }
    return {key: _finite(value) for key, value in values.items()}


def unmix(
    dataset: CsistDataset,
    engine: Engine | None,
    progress: Progress | None = None,
    *,
    refined: bool = False,
    priors: bool = False,
) -> Unmixed:
    """Run an engine, or the imaging model alone, over a dataset.

    progress: called with the number of patches done. Detections are read as `read_maps` says;
    refined: what the likelihood makes of these; priors: with the rules of the dataset's profile.
    Raises TrainerError for an empty dataset, one of another patch size or one without rules.
    """
    size_px = dataset.image.shape[1]
    if len(dataset) == 0:
        raise TrainerError("dataset: has no images; generate one with --count 1 or more")
    if engine is not None and size_px != engine.manifest.size_px:
        raise TrainerError(
            f"engine {engine.manifest.name}: is for patches of {engine.manifest.size_px} px, the "
            f"dataset's have {size_px}; train one of that size"
        )
    known = rules(dataset) if priors else Priors(background_known=dataset.background == 0.0)
    found: list[Detections] = []
    counts_B = np.full((len(dataset), MAX_TARGETS + 1), np.nan)
    psnr, similarity = np.full((2, len(dataset)), np.nan)
    seconds = 0.0
    if refined or engine is None:
        compile_fit()
    for start in range(0, len(dataset), _PATCHES_AT_ONCE):
        part = slice(start, start + _PATCHES_AT_ONCE)
        counts = dataset.image[part].astype(np.float32)
        seen = to_network_units(
            counts,
            dataset.sensor,
            "peak" if engine is None else engine.manifest.scaling,
            background=dataset.background > 0.0,
            planes=("signal",) if engine is None else engine.manifest.planes,
        )
        window = Window(
            counts.astype(np.float64),
            seen.background.astype(np.float64),
            np.ones(counts.shape, dtype=np.bool_),
        )
        began = time.perf_counter()
        if engine is None:
            read = unmix_by_model(window, dataset.sensor, known).candidates
        else:
            maps = engine.infer(seen.patch)
            read = read_maps(maps, seen.unit, Reading.of(engine.manifest, dataset.sensor))
            if refined:
                read = refine(window, read, dataset.sensor, known).candidates
        seconds += time.perf_counter() - began
        found += detections(read, len(counts))
        if read.counted:
            counts_B[part] = at_least(read, len(counts), MAX_TARGETS + 1)
        if engine is not None and engine.manifest.output == "intensity-map":
            truth = true_maps(dataset, part, engine.manifest.c, seen.unit)
            psnr[part], similarity[part] = psnr_db(maps, truth), ssim(maps, truth)
        if progress is not None:
            progress(len(found))
    return Unmixed(found, counts_B, refined or engine is None, priors, psnr, similarity, seconds)


def rules(dataset: CsistDataset) -> Priors:
    """What a benchmark promises of its targets; raises TrainerError for a profile of sensors."""
    profile = PROFILES.get(dataset.profile)
    if profile is None or profile.log_uniform:
        raise TrainerError(f"--priors: profile {dataset.profile} has no such rules; leave it out")
    return Priors(profile.intensity, profile.separation_px, dataset.background == 0.0)


def true_maps(
    dataset: CsistDataset, part: slice, c: int, unit: NDArray[np.floating]
) -> NDArray[np.float64]:
    """The maps of a perfect network on the grid, in network units of `unit` counts (B,)."""
    intensity = np.nan_to_num(dataset.target_intensity[part]) / unit[:, None]
    xy_px = np.nan_to_num(dataset.target_xy_px[part])
    maps: NDArray[np.float64] = target_map(xy_px, intensity, dataset.image.shape[1], c)
    return maps


def _rms(values: NDArray[np.float64]) -> float:
    return float(np.sqrt(np.mean(values**2))) if len(values) else math.nan


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
        ("RMSE over its bound, 1 to 3 targets", _text(values["rmse_over_bound_few"])),
        ("the same, their number found", _text(values["rmse_over_bound_few_counted"])),
        ("NEES a dimension", _text(values["nees"])),
        ("the same, 1 to 3 targets", _text(values["nees_few"])),
        ("in their 95 % ellipse, 1 to 3 targets", _text(values["within_95_few"])),
        ("patches/s", f"{values['patches_per_s']:.0f}"),
    ]
    for row in rows:
        table.add_row(*row)
    console.print(table)


def _text(value: float | None, unit: str = "") -> str:
    return "none" if value is None else f"{value:.4g} {unit}".strip()
