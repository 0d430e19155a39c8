"""Pictures of synthetic clutter with small targets in them and masks of these, as PNG.

Clouds, sea glint, wooded ridges, buildings with windows and wires, eroded terrain, a tree line
under a dark sky, plain noise: Gaussian fields with spectrum |f|^−β, cut, bent and overlaid. A
picture has a size, blur, noise and grey levels of its own; some are enlarged, some have been JPEG.
A target is an elliptic Gaussian of sigma 0.6…2.5 px or, one in five, a blurred disc; its peak is
15…120 grey levels and at least three times what is restless round it. Seven in eight pictures hold
one target, the others two.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from trainer.aside import aside
from trainer.errors import TrainerError

Grey = NDArray[np.float64]
MASK_SHARE = 0.4
"""Pixels of a target are those above this share of its peak."""


class Picture(NamedTuple):
    """A picture, 8 bits, and which of its pixels are targets; (H, W) each."""

    pixels_HW: NDArray[np.uint8]
    mask_HW: NDArray[np.bool_]


def draw_picture(kind: str, rng: np.random.Generator) -> Picture:
    """One picture; `kind` is a key of KINDS."""
    sides = np.exp(rng.uniform(np.log(80.0), np.log(340.0), 2))
    height, width = (int(side) for side in sides)
    noise = float(np.exp(rng.uniform(np.log(0.4), np.log(8.0))))
    grey = KINDS[kind](rng, height, width)
    mask = np.zeros(grey.shape, np.bool_)
    for _ in range(1 if rng.random() < 0.88 else 2):
        target = _target(rng, grey, noise)
        mask |= target > MASK_SHARE * target.max()
        grey = grey + target
    grey = grey + noise * rng.standard_normal(grey.shape)
    if rng.random() < 0.35:
        factor = rng.uniform(1.2, 1.8)
        grey = np.asarray(
            cv2.resize(grey, None, fx=factor, fy=factor, interpolation=cv2.INTER_CUBIC), np.float64
        )
        size = grey.shape[::-1]
        mask = cv2.resize(mask.view(np.uint8), size, interpolation=cv2.INTER_NEAREST) > 0
    pixels = np.clip(np.rint(grey), 0, 255).astype(np.uint8)
    if rng.random() < 0.5:
        quality = int(rng.integers(70, 96))
        _, encoded = cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, quality])
        pixels = np.asarray(cv2.imdecode(encoded, cv2.IMREAD_GRAYSCALE), np.uint8)
    return Picture(pixels, mask)


def draw_pictures(count: int, seed: int) -> Iterator[Picture]:
    """So many, of all kinds in turn, each from a stream of random numbers of its own."""
    kinds = list(KINDS)
    for number in range(count):
        yield draw_picture(kinds[number % len(kinds)], np.random.default_rng([seed, number]))


def write_pictures(
    folder: Path, count: int, seed: int, progress: Callable[[int], None] | None = None
) -> None:
    """`folder`/images and `folder`/masks, both with 0000.png, 0001.png, …; or neither.

    progress: called with the number drawn. Raises TrainerError if they are there already or cannot
    be written.
    """
    names = ("images", "masks")
    for name in names:
        if (folder / name).exists():
            raise TrainerError(f"{folder / name}: exists already; remove it or choose a new folder")
    with aside(folder, "clutter") as part:
        try:
            for name in names:
                (part / name).mkdir()
            for number, picture in enumerate(draw_pictures(count, seed)):
                images = picture.pixels_HW, 255 * picture.mask_HW.view(np.uint8)
                for name, image in zip(names, images, strict=True):
                    path = part / name / f"{number:04d}.png"
                    path.write_bytes(cv2.imencode(".png", image)[1].tobytes())
                if progress is not None:
                    progress(number + 1)
            for name in names:
                (part / name).rename(folder / name)
        except OSError as error:
            raise TrainerError(f"{folder}: cannot be written ({error.strerror})") from error


def power_law(rng: np.random.Generator, height: int, width: int, slope: float) -> Grey:
    """Gaussian field (H, W) with power spectrum |f|^−slope, mean 0 and rms 1."""
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width))
    frequency[0, 0] = np.inf
    spectrum = np.fft.rfft2(rng.standard_normal((height, width))) * frequency ** (-0.5 * slope)
    field = np.fft.irfft2(spectrum, s=(height, width))
    result: Grey = field / field.std()
    return result


def _blurred(grey: Grey, sigma_px: float) -> Grey:
    return np.asarray(cv2.GaussianBlur(grey, (0, 0), sigma_px), np.float64)


def _clouds(rng: np.random.Generator, height: int, width: int) -> Grey:
    soft = power_law(rng, height, width, rng.uniform(2.7, 3.8))
    grey = rng.uniform(60, 140) + rng.uniform(4, 30) * soft
    if rng.random() < 0.5:
        shape = power_law(rng, height, width, rng.uniform(2.6, 3.4))
        cover = 1.0 / (1.0 + np.exp(-rng.uniform(3, 15) * (shape - rng.uniform(-0.5, 1.0))))
        grey = grey * (1.0 - 0.3 * cover) + rng.uniform(30, 90) * cover
    return _blurred(grey, 0.8)


def _sea(rng: np.random.Generator, height: int, width: int) -> Grey:
    long = power_law(rng, height, max(32, width // 3), 1.6)
    waves = 0.6 * power_law(rng, height, width, rng.uniform(1.2, 2.4))
    waves += 0.6 * cv2.resize(long, (width, height), interpolation=cv2.INTER_CUBIC)
    sea = rng.uniform(60, 110) + rng.uniform(4, 20) * np.exp(0.35 * waves)
    sky = rng.uniform(60, 120) + 4.0 * power_law(rng, height, width, 3.2)
    horizon = rng.integers(height // 5, height // 2)
    return _blurred(np.where(np.arange(height)[:, None] < horizon, sky, sea), 0.7)


def _ridges(rng: np.random.Generator, height: int, width: int) -> Grey:
    grey = np.full((height, width), rng.uniform(50, 110))
    for number in range(3):
        crest = height * (0.35 + 0.2 * number + 0.08 * power_law(rng, 4, width, 2.0)[0])
        wood = rng.uniform(3, 14) * power_law(rng, height, width, rng.uniform(2.0, 3.0))
        below = np.arange(height)[:, None] > crest
        grey = np.where(below, rng.uniform(30, 160) + wood, grey)
    return _blurred(grey, rng.uniform(0.5, 1.0))


def _buildings(rng: np.random.Generator, height: int, width: int) -> Grey:
    grey = rng.uniform(50, 90) + 5.0 * power_law(rng, height, width, 3.0)
    left = 0
    while left < width:
        right = left + int(rng.integers(18, 60))
        top = int(rng.integers(height // 4, height * 3 // 4))
        wall, pane = rng.uniform(60, 160), rng.uniform(-30, 50)
        grey[top:, left:right] = wall
        if rng.random() < 0.35:
            step_x, step_y = (int(step) for step in rng.integers(5, 12, 2))
            for y in range(top + 4, height - 4, step_y):
                for x in range(left + 4, min(right, width) - 4, step_x):
                    window = (slice(y, y + step_y // 2), slice(x, x + step_x // 2))
                    grey[window] = wall + pane * rng.uniform(0.6, 1.0)
        left = right + int(rng.integers(0, 25))
    for _ in range(int(rng.integers(0, 3))):
        start, end = (rng.random((2, 2)) * (width, height)).astype(int).tolist()
        cv2.line(grey, start, end, float(rng.uniform(90, 190)), int(rng.integers(1, 3)))
    return _blurred(grey, rng.uniform(0.6, 1.1))


def _terrain(rng: np.random.Generator, height: int, width: int) -> Grey:
    """Valleys where a field crosses zero, on two scales."""
    coarse = np.abs(power_law(rng, height, width, rng.uniform(3.0, 4.0)))
    fine = np.abs(power_law(rng, height, width, rng.uniform(2.2, 3.2)))
    relief = coarse + rng.uniform(0.1, 0.6) * fine
    sign = 1.0 if rng.random() < 0.5 else -1.0
    return _blurred(rng.uniform(70, 140) + sign * rng.uniform(15, 45) * relief, 0.8)


def _treeline(rng: np.random.Generator, height: int, width: int) -> Grey:
    """A gain-controlled camera's view: sky darkest above bright, often saturated trees; posts."""
    row = np.arange(height)[:, None]
    crest = height * (rng.uniform(0.5, 0.85) + 0.03 * power_law(rng, 4, width, 2.5)[0])
    above = np.maximum(crest - row, 0.0) / height
    sky = rng.uniform(60, 120) * (1.0 - np.exp(-above * rng.uniform(3, 20)))
    sky += rng.uniform(1, 12) * power_law(rng, height, width, 3.4)
    trunks = cv2.resize(power_law(rng, max(8, height // 4), width, 1.8), (width, height))
    trees = rng.uniform(140, 300) + rng.uniform(20, 60) * trunks
    field = rng.uniform(60, 180) + rng.uniform(2, 10) * power_law(rng, height, width, 2.2)
    foot = crest + height * rng.uniform(0.03, 0.12)
    grey = np.where(row < crest, sky, np.where(row < foot, trees, field))
    for _ in range(int(rng.integers(0, 4))):
        x, top = int(rng.integers(width)), int(rng.integers(height // 3, height))
        grey[top:, x : x + int(rng.integers(1, 5))] = rng.uniform(120, 260)
    return _blurred(np.clip(grey, 0.0, 255.0), rng.uniform(0.6, 1.2))


def _plain(rng: np.random.Generator, height: int, width: int) -> Grey:
    """Nothing but noise, often stronger than anywhere else, and the pattern of the columns."""
    noise = float(np.exp(rng.uniform(0.0, np.log(25.0))))
    columns = rng.uniform(0.0, 0.5) * noise * rng.standard_normal(width)
    return rng.uniform(70, 140) + columns + noise * rng.standard_normal((height, width))


KINDS: dict[str, Callable[[np.random.Generator, int, int], Grey]] = {
    "clouds": _clouds,
    "sea": _sea,
    "ridges": _ridges,
    "buildings": _buildings,
    "terrain": _terrain,
    "treeline": _treeline,
    "plain": _plain,
}


def _target(rng: np.random.Generator, grey: Grey, noise: float) -> Grey:
    """Grey levels (H, W) one target adds."""
    height, width = grey.shape
    sigma_px = np.exp(rng.uniform(np.log(0.6), np.log(2.5)))
    aspect = np.exp(rng.uniform(0.0, np.log(2.2))) if rng.random() < 0.5 else 1.0
    long, short = sigma_px * np.sqrt(aspect), max(sigma_px / np.sqrt(aspect), 0.55)
    x, y, angle = rng.uniform(8, width - 9), rng.uniform(8, height - 9), rng.uniform(0, np.pi)
    off_x, off_y = np.arange(width) - x, np.arange(height)[:, None] - y
    along = (off_x * np.cos(angle) + off_y * np.sin(angle)) / long
    across = (off_y * np.cos(angle) - off_x * np.sin(angle)) / short
    shape = np.exp(-0.5 * (along**2 + across**2))
    if rng.random() < 0.2:
        shape = 1.0 / (1.0 + np.exp(np.minimum(3.0 * (np.hypot(along, across) - 1.6), 50.0)))
        shape /= shape.max()
    row, column = int(y), int(x)
    near = grey[max(0, row - 10) : row + 11, max(0, column - 10) : column + 11]
    restless = max(float((near - _blurred(near, 2.0)).std()), noise)
    peak = max(np.exp(rng.uniform(np.log(15.0), np.log(120.0))), rng.uniform(3, 6) * restless)
    result: Grey = peak * shape
    return result
