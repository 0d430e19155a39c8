"""The benchmark: every system of the literature on the same held-out images, by one metric."""

import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from pipeline.formats.csist import CsistDataset, read_csist, write_csist
from pipeline.physics.groups import PROFILES
from trainer.errors import TrainerError
from trainer.evaluate import Method, Progress, figures, true_maps, unmix
from trainer.metrics import cso_map, cso_map_difference_interval
from trainer.network import UnmixingNetwork
from trainer.reading import Detections, Reading, detections, read_maps
from trainer.targets import cpu_name
from trainer.trained import BATCH, WEIGHTS, TrainedNetwork, load_untrained, load_weights

COUNTED_PATCHES = 4
"""Patches whose multiply-adds are counted; only a solver's differ from patch to patch."""

FIGURES = (
    "refined", "cso_map", "cso_map_interval", "cso_map_by_count", "ap", "psnr_db", "ssim",
    "count_accuracy", "rmse_px", "crb_px", "intensity_rmse_relative", "patches_per_s",
)  # fmt: skip
"""What of `trainer.evaluate.figures` a row holds."""

REFERENCE = "DISTA-Net"
"""The system the others are compared with, image by image."""


@dataclass(frozen=True)
class Published:
    """What the literature reports; arXiv:2505.19148 unless the system's file says otherwise."""

    cso_map: float | None = None  # 0–1
    ap: tuple[float, ...] = ()  # at 0.05, 0.10, 0.15, 0.20, 0.25 px, 0–1
    psnr_db: float | None = None
    ssim: float | None = None
    parameters: float | None = None


@dataclass(frozen=True)
class System:
    """A row of the table: a weights file, or a solver's name and settings."""

    title: str
    weights: str | None = None  # trainer/weights/NAME.pt
    solver: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    refined: bool = False
    priors: bool = False
    published: Published = Published()

    def load(self) -> TrainedNetwork:
        """The network in torch float32; raises TrainerError if it cannot be loaded."""
        if self.solver is not None:
            return load_untrained(self.solver, self.settings)
        return load_weights(WEIGHTS / f"{self.weights}.pt")


def _published(
    cso_map: float,
    ap: tuple[float, ...] = (),
    psnr_db: float | None = None,
    ssim: float | None = None,
    parameters: float | None = None,
) -> Published:
    """Percent as printed in the papers to shares."""
    shares = tuple(round(value / 100, 6) for value in ap)
    return Published(round(cso_map / 100, 6), shares, psnr_db, ssim, parameters)


SYSTEMS = (
    System("ISTA", solver="ista", published=_published(7.46, (0.01, 0.31, 2.39, 9.46, 25.14))),
    System(
        "SRFBN",
        "srfbn",
        published=_published(46.05, (0.43, 8.31, 42.83, 83.72, 94.95), 34.29, 0.9815, 0.373e6),
    ),
    System(
        "SAN",
        "san",
        published=_published(45.95, (0.36, 7.35, 41.17, 84.32, 96.57), 37.18, 0.9848, 4.442e6),
    ),
    System(
        "ISTA-Net",
        "ista_net",
        published=_published(45.16, (0.41, 7.71, 40.57, 82.58, 94.53), 35.67, 0.9862, 0.171e6),
    ),
    System(
        "ISTA-Net+",
        "ista_net_plus",
        published=_published(46.06, (0.42, 7.66, 41.58, 84.46, 96.17), 38.50, 0.9887, 0.337e6),
    ),
    System(
        "FOCUS",
        "focus",
        published=_published(45.50, (0.4, 7.3, 41.0, 83.2, 95.5), parameters=0.046e6),
    ),
    System("DSCSNet", "dscs_net", published=_published(46.36)),
    System(
        REFERENCE,
        "dista_net",
        published=_published(46.74, (0.38, 7.54, 42.44, 86.18, 97.14), 38.38, 0.9887, 2.179e6),
    ),
    System("DISTA-Net, full size", "dista_net_full"),
    System("DISTA-Net, short run", "variants/dista_net_short"),
    System(
        "– without dynamic transform",
        "variants/dista_net_no_transform",
        published=_published(46.32),
    ),
    System(
        "– without dynamic threshold",
        "variants/dista_net_no_threshold",
        published=_published(46.17),
    ),
    System("DISTA-Net, c = 5", "variants/dista_net_c5"),
    System("DISTA-Net, c = 7", "variants/dista_net_c7"),
    System("off the grid, first 1.1 M patches (ours)", "variants/off_grid_first"),
    System("off the grid (ours)", "off_grid"),
    System("off the grid + fit (ours)", "off_grid", refined=True),
    System("the same, with the rules (ours)", "off_grid", refined=True, priors=True),
)


