"""What comes out where the assumptions do not hold: a table of hard cases, by the imaging model.

Each case is many patches of a 14-bit sensor (profile `field`: σ 0.5 px, read noise 6, 8 electrons
a count, background 1000), unmixed as the pipeline does it: network, fit, and of what they find
what the stage `report` publishes.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from engines.base import Engine
from pipeline.physics.arrays import NumpyRandom
from pipeline.physics.candidates import Candidates, crowded, significant
from pipeline.physics.fit import Window
from pipeline.physics.group_bounds import group_bounds
from pipeline.physics.groups import PROFILES, SIZE_PX
from pipeline.physics.lone import lone_targets, with_lone
from pipeline.physics.measurement import measure
from pipeline.physics.psf import peak_fraction, render
from pipeline.physics.refine import MAX_CHI2, Refined, refine
from pipeline.physics.sensor import Sensor
from trainer.errors import TrainerError
from trainer.honesty import WITHIN_95, mahalanobis, stated_covariances
from trainer.metrics import count_accuracy, matched_errors
from trainer.reading import Reading, detections, read_maps
from trainer.units import to_network_units

PROFILE = PROFILES["field"]
SENSOR = PROFILE.sensor
FAR_PX = 0.25
Array64 = NDArray[np.float64]


@dataclass(frozen=True)
class Case:
    """Patches as measured, which pixels say something, and the true targets of each."""

    counts_BHW: Array64
    usable_BHW: NDArray[np.bool_]
    true: list[Array64]  # (n, 3) x px, y px, counts


Make = Callable[[int, NumpyRandom], Case]


def points(targets_BKC: Array64, rng: NumpyRandom, sensor: Sensor = SENSOR) -> Case:
    """Point sources (B, K, 3) on the flat background."""
    mean = PROFILE.background + render(
        targets_BKC[..., :2], targets_BKC[..., 2], (SIZE_PX, SIZE_PX), sensor.sigma_px
    )
    counts = measure(mean, SENSOR, rng)
    return Case(counts, np.ones(counts.shape, dtype=np.bool_), list(targets_BKC))


def singles(number: int, rng: NumpyRandom, snr: tuple[float, float] = (10.0, 100.0)) -> Array64:
    """One target a patch (B, 1, 3), anywhere in the middle pixel, peak SNR uniform in its log."""
    low, high = snr
    noise = np.sqrt(SENSOR.read_noise**2 + PROFILE.background / SENSOR.gain)
    counts = noise * low * (high / low) ** rng.uniform((number, 1)) / peak_fraction(SENSOR.sigma_px)
    xy_px = 4.5 + rng.uniform((number, 1, 2))
    return np.concatenate([xy_px, counts[..., None]], axis=2)


def crowd(number: int, rng: NumpyRandom, targets: int) -> Array64:
    """So many targets a patch, at least 0.7 px apart in 3 × 3 px, 1500 to 3000 counts each."""
    kept: list[Array64] = []
    while len(kept) < number:
        xy_px = 3.5 + 3.0 * rng.uniform((targets, 2))
        apart = np.hypot(*np.moveaxis(xy_px[:, None] - xy_px[None], -1, 0))
        if apart[np.triu_indices(targets, 1)].min() > 0.7:
            counts = 1500.0 + 1500.0 * rng.uniform((targets, 1))
            kept.append(np.concatenate([xy_px, counts], axis=1))
    return np.stack(kept)


def _nothing(number: int, rng: NumpyRandom) -> Case:
    return points(np.zeros((number, 0, 3)), rng)


def _wrong_sigma(share: float) -> Make:
    def make(number: int, rng: NumpyRandom) -> Case:
        return points(singles(number, rng), rng, replace(SENSOR, sigma_px=SENSOR.sigma_px * share))

    return make


def _at_the_border(number: int, rng: NumpyRandom) -> Case:
    targets = singles(number, rng)
    targets[:, 0, 0] -= 5.0  # in the first pixel of the row: half of it is out of sight
    return points(targets, rng)


def _saturated(number: int, rng: NumpyRandom) -> Case:
    targets = singles(number, rng)
    level = 1.2 + 8.0 * rng.uniform((number,))
    targets[:, 0, 2] = level * SENSOR.full_scale / peak_fraction(SENSOR.sigma_px)
    return points(targets, rng)


def _bad_pixel(number: int, rng: NumpyRandom, *, marked: bool) -> Case:
    case = points(singles(number, rng), rng)
    place = 4 + np.floor(3 * rng.uniform((number, 2))).astype(np.int64)
    row = np.arange(number)
    case.counts_BHW[row, place[:, 1], place[:, 0]] = 9000.0
    if marked:
        case.usable_BHW[row, place[:, 1], place[:, 0]] = False
    return case


def _extended(number: int, rng: NumpyRandom) -> Case:
    """A disc of 2 to 3 px radius, 20 to 100 times as bright as the noise."""
    y, x = np.mgrid[:SIZE_PX, :SIZE_PX]
    radius = 2.0 + rng.uniform((number, 1, 1))
    edge = np.clip(radius - np.hypot(x - 5.0, y - 5.0) + 0.5, 0.0, 1.0)
    level = 250.0 * 5.0 ** rng.uniform((number, 1, 1))
    counts = measure(PROFILE.background + level * edge, SENSOR, rng)
    none = [np.zeros((0, 3))] * number
    return Case(counts, np.ones(counts.shape, dtype=np.bool_), none)


CASES: dict[str, Make] = {
    "noise alone": _nothing,
    "single, peak SNR 10 to 100": lambda n, rng: points(singles(n, rng), rng),
    "single, peak SNR 5 to 10": lambda n, rng: points(singles(n, rng, (5.0, 10.0)), rng),
    "single, σ 10 % wider than told": _wrong_sigma(1.1),
    "single, σ 10 % narrower": _wrong_sigma(0.9),
    "six targets in 3 × 3 px": lambda n, rng: points(crowd(n, rng, 6), rng),
    "eight targets in 3 × 3 px": lambda n, rng: points(crowd(n, rng, 8), rng),
    "cut by the border": _at_the_border,
    "core saturated up to 9 times": _saturated,
    "bad pixel within, marked": lambda n, rng: _bad_pixel(n, rng, marked=True),
    "bad pixel within, unmarked": lambda n, rng: _bad_pixel(n, rng, marked=False),
    "extended object, no point": _extended,
}


def robustness(engine: Engine, number: int, seed: int) -> list[dict[str, Any]]:
    """A row for each case: what is published of `number` patches.

    found: mean number of targets. right: share of patches with the right number. false_second:
    share with more than there are. pd: share of true targets with one found within 0.25 px. nees,
    per dimension, and within_95 of those matched within 0.5 px. misfit, unconverged, crowded: share
    of patches flagged. finite: nothing published is NaN or infinite. Raises TrainerError for an
    engine on the grid, whose maps the pipeline reads otherwise.
    """
    if engine.manifest.output != "cell-targets":
        raise TrainerError(
            f"engine {engine.manifest.name}: answers on a grid; use one off the grid, `default` is"
        )
    return [
        {"case": title} | _row(engine, make(number, NumpyRandom([seed, place])))
        for place, (title, make) in enumerate(CASES.items())
    ]


def unmixed(engine: Engine, case: Case) -> tuple[Refined, NDArray[np.bool_]]:
    """As the pipeline does it, with what it publishes as candidates; which patches are crowded."""
    seen = to_network_units(
        case.counts_BHW.astype(np.float32),
        SENSOR,
        engine.manifest.scaling,
        background=True,
        planes=engine.manifest.planes,
        usable_BHW=case.usable_BHW,
    )
    reading = Reading.of(engine.manifest, SENSOR)
    candidates = read_maps(engine.infer(seen.patch), seen.unit, reading)
    window = Window(case.counts_BHW, seen.background.astype(np.float64), case.usable_BHW)
    found = refine(window, with_lone(candidates, lone_targets(window, SENSOR)), SENSOR)
    own, none = found.candidates, np.zeros(len(found.candidates.patch), np.bool_)
    many = crowded(own.patch, own.p_count, none, len(case.true))
    return found._replace(candidates=published(own, window, SENSOR)), many


def published(found: Candidates, window: Window, sensor: Sensor) -> Candidates:
    """Those that are significant, as the stage `report` judges them by default."""
    snr = group_bounds(
        found.patch.astype(np.int32),
        found.xy_px,
        found.intensity,
        window.background_BHW.mean(axis=(1, 2)),
        window.usable_BHW,
        sensor,
    ).snr
    return found.take(significant(snr, found.p_exist, found.p_count))


def _row(engine: Engine, case: Case) -> dict[str, Any]:
    number = len(case.true)
    result, many = unmixed(engine, case)
    found = detections(result.candidates, number)
    more = np.array([len(f) > len(t) for f, t in zip(found, case.true, strict=True)])
    which, error = matched_errors(found, case.true)
    near = np.hypot(error[:, 0], error[:, 1]) < FAR_PX
    squared = mahalanobis(error[:, :2], stated_covariances(found, which))
    targets = sum(map(len, case.true))
    values = np.concatenate([np.empty((0, 7)), *found])
    return {
        "found": len(values) / number,
        "right": count_accuracy(found, case.true),
        "false_second": float(more.mean()),
        "pd": float(near.sum() / targets) if targets else None,
        "nees": float(squared.mean() / 2.0) if len(squared) else None,
        "within_95": float((squared < WITHIN_95).mean()) if len(squared) else None,
        "misfit": float(np.mean(result.reduced_chi2 > MAX_CHI2)),
        "unconverged": float(np.mean(~result.converged)),
        "crowded": float(many.mean()),
        "finite": bool(np.isfinite(values).all()),
    }


def print_robustness(rows: list[dict[str, Any]], console: Console) -> None:
    """As a table, shares in per cent."""
    table = Table(title="hard cases, profile field, network and fit")
    for heading in (
        *("case", "targets found", "right number %", "too many %", "Pd %"),
        *("NEES", "in 95 % ellipse %", "misfit %", "unconverged %", "crowded %", "all finite"),
    ):
        table.add_column(heading)
    shares = {"right", "false_second", "pd", "within_95", "misfit", "unconverged", "crowded"}
    for row in rows:
        table.add_row(*(_text(value, percent=key in shares) for key, value in row.items()))
    console.print(table)


def _text(value: Any, *, percent: bool) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "NO"
    return value if isinstance(value, str) else f"{100.0 * value if percent else value:.3g}"
