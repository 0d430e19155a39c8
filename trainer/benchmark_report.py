"""The benchmark's results as Markdown tables and pictures."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray

from pipeline.formats.csist import CsistDataset
from pipeline.physics.grid import cell_centres_px
from pipeline.physics.score import THRESHOLDS_PX
from trainer.benchmark import System
from trainer.evaluate import true_maps

THRESHOLDS = tuple(f"{threshold:.2f}" for threshold in THRESHOLDS_PX)
_OURS, _SOLVER, _LEARNT = "tab:orange", "tab:gray", "tab:blue"


def write_report(
    results: dict[str, Any], dataset: CsistDataset, systems: tuple[System, ...], folder: Path
) -> str:
    """Write benchmark.md, .json and .png, and maps.png; → the Markdown."""
    text = markdown(results)
    (folder / "benchmark.md").write_text(text, encoding="utf-8")
    (folder / "benchmark.json").write_text(json.dumps(results, indent=1, allow_nan=False) + "\n")
    draw_bars(results, folder / "benchmark.png")
    draw_maps(dataset, systems, folder / "maps.png")
    return text


def markdown(results: dict[str, Any]) -> str:
    """Three tables: the systems, by number of targets, and what the grid allows."""
    rows = results["systems"]
    counts = sorted({count for row in rows for count in row["cso_map_by_count"]})
    head = (
        f"{results['images']:,} images of `{results['profile']}`, seed {results['seed']}. "
        "CSO-mAP and AP × 100, in brackets the 95 % bootstrap interval; † smaller than published. "
        f"Patches/s: {results['machine']}.\n"
    )
    systems = _table(
        [
            "system", "c", "parameters", "multiply-adds", "patches seen", "training", "CSO-mAP",
            "published", "less DISTA-Net", *(f"AP{t[2:]}" for t in THRESHOLDS), "PSNR dB",
            "SSIM", "patches/s",
        ],
        [_cells(row) for row in rows],
    )  # fmt: skip
    by_count = _table(
        ["CSO-mAP by number of targets", *counts],
        [
            [row["title"], *(_percent(row["cso_map_by_count"].get(count)) for count in counts)]
            for row in rows
        ],
    )
    ceiling = _table(
        ["perfect detection on the grid", *(f"c = {c}" for c in results["ceiling"])],
        [["CSO-mAP", *(_percent(value) for value in results["ceiling"].values())]],
    )
    return "\n".join([head, systems, by_count, ceiling])


def _cells(row: dict[str, Any]) -> list[str]:
    published = row["published"]
    smaller = published["parameters"] and row["parameters"] < 0.99 * published["parameters"]
    low, high = row["cso_map_interval"]
    versus = row["against_reference"]
    return [
        row["title"],
        str(row["c"]),
        f"{row['parameters'] / 1e6:.3f} M{' †' if smaller else ''}" if row["parameters"] else "–",
        f"{row['multiply_adds'] / 1e6:,.0f} M",
        f"{row['samples_seen']:,}" if row["samples_seen"] else "–",
        f"{row['training_s'] / 60:.0f} min" if row["training_s"] else "–",
        f"**{_percent(row['cso_map'])}** ({_percent(low)}–{_percent(high)})",
        _percent(published["cso_map"]),
        f"{100 * versus[0]:+.2f} to {100 * versus[1]:+.2f}" if versus else "–",
        *(_percent(row["ap"][threshold]) for threshold in THRESHOLDS),
        "–" if row["psnr_db"] is None else f"{row['psnr_db']:.2f}",
        "–" if row["ssim"] is None else f"{row['ssim']:.4f}",
        f"{row['patches_per_s']:,.0f}",
    ]


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.2f}"


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def draw_bars(results: dict[str, Any], path: Path) -> None:
    """CSO-mAP of each system with its interval, the published figure, the grid's ceiling."""
    rows = results["systems"]
    figure = Figure(figsize=(9, 0.42 * len(rows) + 1.6), layout="constrained")
    axes = figure.subplots()
    place = np.arange(len(rows))
    value = np.array([row["cso_map"] for row in rows])
    interval = np.array([row["cso_map_interval"] for row in rows]).T
    axes.barh(
        place,
        value,
        xerr=np.abs(interval - value),
        color=[_colour(row) for row in rows],
        error_kw={"elinewidth": 1},
    )
    for y, row in zip(place, rows, strict=True):
        published = row["published"]["cso_map"]
        if published is not None:
            axes.plot(published, y, "kD", markersize=5)
        if row["output"] == "intensity-map":
            ceiling = results["ceiling"][str(row["c"])]
            axes.plot([ceiling, ceiling], [y - 0.45, y + 0.45], color="tab:red")
    axes.plot([], [], "kD", markersize=5, label="published")
    axes.plot([], [], color="tab:red", label="perfect detection on this grid")
    axes.set_yticks(place, [_label(row) for row in rows])
    axes.invert_yaxis()
    axes.set(xlabel="CSO-mAP", xlim=(0.0, 1.0))
    axes.legend(loc="upper right")
    axes.grid(axis="x", alpha=0.3)
    figure.savefig(path, dpi=110)


