"""The literature's "super-resolved map + detector": a YOLO that reads a network's c-times map.

    pip install "irst-pipeline[train]"
    pip install --no-deps libreyolo==1.6.0 requests safetensors tqdm
    python examples/yolo_on_map.py dista_net srfbn

For each network of trainer/weights: its maps of images that are not the benchmark's, a small YOLO
trained on them to put a box of two cells' side round every target, and the CSO-mAP on the 10,000
images of the benchmark of the boxes' middles, beside that of the map's cells as published. The YOLO
sees maps four times enlarged, in training parts of 16 × 16 cells with all targets in them.
"""

import argparse
import math
import time

import cv2
import numpy as np
import torch
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from pipeline.formats.csist import CsistDataset
from trainer.benchmark import draw_images
from trainer.metrics import cso_map, cso_map_interval
from trainer.reading import Reading, detections, read_maps
from trainer.trained import BATCH, WEIGHTS, load_weights
from trainer.yolo.network import YoloNetwork

CROP, ENLARGED = 16, 4
BOX_CELLS = 2.0
AT_ONCE = 16
BENCHMARK_SEED, TRAINING_SEED = 20261122, 77
MIN_SCORE, OVERLAP = 0.02, 0.3


def maps_of(weights: str, images: CsistDataset) -> tuple[np.ndarray, Reading]:
    """(B, n, n) in units of full scale, and how they are read as published."""
    engine = load_weights(WEIGHTS / f"{weights}.pt")
    patches = images.image.astype(np.float32) / images.sensor.full_scale
    parts = [engine.infer(patches[k : k + BATCH]) for k in range(0, len(images), BATCH)]
    maps = np.concatenate(parts)
    return maps.reshape(len(images), *maps.shape[-2:]), Reading.of(engine.manifest, images.sensor)


def enlarged(cells: np.ndarray) -> torch.Tensor:
    """What the YOLO sees of maps or parts of them (B, n, n): (B, 1, 4 n, 4 n)."""
    image = torch.from_numpy(np.ascontiguousarray(cells[:, None], np.float32))
    return F.interpolate(image, scale_factor=ENLARGED, mode="bilinear")


def crops(
    images: CsistDataset, maps: np.ndarray, c: int, rows: np.ndarray, rng: np.random.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Parts of 16 × 16 cells with all targets of a map in them, and their boxes (B, 5, 5).

    A box is class, x0, y0, x1, y1 as shares of the part; all 0 where there is none.
    """
    cells = (images.target_xy_px[rows] + 0.5) * c
    shift = rng.integers(-3, 4, (len(rows), 2)) - CROP // 2
    first = np.floor(np.nanmean(cells, axis=1)).astype(int) + shift
    padded = np.pad(maps[rows], ((0, 0), (CROP, CROP), (CROP, CROP)))
    parts = [
        part[y + CROP : y + 2 * CROP, x + CROP : x + 2 * CROP]
        for part, (x, y) in zip(padded, first, strict=True)
    ]
    cells -= first[:, None]
    corners = np.concatenate([cells - BOX_CELLS / 2, cells + BOX_CELLS / 2], axis=-1) / CROP
    boxes = np.concatenate([np.zeros_like(corners[..., :1]), corners], axis=-1)
    return enlarged(np.stack(parts)), torch.from_numpy(np.nan_to_num(boxes).astype(np.float32))


def train(images: CsistDataset, maps: np.ndarray, c: int, samples: int, seed: int) -> YoloNetwork:
    """A YOLO of these maps; turned and mirrored they are others."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    network = YoloNetwork(YoloNetwork.Config())
    ema = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(0.99), use_buffers=True)
    optimiser = torch.optim.AdamW(network.parameters(), lr=3e-3, weight_decay=1e-3)
    steps, recent = math.ceil(samples / AT_ONCE), []
    for step in range(steps):
        rate = min(1.0, (step + 1) / 30) * 0.5 * (1.0 + math.cos(math.pi * step / steps))
        optimiser.param_groups[0]["lr"] = 3e-3 * rate
        frame, target = crops(images, maps, c, rng.integers(len(maps), size=AT_ONCE), rng)
        there = target[..., 3:4] > 0
        if rng.random() < 0.5:
            frame, target = frame.flip(3), _mirrored(target, 1, there)
        if rng.random() < 0.5:
            frame, target = frame.flip(2), _mirrored(target, 2, there)
        if rng.random() < 0.5:
            frame, target = frame.transpose(2, 3), target[..., [0, 2, 1, 4, 3]]
        loss = network(frame.contiguous(), target)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 5.0)
        optimiser.step()
        ema.update_parameters(network)
        recent.append(loss.item())
        if (step + 1) % 100 == 0:
            print(f"  step {step + 1} of {steps}: loss {np.mean(recent[-100:]):.3f}", flush=True)
    return ema.module.eval()


