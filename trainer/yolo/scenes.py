"""Frames of point targets over clutter, every object in them with its box and its class.

counts = measure(background + extended objects + structured clutter + Σ targets). Backgrounds are
those of `trainer.clutter`, in counts of the `field` sensor: one grey level is 0.5…12 counts. What a
detector of points may take for one is in them and has its box: bars, corners, specks, hot pixels,
and those peaks of the background itself that a matched filter shows above CLUTTER_SIGMAS.

A target is at least `snr` times the noise and 2.5 to 6 times what is restless round it, since what
cannot be told from its surroundings is no example of anything.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from pipeline.physics.arrays import NumpyRandom
from pipeline.physics.groups import MAX_TARGETS, PROFILES, draw_arrangements
from pipeline.physics.measurement import measure
from pipeline.physics.noise import variance
from pipeline.physics.psf import render
from pipeline.physics.sensor import Sensor
from trainer.clutter import KINDS

CLASSES = ("point", "group", "extended", "clutter")
POINT, GROUP, EXTENDED, CLUTTER = range(4)
MARGIN_PX = 4.0
"""From the outermost targets of a group to the sides of its box."""
APART_PX = 16.0
EDGE_PX = 7.0
CLUTTER_SIGMAS = 7.0
MAX_PEAKS = 24
PER_MPX = {"point": 130.0, "group": 70.0, "extended": 45.0, "clutter": 130.0}
"""Mean number of objects put into a million pixels."""

Image = NDArray[np.float64]


@dataclass(frozen=True)
class SceneDraw:
    """Of what frames are drawn, for which sensor. snr: of the dimmest and brightest target."""

    height: int = 128
    width: int = 160
    kinds: tuple[str, ...] = tuple(KINDS)
    snr: tuple[float, float] = (5.0, 40.0)
    sensor: Sensor = field(default_factory=lambda: PROFILES["field"].sensor)


class LabelledFrame(NamedTuple):
    """A frame, its objects and its targets. Pixel centres are integers."""

    pixels_HW: NDArray[np.uint16]
    box_px: NDArray[np.float32]  # (K, 4) x0, y0, x1, y1
    label: NDArray[np.int64]  # (K,) row of CLASSES
    xy_px: NDArray[np.float64]  # (M, 2) of the targets
    intensity: NDArray[np.float64]  # (M,) counts
    noise: float  # of a pixel, counts


def draw_frame(draw: SceneDraw, rng: np.random.Generator) -> LabelledFrame:
    """One frame; every frame has a background of its own."""
    return _Canvas(draw, rng).finished()


def draw_frames(draw: SceneDraw, count: int, seed: int) -> list[LabelledFrame]:
    """So many, each from a stream of random numbers of its own."""
    return [draw_frame(draw, np.random.default_rng([seed, number])) for number in range(count)]


class _Canvas:
    """A frame while it is drawn."""

    def __init__(self, draw: SceneDraw, rng: np.random.Generator) -> None:
        self._draw, self._rng = draw, rng
        kind = draw.kinds[rng.integers(len(draw.kinds))]
        grey = KINDS[kind](rng, draw.height, draw.width)
        contrast = float(np.exp(rng.uniform(np.log(0.5), np.log(12.0))))
        level = rng.uniform(600.0, 3000.0)
        self._counts: Image = np.maximum(level + contrast * (grey - np.median(grey)), 20.0)
        self._noise = float(np.sqrt(variance(np.asarray(level), draw.sensor)))
        self._sigma_px = draw.sensor.sigma_px * rng.uniform(0.9, 1.1)
        self._boxes: list[Sequence[float]] = []
        self._labels: list[int] = []
        self._taken: list[tuple[float, float]] = []
        self._targets: list[tuple[float, float, float]] = []

    def finished(self) -> LabelledFrame:
        """All of it: first what is extended, since a target is measured against what is there."""
        for _ in range(self._number("extended")):
            self._add_extended()
        for _ in range(self._number("clutter")):
            self._add_clutter()
        self._label_peaks()
        for _ in range(self._number("point")):
            self._add_targets(1)
        for _ in range(self._number("group")):
            self._add_targets(int(self._rng.integers(2, MAX_TARGETS + 1)))
        generator = NumpyRandom([int(self._rng.integers(1 << 31))])
        counts = measure(self._counts, self._draw.sensor, generator)
        targets = np.array(self._targets).reshape(-1, 3)
        return LabelledFrame(
            np.asarray(counts).astype(np.uint16),
            np.array(self._boxes, np.float32).reshape(-1, 4),
            np.array(self._labels, np.int64),
            targets[:, :2],
            targets[:, 2],
            self._noise,
        )

    def _number(self, what: str) -> int:
        return int(self._rng.poisson(PER_MPX[what] * self._counts.size / 1e6))

    def _place(self) -> tuple[float, float] | None:
        """Somewhere with room; None where there is none."""
        for _ in range(20):
            x = self._rng.uniform(EDGE_PX, self._draw.width - 1 - EDGE_PX)
            y = self._rng.uniform(EDGE_PX, self._draw.height - 1 - EDGE_PX)
            if all(np.hypot(x - u, y - v) >= APART_PX for u, v in self._taken):
                self._taken.append((x, y))
                return x, y
        return None

    def _restless(self, x: float, y: float) -> float:
        """Deviation of the counts round a place from their local mean, noise included."""
        row, column = round(y), round(x)
        near = self._counts[max(0, row - 10) : row + 11, max(0, column - 10) : column + 11]
        return max(float((near - _blurred(near, 2.0)).std()), self._noise)

    def _keep(self, box: Sequence[float], label: int) -> None:
        high = (self._draw.width - 0.5, self._draw.height - 0.5) * 2
        self._boxes.append([min(max(side, -0.5), end) for side, end in zip(box, high, strict=True)])
        self._labels.append(label)

    def _add_targets(self, number: int) -> None:
        if (place := self._place()) is None:
            return
        profile, sensor = PROFILES["field"], self._draw.sensor
        offsets = np.zeros((1, 2))
        if number > 1:
            half, apart = profile.half_width_px, profile.separation_px
            drawn = NumpyRandom([int(self._rng.integers(1 << 31))])
            offsets = np.asarray(draw_arrangements(1, number, half, apart, drawn)[0])
        xy_px = np.asarray(place) + offsets
        low, high = np.log(self._draw.snr)
        peak = np.exp(self._rng.uniform(low, high, number)) * self._noise
        peak = np.maximum(peak, self._rng.uniform(2.5, 6.0, number) * self._restless(*place))
        share = np.asarray(render(np.zeros((1, 1, 2)), np.ones((1, 1)), (1, 1), sensor.sigma_px))
        intensity = np.minimum(peak / share.item(), 3.0 * sensor.full_scale)
        reach = 6
        corner = np.rint(place).astype(int) - reach
        size = (2 * reach + 1, 2 * reach + 1)
        local = (xy_px - corner)[None]
        window = np.asarray(render(local, intensity[None], size, self._sigma_px))[0]
        _add(self._counts, window, corner)
        self._targets += [(x, y, i) for (x, y), i in zip(xy_px, intensity, strict=True)]
        low_px, high_px = xy_px.min(axis=0) - MARGIN_PX, xy_px.max(axis=0) + MARGIN_PX
        self._keep([*low_px, *high_px], POINT if number == 1 else GROUP)

    def _add_extended(self) -> None:
        """A blurred ellipse, or a body with wings, several times as wide as a point source."""
        if (place := self._place()) is None:
            return
        rng = self._rng
        size = int(rng.integers(25, 61))
        shape = np.zeros((size, size))
        middle = (size / 2.0, size / 2.0)
        long = float(np.exp(rng.uniform(np.log(4.0), np.log(size / 3.0))))
        short, angle = long * rng.uniform(0.3, 1.0), rng.uniform(0.0, 180.0)
        ellipse = (middle, (2.0 * long, 2.0 * short), angle)
        cv2.ellipse(shape, ellipse, 1.0, -1)
        if rng.random() < 0.5:
            wing = (middle, (2.0 * long * rng.uniform(0.6, 1.0), 2.0), angle + rng.uniform(60, 120))
            cv2.ellipse(shape, wing, 1.0, -1)
        shape = _blurred(shape, rng.uniform(0.6, 0.25 * long + 0.7))
        amplitude = self._amplitude(place, 4.0, 25.0)
        self._put(shape, place, amplitude, EXTENDED)

    def _add_clutter(self) -> None:
        """A bar, a corner, a speck of random pixels, or one hot pixel the PSF has not blurred."""
        if (place := self._place()) is None:
            return
        rng = self._rng
        shape = np.zeros((21, 21))
        kind = rng.integers(4)
        if kind == 3:
            shape[10, 10] = 1.0
        elif kind == 2:
            spots = rng.integers(7, 14, (int(rng.integers(4, 12)), 2))
            shape[spots[:, 0], spots[:, 1]] = rng.uniform(0.4, 1.0, len(spots))
        else:
            angles = rng.uniform(0, 2 * np.pi) + np.array([0.0, np.pi if kind else np.pi / 2])
            for angle in angles:
                tip = 10 + rng.uniform(3, 9) * np.array([np.cos(angle), np.sin(angle)])
                end = (round(float(tip[0])), round(float(tip[1])))
                cv2.line(shape, (10, 10), end, 1.0, int(rng.integers(1, 3)))
        if kind != 3:
            shape = _blurred(shape, self._sigma_px)
        self._put(shape, place, self._amplitude(place, 6.0, 30.0), CLUTTER)

    def _amplitude(self, place: tuple[float, float], low: float, high: float) -> float:
        share = float(np.exp(self._rng.uniform(np.log(low), np.log(high))))
        return max(share * self._noise, self._rng.uniform(2.5, 6.0) * self._restless(*place))

    def _put(self, shape: Image, place: tuple[float, float], amplitude: float, label: int) -> None:
        corner = np.rint(place).astype(int) - shape.shape[0] // 2
        _add(self._counts, amplitude * shape / shape.max(), corner)
        y, x = np.nonzero(shape > 0.2 * shape.max())
        low = corner + np.array([x.min(), y.min()])
        high = corner + np.array([x.max(), y.max()])
        half = np.maximum((high - low) / 2.0 + 1.5, MARGIN_PX)
        middle = (low + high) / 2.0
        self._keep([*(middle - half), *(middle + half)], label)

    def _label_peaks(self) -> None:
        """What of the background stands out like a point: its box, unless something is there."""
        peaks = point_like(self._counts, self._noise, self._draw.sensor.sigma_px, CLUTTER_SIGMAS)
        for x, y in peaks[:MAX_PEAKS].tolist():
            if all(max(abs(x - u), abs(y - v)) > 10 for u, v in self._taken):
                self._taken.append((x, y))
                self._keep([x - MARGIN_PX, y - MARGIN_PX, x + MARGIN_PX, y + MARGIN_PX], CLUTTER)


def _blurred(image: Image, sigma_px: float) -> Image:
    return np.asarray(cv2.GaussianBlur(image, (0, 0), sigma_px), np.float64)


def point_like(counts: Image, noise: float, sigma_px: float, sigmas: float) -> NDArray[np.int64]:
    """Local maxima (N, 2) x, y of a matched filter that exceed so many sigmas, strongest first.

    noise: of a pixel, counts.
    """
    filtered = _blurred(counts, 1.1 * sigma_px) - cv2.blur(counts, (9, 9))
    above = filtered / (0.5 * noise)  # of the filter's noise, roughly
    peak = (above >= cv2.dilate(above, np.ones((9, 9)))) & (above > sigmas)
    rows, columns = np.nonzero(peak)
    order = np.argsort(-above[rows, columns], kind="stable")
    return np.stack([columns, rows], axis=1)[order]


def _add(counts: Image, window: Image, corner: NDArray[np.int64]) -> None:
    """Add a window in place, cut by the frame."""
    (left, top), (height, width) = corner.tolist(), window.shape
    x, y = max(left, 0), max(top, 0)
    right, bottom = min(left + width, counts.shape[1]), min(top + height, counts.shape[0])
    if right > x and bottom > y:
        counts[y:bottom, x:right] += window[y - top : bottom - top, x - left : right - left]
