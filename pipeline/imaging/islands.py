"""Small bright islands of an image: how far each stands above what it is connected with.

The prominence of a peak is its height above the lowest level at which what is connected with it is
still small: the residue of an area opening (Vincent, "Grayscale area openings and closings", 1993).
A cloud's edge, a horizon, a pole or a roof is connected with more than an island may hold, so
however bright it is, nothing of it remains; unlike a top-hat no shape of it is asked.
"""

from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from pipeline.imaging.noise_blocks import float32
from pipeline.imaging.regions import Image

SMOOTH_PX = 0.7
MAX_AREA_PX, MAX_WIDTH_PX = 250, 21
"""What is larger at its foot is no island."""
REACH_PX = 22
SCALES_PX = (3, 5, 7, 9)
MAX_ISLANDS = 40
HALVINGS = 8
NEAR_PX = 50.0
OFFSET = 2.0
"""Grey levels added before logarithms: less contrast than that is no contrast in 8 bits."""

FEATURES = (
    "prominence", "above_ring_peaks", "above_rim", "directional_contrast", "above_ring_mean",
    "ring_deviation", "second_prominence", "fifth_prominence", "eighth_prominence",
    "third_prominence_near", "rms_directional_contrast", "rms_gradient", "area", "elongation",
    "fill", "convergence", "least_convergence",
)  # fmt: skip
"""Columns of `describe`: all but the last two are natural logarithms."""


class Island(NamedTuple):
    """A peak and the small region it is the highest point of."""

    corner: tuple[int, int]  # x, y of the window's first pixel
    window_HW: Image
    peak: tuple[int, int]  # x, y in the window
    base: float  # the lowest level at which it is an island
    prominence: float  # grey levels, of the peak above the base
    contrast: float  # directional, see `directional_contrast`

    def share(self) -> Image:
        """How far each pixel of the island (its window's shape) is from base to peak, 0…1.

        1 too where a second peak on the same island is higher.
        """
        inside, _, _ = self._component(self.base)
        share = np.clip((self.window_HW - self.base) / self.prominence, 0.0, 1.0)
        return float32(np.where(inside, share, 0.0))

    def _component(self, level: float) -> tuple[NDArray[np.bool_], int, tuple[int, int, int, int]]:
        """Pixels connected with the peak that reach a level, their number and box."""
        return _connected(self.window_HW, self.peak, level)

    def half(self) -> tuple[NDArray[np.bool_], int]:
        """The pixels above half the prominence, and their number."""
        inside, area, _ = self._component(self.base + 0.5 * self.prominence)
        return inside, area


def smoothed(image_HW: NDArray[Any]) -> Image:
    """The image in which islands are looked for."""
    return float32(cv2.GaussianBlur(image_HW.astype(np.float32), (0, 0), SMOOTH_PX))


def directional_contrast(image_HW: Image) -> Image:
    """The mean of a square above the greatest of its eight neighbours', best of four sizes.

    Where an edge or a ridge passes, a neighbour is as bright, and nothing is left. S. Moradi et
    al., "Fast and robust small infrared target detection using absolute directional mean
    difference algorithm", Signal Processing 177, 2020.
    """
    best = np.zeros(image_HW.shape, np.float32)
    for size in SCALES_PX:
        mean = cv2.blur(image_HW, (size, size), borderType=cv2.BORDER_REFLECT)
        around = np.zeros((2 * size + 1, 2 * size + 1), np.uint8)
        around[::size, ::size] = 1
        around[size, size] = 0
        best = np.maximum(best, mean - cv2.dilate(mean, around, borderType=cv2.BORDER_REFLECT))
    best[:2] = best[-2:] = 0.0
    best[:, :2] = best[:, -2:] = 0.0
    return best


def find_islands(image_HW: Image, contrast_HW: Image) -> list[Island]:
    """Islands of a smoothed image at the MAX_ISLANDS best peaks of its directional contrast."""
    highest = cv2.dilate(contrast_HW, np.ones((7, 7), np.uint8))
    y, x = np.nonzero((contrast_HW >= highest) & (contrast_HW > 0.5))
    best = np.argsort(-contrast_HW[y, x], kind="stable")[:MAX_ISLANDS]
    islands, seen = [], set()
    for column, row in zip(x[best].tolist(), y[best].tolist(), strict=True):
        island = _island(image_HW, column, row, float(contrast_HW[row, column]))
        place = (island.corner[0] + island.peak[0], island.corner[1] + island.peak[1])
        if island.prominence >= 1.0 and place not in seen:
            seen.add(place)
            islands.append(island)
    return islands


def _island(image_HW: Image, x: int, y: int, contrast: float) -> Island:
    left, top = max(0, x - REACH_PX), max(0, y - REACH_PX)
    window = np.ascontiguousarray(
        image_HW[top : y + REACH_PX + 1, left : x + REACH_PX + 1], np.float32
    )
    near_x, near_y = max(0, x - left - 3), max(0, y - top - 3)
    near = window[near_y : y - top + 4, near_x : x - left + 4]
    row, column = divmod(int(near.argmax()), near.shape[1])
    peak = (near_x + column, near_y + row)
    height = float(window[peak[1], peak[0]])
    low, base = float(window.min()), height
    for _ in range(HALVINGS):
        level = 0.5 * (low + base)
        _, area, (x0, y0, width, depth) = _connected(window, peak, level)
        ends = x0 + width == window.shape[1] or y0 + depth == window.shape[0]
        wide = max(width, depth) > MAX_WIDTH_PX or area > MAX_AREA_PX
        if wide or ends or x0 == 0 or y0 == 0:
            low = level
        else:
            base = level
    return Island((left, top), window, peak, base, height - base, contrast)


