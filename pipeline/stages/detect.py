"""Frame → blobs: where a frame is brighter than its surroundings, the way point sources are.

1. Bad pixels take the median of their neighbours.
2. Background: a 5 × 5 median of cells of 2 × 2 px (more for a wide PSF). A group covers less than
   half of the cells, so it leaves no trace there, and an edge stays an edge.
3. Matched filter: the pixel-integrated PSF over what is left, the mean of which is zero; of unit
   norm, so that white noise keeps its deviation.
4. Noise: what 68 % of the values in a block of `block_px` stay below, which targets hardly move,
   and never less than the sensor's own noise on such a background.
5. Constant false-alarm rate: a pixel is bright if it exceeds k sigma, which Gaussian noise would
   do `false_alarms_per_frame` times a frame; k is at least `min_sigmas`.
6. Bright pixels that touch are a region, those above a fifth of its peak its core. A core wider
   than any group of point sources is EXTENDED. Left out are regions that do not stand out in
   every direction, pieces of an edge, and single hot pixels, narrower than any point source. If
   something bright is next to such a pixel, it is mended and the frame searched once more.
7. Blobs that one window covers become one, MERGED.

On a mosaic the tiles take the place of the blocks and their medians that of the background; no
blob reaches beyond its tile, and of 6 only the width is looked at.

On 640 × 512 16-bit pixels the passes of OpenCV over the whole frame take 1.0 ms of one core, a
quarter of it the labelling of regions; the work on a hundred regions 0.7 ms; searching once more
adds 0.8 ms.
"""

import math
from typing import Any, NamedTuple, Self

import cv2
import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from scipy.special import ndtri

from pipeline.component import Context, Settings, Stage
from pipeline.errors import PipelineError
from pipeline.imaging.bad_pixels import Repair
from pipeline.imaging.point_shape import SpikeTest, stands_out
from pipeline.imaging.regions import CORE_SHARE, Image, Regions, find_regions, merge
from pipeline.imaging.sampling import Integers, as_tiles, square_ring, surroundings, values_at
from pipeline.messages import Blobs, Flag, Frame, Tiling
from pipeline.physics import noise
from pipeline.physics.groups import SIZE_PX
from pipeline.physics.psf import pixel_response
from pipeline.physics.sensor import Sensor

BLOCK_SAMPLES = 12
"""A block's statistics come from BLOCK_SAMPLES × BLOCK_SAMPLES of its pixels."""

SPIKE_FOOT = 0.02
"""More than the filter leaves of a hot pixel, relative to it, three sigma of the PSF away."""

WITHIN_SIGMA = 0.6827
"""Share of a Gaussian's values within one sigma."""


class Signal(NamedTuple):
    """A frame without background, (H, W) each."""

    residual_HW: Image  # counts
    snr_HW: Image  # of the matched filter
    sigma_HW: Image  # noise, counts