def _colour(row: dict[str, Any]) -> str:
    if row["output"] != "intensity-map":
        return _OURS
    return _LEARNT if row["parameters"] else _SOLVER


def _label(row: dict[str, Any]) -> str:
    seen = f"\n{row['samples_seen'] / 1000:,.0f} k patches seen" if row["samples_seen"] else ""
    return f"{row['title']}{seen}"


def draw_maps(dataset: CsistDataset, systems: tuple[System, ...], path: Path) -> None:
    """One image for each number of targets: patch, true map, each system's map.

    Off the grid: probability times intensity. Crosses: the true positions. All around the middle
    of the group, ± 1.5 px.
    """
    chosen = _examples(dataset)
    shown = [system for system in systems if not system.refined]
    columns = ["patch", "truth, c = 3", *(system.title for system in shown)]
    figure = Figure(figsize=(1.55 * len(columns), 1.6 * len(chosen) + 0.5), layout="constrained")
    grid = np.reshape(figure.subplots(len(chosen), len(columns)), (len(chosen), -1))
    full_scale = float(dataset.sensor.full_scale)
    patches = (dataset.image[chosen] / full_scale).astype(np.float32)
    unit = np.full(len(dataset), full_scale)
    maps: list[NDArray[Any]] = [patches, true_maps(dataset, slice(None), 3, unit)[chosen]]
    for system in shown:
        with system.load() as engine:
            answer = engine.infer(patches)
        if engine.manifest.output == "cell-targets":
            cells = torch.pixel_shuffle(torch.from_numpy(answer), engine.manifest.c)
            answer = (torch.sigmoid(cells[:, 0]) * cells[:, 3]).numpy()
        maps.append(answer)
    for column, (title, images) in enumerate(zip(columns, maps, strict=True)):
        grid[0, column].set_title(title.replace("– without ", "without\n"), fontsize=8)
        c = images.shape[1] // dataset.image.shape[1]
        centres = cell_centres_px(dataset.image.shape[1], c)
        edges = (centres[0] - 0.5 / c, centres[-1] + 0.5 / c)
        for axes, image, which in zip(grid[:, column], images, chosen, strict=True):
            true = dataset.target_xy_px[which][: dataset.target_count[which]]
            axes.imshow(image, extent=(*edges, *edges[::-1]), vmin=0.0, vmax=1.0, cmap="inferno")
            axes.plot(true[:, 0], true[:, 1], "c+", markersize=5, markeredgewidth=0.8)
            middle = np.rint(true.mean(axis=0))
            axes.set(xlim=middle[0] + [-1.5, 1.5], ylim=middle[1] + [1.5, -1.5])
            axes.set(xticks=[], yticks=[])
    figure.savefig(path, dpi=110)


def _examples(dataset: CsistDataset) -> list[int]:
    """For each number of targets the first image whose group lies well within it, if any does."""
    size = dataset.image.shape[1]
    position = dataset.target_xy_px.reshape(len(dataset), -1)
    inside = ~((position < 2.0) | (position > size - 3.0)).any(axis=1)  # NaN is neither
    found = []
    for count in np.unique(dataset.target_count):
        of_count = np.flatnonzero(dataset.target_count == count)
        found.append(int(of_count[np.argmax(inside[of_count])]))
    return found