def _mirrored(target: torch.Tensor, axis: int, there: torch.Tensor) -> torch.Tensor:
    """Boxes with x (axis 1) or y (2) the other way round."""
    other = target.clone()
    other[..., axis], other[..., axis + 2] = 1.0 - target[..., axis + 2], 1.0 - target[..., axis]
    return torch.where(there, other, target)


def found(network: YoloNetwork, maps: np.ndarray, c: int) -> list[np.ndarray]:
    """For each map its targets (n, 3): x px, y px, score."""
    tables = []
    more = -maps.shape[-1] % (16 // ENLARGED)  # the network's coarsest stride is 16
    for k in range(0, len(maps), BATCH):
        with torch.no_grad():
            frames = enlarged(np.pad(maps[k : k + BATCH], ((0, 0), (0, more), (0, more))))
            answers = network(frames).numpy()
        for answer in answers:
            score = answer[4]
            corners, score = answer[:4, score >= MIN_SCORE].T, score[score >= MIN_SCORE]
            sides = np.column_stack([corners[:, :2], corners[:, 2:] - corners[:, :2]])
            kept = cv2.dnn.NMSBoxes(sides.tolist(), score.tolist(), MIN_SCORE, OVERLAP)
            kept = np.asarray(kept, int).reshape(-1)
            middle = (corners[kept, :2] + corners[kept, 2:]) / 2.0
            tables.append(np.column_stack([middle / ENLARGED / c - 0.5, score[kept]]))
    return tables


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("weights", nargs="+", help="of trainer/weights, e.g. dista_net")
    parser.add_argument("--maps", type=int, default=4_000, help="to train on")
    parser.add_argument("--samples", type=int, default=24_000, help="seen in training")
    parser.add_argument("--images", type=int, default=10_000, help="to score")
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    scored = draw_images(given.images, BENCHMARK_SEED)
    seen = draw_images(given.maps, TRAINING_SEED)
    for weights in given.weights:
        started = time.monotonic()
        maps, reading = maps_of(weights, scored)
        unit = np.full(len(scored), float(scored.sensor.full_scale))
        plain = detections(read_maps(maps, unit, reading), len(scored))
        training, _ = maps_of(weights, seen)
        print(f"{weights}: {len(maps)} + {len(training)} maps, {time.monotonic() - started:.0f} s")
        started = time.monotonic()
        network = train(seen, training, reading.c, given.samples, seed=1)
        seconds = time.monotonic() - started
        for name, tables in (("cells", plain), ("YOLO", found(network, maps, reading.c))):
            score = cso_map(tables, scored.truths())
            low, high = cso_map_interval(tables, scored.truths())
            ap = ", ".join(f"{100 * value:.2f}" for value in score.ap.values())
            print(
                f"{weights} + {name}: CSO-mAP {100 * score.mean:.2f} "
                f"({100 * low:.2f}–{100 * high:.2f}), AP {ap}"
            )
        print(f"  the YOLO saw {given.samples} maps in {seconds:.0f} s", flush=True)


if __name__ == "__main__":
    main()
