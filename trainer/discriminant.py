"""Fits the discriminant of the detector `local_contrast` to pictures of synthetic clutter.

Every island of a picture is an example: a target if its brightest pixels lie where one was put.
A network of one hidden layer learns the logarithm of the odds, by full-batch AdamW on the
cross-entropy. On pictures of another seed it is then counted how often, a pixel, clutter gets
which score: what the Gaussian exceeds as often is the score's worth in sigmas.
"""

import json
from collections.abc import Iterable
from pathlib import Path

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import ndtri

from pipeline.formats.writable import check_writable
from pipeline.imaging.islands import describe, directional_contrast, find_islands, smoothed
from trainer.clutter import Picture, draw_pictures
from trainer.errors import TrainerError

HIDDEN = 20
STEPS = 800
LEARNING_RATE, WEIGHT_DECAY = 0.02, 0.01
GATE_PX = 3.0
RATES_PER_MPX = np.geomspace(300.0, 1.0, 12)
"""False alarms a million pixels at which the scores are tabled."""


def examples(pictures: Iterable[Picture]) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Features (N, F) of all islands and which are targets (N,)."""
    rows, targets = [], []
    for pixels_HW, mask_HW in pictures:
        image_HW = smoothed(pixels_HW)
        contrast_HW = directional_contrast(image_HW)
        islands = find_islands(image_HW, contrast_HW)
        _, _, _, centres = cv2.connectedComponentsWithStats(mask_HW.astype(np.uint8))
        for island, row in zip(islands, describe(image_HW, contrast_HW, islands), strict=True):
            y, x = np.nonzero(island.share() >= 0.7)
            middle = np.array([x.mean(), y.mean()]) + island.corner
            rows.append(row)
            targets.append(np.hypot(*(centres[1:] - middle).T).min() < GATE_PX)
    return np.array(rows), np.array(targets)


def fit_discriminant(out: Path, count: int, seed: int) -> dict[str, float]:
    """Fit on `count` pictures, calibrate on as many others, write JSON; returns what to print."""
    check_writable(out)
    torch.manual_seed(seed)
    features, is_target = examples(draw_pictures(count, seed))
    mean, scale = features.mean(axis=0), features.std(axis=0)
    inputs = torch.tensor((features - mean) / scale, dtype=torch.float64)
    wanted = torch.tensor(is_target, dtype=torch.float64)
    hidden = torch.nn.Linear(inputs.shape[1], HIDDEN, dtype=torch.float64)
    output = torch.nn.Linear(HIDDEN, 1, dtype=torch.float64)
    network = torch.nn.Sequential(hidden, torch.nn.Tanh(), output)
    optimizer = torch.optim.AdamW(network.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = torch.nn.functional.binary_cross_entropy_with_logits(network(inputs)[:, 0], wanted)
        loss.backward()
        optimizer.step()
        schedule.step()

    held_out = list(draw_pictures(count, seed + 1))
    features, is_target = examples(held_out)
    with torch.no_grad():
        scores = network(torch.tensor((features - mean) / scale))[:, 0].numpy()
    clutter = np.sort(scores[~is_target])[::-1]
    pixels = sum(picture.pixels_HW.size for picture in held_out)
    ranks = np.unique(np.rint(RATES_PER_MPX * 1e-6 * pixels).astype(int))[::-1]
    ranks = ranks[(ranks >= 1) & (ranks <= len(clutter))]
    stored = {
        "mean": mean,
        "scale": scale,
        "hidden": hidden.weight.detach().numpy(),
        "hidden_bias": hidden.bias.detach().numpy(),
        "output": output.weight.detach().numpy()[0],
        "output_bias": output.bias.detach().numpy()[0],
        "score": clutter[ranks - 1],
        "sigmas": -ndtri(ranks / pixels),
    }
    lines = {name: np.round(value, 4).tolist() for name, value in stored.items()}
    try:
        out.write_text(json.dumps(lines) + "\n", encoding="utf-8")
    except OSError as error:
        raise TrainerError(f"{out}: cannot be written ({error.strerror})") from error
    threshold = np.interp(
        0.1, [rank / len(held_out) for rank in ranks[::-1]], stored["score"][::-1]
    )
    return {
        "examples": float(len(is_target)),
        "loss": float(loss.detach()),
        "score at 0.1 false alarms a picture": float(threshold),
        "share of held-out islands of targets above it": float(
            (scores[is_target] > threshold).mean()
        ),
    }