def _connected(
    window: Image, peak: tuple[int, int], level: float
) -> tuple[NDArray[np.bool_], int, tuple[int, int, int, int]]:
    mask = np.zeros((window.shape[0] + 2, window.shape[1] + 2), np.uint8)
    below = float(window[peak[1], peak[0]]) - level
    flags = 4 | cv2.FLOODFILL_FIXED_RANGE | cv2.FLOODFILL_MASK_ONLY
    area, _, mask, box = cv2.floodFill(window, mask, peak, 0, below, 1e9, flags)
    left, top, width, height = box
    return mask[1:-1, 1:-1] > 0, int(area), (left, top, width, height)


def describe(image_HW: Image, contrast_HW: Image, islands: list[Island]) -> NDArray[np.float64]:
    """What tells a target from clutter, (N, len(FEATURES)).

    Of each island, its rim, the ring round it, the image's other islands, and the whole image.
    """
    gradient_x = float32(cv2.Sobel(image_HW, cv2.CV_32F, 1, 0, scale=0.125))
    gradient_y = float32(cv2.Sobel(image_HW, cv2.CV_32F, 0, 1, scale=0.125))
    rms_contrast = float(np.sqrt(np.mean(contrast_HW**2)))
    rms_gradient = float(np.sqrt(np.mean(gradient_x**2 + gradient_y**2)))
    places = np.array([np.add(island.corner, island.peak) for island in islands]).reshape(-1, 2)
    prominence = np.array([island.prominence for island in islands])
    rows = []
    for number, island in enumerate(islands):
        (x, y), (height, width) = island.corner, island.window_HW.shape
        here = (slice(y, y + height), slice(x, x + width))
        others = np.delete(prominence, number)
        near = np.hypot(*(places - places[number]).T) < NEAR_PX
        near[number] = False
        levels = [
            island.prominence,
            *_surroundings(island),
            _ranked(others, 2),
            _ranked(others, 5),
            _ranked(others, 8),
            _ranked(prominence[near], 3),
            rms_contrast,
            rms_gradient,
        ]
        shape = _shape(island, gradient_x[here], gradient_y[here])
        rows.append([*np.log(np.maximum(levels, 0.0) + OFFSET), *shape])
    return np.array(rows).reshape(-1, len(FEATURES))


def _ranked(values: NDArray[np.float64], rank: int) -> float:
    """The rank-th greatest, counted from 1; 0 if there are fewer."""
    return float(np.partition(values, -rank)[-rank]) if len(values) >= rank else 0.0


def _surroundings(island: Island) -> tuple[float, float, float, float, float]:
    """Five levels that tell how the island lies in its neighbourhood.

    Its peak above the ring's nine highest pixels and above the rim; its directional contrast; its
    peak above the mean of the ring; the deviation within the ring. The rim lies 2 px outside the
    half-height contour, the ring 3…8 px.
    """
    half = island.half()[0].astype(np.uint8)
    window = island.window_HW
    peak = island.base + island.prominence
    near = cv2.dilate(half, np.ones((3, 3), np.uint8))
    rim = window[cv2.dilate(half, np.ones((5, 5), np.uint8)) > near]
    inner = cv2.dilate(half, np.ones((5, 5), np.uint8))
    ring = window[cv2.dilate(half, np.ones((17, 17), np.uint8)) > inner]
    return (
        peak - float(np.sort(ring)[-9:].mean()),
        peak - float(rim.max()),
        island.contrast,
        peak - float(ring.mean()),
        float(ring.std()),
    )


def _shape(island: Island, gradient_x: Image, gradient_y: Image) -> tuple[float, ...]:
    """Log area, log elongation, log fill of an ellipse; then how much of the gradient, on and just
    round the island, points to its middle: over all, and in the second worst of eight directions.
    """  # noqa: D205
    half, area = island.half()
    y, x = np.nonzero(half)
    moments = np.cov(np.stack([x, y]), bias=True) + np.eye(2) / 12.0
    small, large = np.linalg.eigvalsh(moments)
    fill = area / (4.0 * np.pi * np.sqrt(small * large))
    zone_y, zone_x = np.nonzero(cv2.dilate(half.astype(np.uint8), np.ones((3, 3), np.uint8)))
    to_x, to_y = x.mean() - zone_x, y.mean() - zone_y
    far = np.hypot(to_x, to_y) > SMOOTH_PX
    to_x, to_y, zone = to_x[far], to_y[far], (zone_y[far], zone_x[far])
    inward = (to_x * gradient_x[zone] + to_y * gradient_y[zone]) / np.hypot(to_x, to_y)
    slope = np.hypot(gradient_x[zone], gradient_y[zone]) + 1e-3
    sector = ((np.arctan2(to_y, to_x) + np.pi) * (4.0 / np.pi)).astype(np.int64) % 8
    by_sector = np.bincount(sector, inward, 8) / np.maximum(np.bincount(sector, slope, 8), 1e-6)
    return (
        float(np.log(area)),
        0.5 * float(np.log(large / small)),
        float(np.log(fill)),
        float(inward.sum() / slope.sum()),
        float(np.partition(by_sector, 1)[1]),
    )