def chosen(titles: Sequence[str] | None) -> tuple[System, ...]:
    """The systems of these titles, in the order of the table; all without any."""
    known = [system.title for system in SYSTEMS]
    for title in titles or ():
        if title not in known:
            raise TrainerError(f"--only: no system `{title}`; use {', '.join(known)}")
    return tuple(system for system in SYSTEMS if not titles or system.title in titles)


def draw_images(count: int, seed: int) -> CsistDataset:
    """Images of csist-100k, the same as `trainer generate` with this count and seed."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "images.zarr"
        write_csist(path, PROFILES["csist-100k"], count, seed)
        return read_csist(path)


def run(
    dataset: CsistDataset,
    systems: tuple[System, ...] = SYSTEMS,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure all systems on one dataset; → plain JSON types.

    Raises TrainerError before anything is measured if a system cannot be loaded, or was not made
    for the dataset's sensor. progress: called with the number of patches done, over all systems.
    """
    loaded = [(system, system.load()) for system in systems]
    true = dataset.truths()
    rows: list[dict[str, Any]] = []
    found: dict[str, list[Detections]] = {}
    for system, engine in loaded:
        if misfits := engine.manifest.fits(dataset.sensor):
            raise TrainerError(
                f"benchmark: {system.title} is {misfits[0]}; "
                "use a dataset of profile csist-100k or interior"
            )
    for index, (system, engine) in enumerate(loaded):
        step = None if progress is None else _counted_on(progress, index * len(dataset))
        unmixed = unmix(dataset, engine, step, refined=system.refined, priors=system.priors)
        found[system.title] = unmixed.found
        rows.append(_row(system, engine, dataset, figures(dataset, Method.of(engine), unmixed)))
    for row in rows:
        row["against_reference"] = (
            list(cso_map_difference_interval(found[row["title"]], found[REFERENCE], true))
            if REFERENCE in found and row["title"] != REFERENCE
            else None
        )
    return {
        "profile": dataset.profile,
        "seed": dataset.seed,
        "images": len(dataset),
        "machine": _machine(),
        "ceiling": {str(c): grid_ceiling(dataset, c) for c in sorted({row["c"] for row in rows})},
        "systems": rows,
    }


def grid_ceiling(dataset: CsistDataset, c: int) -> float:
    """CSO-mAP of perfect detection on the grid: each true target in its cell, nothing else."""
    full_scale = float(dataset.sensor.full_scale)
    unit = np.full(len(dataset), full_scale)
    maps = true_maps(dataset, slice(None), c, unit).astype(np.float32)
    read = read_maps(maps, unit, Reading("intensity-map", c, dataset.sensor.sigma_px))
    return cso_map(detections(read, len(dataset)), dataset.truths()).mean


def multiply_adds(network: UnmixingNetwork, patch_BHW: torch.Tensor) -> float:
    """Of convolutions and matrix products for a patch, mean over patches unmixed one by one."""
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        for patch in patch_BHW:
            network(patch[None])
    return counter.get_total_flops() / 2 / len(patch_BHW)


def _row(
    system: System, engine: TrainedNetwork, dataset: CsistDataset, measured: dict[str, Any]
) -> dict[str, Any]:
    manifest = engine.manifest
    few = dataset.image[:COUNTED_PATCHES].astype(np.float32) / dataset.sensor.full_scale
    return {
        "title": system.title,
        "network": manifest.network,
        "settings": manifest.settings,
        "c": manifest.c,
        "output": manifest.output,
        "parameters": manifest.parameters,
        "multiply_adds": multiply_adds(engine.network, torch.from_numpy(few)),
        "samples_seen": manifest.samples,
        "training_s": manifest.training_s,
        **{name: measured[name] for name in FIGURES},
        "published": asdict(system.published),
    }


def _counted_on(progress: Progress, before: int) -> Progress:
    return lambda done: progress(before + done)


def _machine() -> str:
    threads = torch.get_num_threads()
    return f"{cpu_name()}, {threads} threads, torch {torch.__version__}, float32, batch {BATCH}"