class Detect(Stage[Frame, Blobs]):
    """Blobs of a frame, strongest first; then those left out (OVERFLOW), then EXTENDED ones.

    In a frame of more than `max_blobs` the weaker keep their row, flagged OVERFLOW, so that it is
    seen what was not looked at; they are neither merged nor unmixed. Raises PipelineError on a
    frame that is smaller than a window or not of the bad-pixel map's shape.
    """

    class Config(Settings):
        """group_span_px: greatest distance of a group's targets along an axis."""

        false_alarms_per_frame: float = Field(0.1, gt=0.0, le=1000.0)
        min_sigmas: float = Field(4.5, ge=2.0, le=100.0)
        max_blobs: int = Field(512, ge=1, le=4096)
        group_span_px: float = Field(2.0, ge=0.0, le=SIZE_PX)
        block_px: int = Field(32, ge=BLOCK_SAMPLES, le=1024)

    def __init__(
        self, config: Config, sensor: Sensor, bad_pixels_HW: NDArray[np.bool_] | None = None
    ) -> None:
        self._config, self._sensor, self._bad_HW = config, sensor, bad_pixels_HW
        self._repair = None if bad_pixels_HW is None else Repair(bad_pixels_HW)
        self._radius = radius = math.ceil(3.0 * sensor.sigma_px)
        response = pixel_response(np.asarray(float(radius)), 2 * radius + 1, sensor.sigma_px)
        self._kernel = (response / np.linalg.norm(response)).astype(np.float32)
        self._cell_px = max(2, math.ceil(2.0 * sensor.sigma_px))
        self._is_spike = SpikeTest(sensor.sigma_px)
        self._beyond = np.concatenate([square_ring(reach) for reach in (radius, radius + 1)])
        filtered_sigma_px = math.sqrt(2.0 * sensor.sigma_px**2 + 2.0 / 12.0)
        core_px = 2.0 * filtered_sigma_px * math.sqrt(-2.0 * math.log(CORE_SHARE))
        self._max_width_px = math.ceil(config.group_span_px + core_px) + 1

    @classmethod
    def build(cls, config: Config, context: Context) -> Self:
        """Needs the sensor's imaging model and its bad-pixel map, if there is one."""
        return cls(config, context.sensor, context.bad_pixels_HW)

    def process(self, message: Frame) -> Blobs:
        """The frame's blobs: none if it is constant, or finite nowhere."""
        self._check(message.pixels_HW.shape)
        clean_HW, usable_HW = self._repaired(message.pixels_HW)
        false_alarm = self._config.false_alarms_per_frame / clean_HW.size
        threshold = max(-float(ndtri(min(false_alarm, 0.5))), self._config.min_sigmas)
        tiling = message.info.tiling
        if tiling is None:
            points, extended = self._search(clean_HW, threshold)
        else:
            regions = find_regions(self._by_tiles(clean_HW, tiling), threshold)
            wide = self._is_wide(regions)
            points, extended = regions.take(~wide), regions.take(wide)
        points, flags = self._ranked(points, tiling)
        blobs = points.join(extended)
        return Blobs(
            info=message.info,
            pixels_HW=message.pixels_HW,
            usable_HW=usable_HW,
            xy_px=blobs.xy_px,
            bbox_px=blobs.bbox_px.astype(np.int32),
            snr=blobs.snr,
            flags=np.append(flags, np.full(len(extended.snr), Flag.EXTENDED, np.uint16)),
        )

    def _check(self, shape: tuple[int, ...]) -> None:
        size = "×".join(str(length) for length in shape[::-1])
        if min(shape) < SIZE_PX:
            raise PipelineError(
                f"detect: frame of {size} px is smaller than the {SIZE_PX}×{SIZE_PX} window; "
                "use larger frames"
            )
        if self._bad_HW is not None and self._bad_HW.shape != shape:
            height, width = self._bad_HW.shape
            raise PipelineError(
                f"detect: bad-pixel map is {width}×{height}, the frame {size}; "
                "give sensor.bad_pixels the frame's shape"
            )

    def _repaired(self, pixels_HW: NDArray[Any]) -> tuple[NDArray[Any], NDArray[np.bool_]]:
        """The frame without bad or non-finite pixels, and the mask of the good ones.

        8- and 16-bit unsigned counts stay what they are, all else becomes float32.
        """
        repair = self._repair
        if pixels_HW.dtype not in (np.uint8, np.uint16):
            with np.errstate(over="ignore"):
                pixels_HW = pixels_HW.astype(np.float32)
            lost_HW = ~np.isfinite(pixels_HW)
            if lost_HW.any():
                repair = Repair(lost_HW if self._bad_HW is None else lost_HW | self._bad_HW)
        if repair is None:
            return pixels_HW, np.ones(pixels_HW.shape, np.bool_)
        return repair(pixels_HW), repair.usable_HW

    def _search(self, clean_HW: NDArray[Any], threshold: float) -> tuple[Regions, Regions]:
        """Regions shaped like groups, and those too wide."""
        background = self._background(clean_HW)
        smooth_HW = cv2.resize(background, clean_HW.shape[::-1])
        residual_HW = _float32(cv2.subtract(clean_HW, smooth_HW, dtype=cv2.CV_32F))
        signal = self._by_blocks(residual_HW, background)
        points, extended, spikes = self._told_apart(clean_HW, signal, threshold)
        beyond = values_at(signal.snr_HW, spikes.peak_xy[:, None, :] + self._beyond).max(axis=1)
        hiding = beyond > np.maximum(threshold, SPIKE_FOOT * spikes.snr)
        size = np.array(clean_HW.shape[::-1])  # at the border the filter sees a pixel twice
        inner = (spikes.peak_xy > self._radius) & (spikes.peak_xy < size - 1 - self._radius)
        hiding &= inner.all(axis=1)
        if hiding.any():
            clean_HW = clean_HW.copy()
            self._mend(spikes.peak_xy[hiding], clean_HW, signal)
            points, extended, _ = self._told_apart(clean_HW, signal, threshold)
        return points, extended

    def _told_apart(
        self, clean_HW: NDArray[Any], signal: Signal, threshold: float
    ) -> tuple[Regions, Regions, Regions]:
        """Regions shaped like groups, those too wide, and hot pixels."""
        regions = find_regions(signal.snr_HW, threshold)
        wide = self._is_wide(regions)
        points = regions.take(~wide)
        points = points.take(stands_out(clean_HW, points.peak_xy, self._max_width_px // 2 + 1))
        sigma = values_at(signal.sigma_HW, points.peak_xy)
        spike = self._is_spike(signal.residual_HW, points.peak_xy, sigma)
        return points.take(~spike), regions.take(wide), points.take(spike)

    def _mend(self, xy: Integers, clean_HW: NDArray[Any], signal: Signal) -> None:
        """Replace hot pixels by the median round them, in place, and filter anew there."""
        change = -values_at(signal.residual_HW, xy)
        for image_HW in (clean_HW, signal.residual_HW):
            image_HW[xy[:, 1], xy[:, 0]] = np.sort(surroundings(image_HW, xy), axis=1)[:, 4]
        change += values_at(signal.residual_HW, xy)
        response = np.outer(self._kernel, self._kernel)
        for (x, y), step in zip((xy - self._radius).tolist(), change.tolist(), strict=True):
            here = (slice(y, y + len(response)), slice(x, x + len(response)))
            signal.snr_HW[here] += step * response / signal.sigma_HW[here]

    def _background(self, clean_HW: NDArray[Any]) -> Image:
        """Median background of cells, (H, W) over the cell size."""
        height, width = clean_HW.shape
        cells = (max(width // self._cell_px, 1), max(height // self._cell_px, 1))
        means = cv2.resize(clean_HW, cells, interpolation=cv2.INTER_AREA)
        return _float32(cv2.medianBlur(means, 5))

    def _filter(self, residual_HW: Image) -> Image:
        return _float32(cv2.sepFilter2D(residual_HW, cv2.CV_32F, self._kernel, self._kernel))

    def _noise_floor(self, background: NDArray[Any]) -> Image:
        return _float32(np.sqrt(noise.variance(background, self._sensor)))

    def _by_blocks(self, residual_HW: Image, background: Image) -> Signal:
        """What is left of the frame, filtered and compared with the noise of its block."""
        filtered_HW = self._filter(residual_HW)
        height, width = filtered_HW.shape
        rows = max(round(height / self._config.block_px), 1)
        columns = max(round(width / self._config.block_px), 1)
        grid = (columns * BLOCK_SAMPLES, rows * BLOCK_SAMPLES)
        samples = cv2.resize(filtered_HW, grid, interpolation=cv2.INTER_NEAREST)
        samples = samples.reshape(rows, BLOCK_SAMPLES, columns, BLOCK_SAMPLES).swapaxes(1, 2)
        ordered = np.sort(np.abs(samples.reshape(rows, columns, -1)), axis=-1)
        spread = ordered[..., round(WITHIN_SIGMA * BLOCK_SAMPLES**2)]
        mean = cv2.resize(background, (columns, rows), interpolation=cv2.INTER_AREA)
        # Few samples may by chance say too little: a block is no quieter than those around it.
        sigma = np.maximum(np.maximum(spread, cv2.blur(spread, (3, 3))), self._noise_floor(mean))
        sigma_HW = _float32(cv2.resize(sigma, (width, height)))
        return Signal(residual_HW, filtered_HW / sigma_HW, sigma_HW)

    def _by_tiles(self, clean_HW: NDArray[Any], tiling: Tiling) -> Image:
        """SNR of every pixel of a complete tile, 0 between them."""
        size_px, pitch_px = tiling.size_px, tiling.pitch_px
        tiles = as_tiles(clean_HW.astype(np.float32), size_px, pitch_px)
        background = np.median(tiles, axis=(1, 3), keepdims=True)
        flat_HW = np.zeros(clean_HW.shape, np.float32)
        as_tiles(flat_HW, size_px, pitch_px)[...] = tiles - background
        filtered = as_tiles(self._filter(flat_HW), size_px, pitch_px)
        # From the lower values, since a group may cover a third of its tile.
        low = np.quantile(filtered, 0.5 - 0.5 * WITHIN_SIGMA, axis=(1, 3), keepdims=True)
        snr_HW = np.zeros_like(flat_HW)
        snr_tiles = as_tiles(snr_HW, size_px, pitch_px)
        snr_tiles[...] = filtered / np.maximum(-low, self._noise_floor(background))
        return snr_HW

    def _is_wide(self, regions: Regions) -> NDArray[np.bool_]:
        width_px = regions.bbox_px[:, 2:] - regions.bbox_px[:, :2]
        result: NDArray[np.bool_] = np.any(width_px > self._max_width_px, axis=1)
        return result

    def _ranked(
        self, regions: Regions, tiling: Tiling | None
    ) -> tuple[Regions, NDArray[np.uint16]]:
        """Regions that can be groups, strongest first and merged, and their flags."""
        regions = regions.take(np.argsort(-regions.snr, kind="stable"))
        kept, left_out = (
            regions.take(rows)
            for rows in (slice(self._config.max_blobs), slice(self._config.max_blobs, None))
        )
        merged, members = merge(kept, 0 if tiling is None else tiling.pitch_px)
        flags = np.full(len(members) + len(left_out.snr), Flag.OVERFLOW, np.uint16)
        flags[: len(members)] = np.where(members > 1, Flag.MERGED, 0)
        return merged.join(left_out), flags


def _float32(image: NDArray[Any]) -> Image:
    """For OpenCV's results, the type of which only it knows; copies nothing that is float32."""
    return np.asarray(image, dtype=np.float32)
