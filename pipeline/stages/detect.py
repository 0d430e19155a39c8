"""Frame → blobs: where a frame is brighter than its surroundings, the way point sources are.

1. Bad pixels take the median of their neighbours.
2. The detector, a file of `pipeline/detectors` chosen by name, makes of the frame a statistic in
   sigmas: `matched_filter` unless configured otherwise.
3. Constant false-alarm rate: a pixel is bright if its statistic exceeds k, which noise would do
   `false_alarms_per_frame` times a frame; k is at least `min_sigmas`.
4. Bright pixels that touch are a region, those above a fifth of its peak its core. A core wider
   than any group of point sources is EXTENDED. Left out are regions that do not stand out in
   every direction, pieces of an edge, and single hot pixels, narrower than any point source; these
   count as bad in what follows. If something bright is next to one, it is mended and the frame
   searched again. A detector that judges shapes itself has the last word instead.
5. Blobs that one window covers become one, MERGED.

On a mosaic every tile is searched by itself with the matched filter: its median is the background,
its lower values the noise; no blob reaches beyond its tile, and of 4 only the width is looked at.

On 640 × 512 16-bit pixels with the default detector this takes 1.0 ms of one core, three quarters
of it passes over the whole frame (docs/latency.md); searching again costs little more, as only what
is round a mended pixel changes.
"""

import math
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, ValidationError, field_validator
from scipy.special import ndtri

from pipeline.component import Context, Settings, Stage, component
from pipeline.detector import Detector, Signal
from pipeline.errors import PipelineError
from pipeline.imaging.bad_pixels import Repair, compile_repair
from pipeline.imaging.noise_blocks import WITHIN_SIGMA
from pipeline.imaging.point_filter import PointFilter
from pipeline.imaging.point_shape import Shape, ShapeTest, brightest
from pipeline.imaging.regions import (
    CORE_SHARE,
    Image,
    Regions,
    compile_regions,
    find_regions,
    merge,
)
from pipeline.imaging.sampling import Integers, as_tiles, square_ring, surroundings
from pipeline.messages import Blobs, Flag, Frame, Tiling
from pipeline.physics.groups import SIZE_PX
from pipeline.physics.sensor import Sensor

MENDINGS = 3
"""Searches more of a frame, at most: one hot pixel may hide another."""

SPIKE_FOOT = 0.02
"""More than the filter leaves of a hot pixel, relative to it, three sigma of the PSF away."""


class Found(NamedTuple):
    """What the search of one frame gives."""

    snr_HW: Image  # the detector's statistic
    points: Regions  # shaped like groups
    extended: Regions  # too wide
    hot_xy: Integers = np.empty((0, 2), np.int64)  # (N, 2) single pixels: no targets, but not good


class Detect(Stage[Frame, Blobs]):
    """Blobs of a frame, strongest first; then those left out (OVERFLOW), then EXTENDED ones.

    In a frame of more than `max_blobs` the weaker keep their row, flagged OVERFLOW, so that it is
    seen what was not looked at; they are neither merged nor unmixed. Raises PipelineError on a
    frame that is smaller than a window or not of the bad-pixel map's shape.
    """

    class Config(Settings):
        """detector: its name as `kind`, with its own settings beside it.

        group_span_px: greatest distance of a group's targets along an axis.
        """

        detector: dict[str, Any] = {"kind": "matched_filter"}  # noqa: RUF012, pydantic copies it
        false_alarms_per_frame: float = Field(0.1, gt=0.0, le=1000.0)
        min_sigmas: float = Field(4.5, ge=2.0, le=100.0)
        max_blobs: int = Field(512, ge=1, le=4096)
        group_span_px: float = Field(2.0, ge=0.0, le=SIZE_PX)

        @field_validator("detector")
        @classmethod
        def _known(cls, detector: dict[str, Any]) -> dict[str, Any]:
            _detector(detector)
            return detector

    def __init__(
        self, config: Config, sensor: Sensor, bad_pixels_HW: NDArray[np.bool_] | None = None
    ) -> None:
        self._config, self._sensor, self._bad_HW = config, sensor, bad_pixels_HW
        self._repair = None if bad_pixels_HW is None else Repair(bad_pixels_HW)
        kind, settings = _detector(config.detector)
        self._detector: Detector = kind.build(settings, sensor)
        self._filter = PointFilter(sensor)
        self._radius = radius = self._filter.radius
        self._beyond = np.concatenate([square_ring(reach) for reach in (radius, radius + 1)])
        filtered_sigma_px = math.sqrt(2.0 * sensor.sigma_px**2 + 2.0 / 12.0)
        core_px = 2.0 * filtered_sigma_px * math.sqrt(-2.0 * math.log(CORE_SHARE))
        max_width_px = math.ceil(config.group_span_px + core_px) + 1
        self._shape = ShapeTest(sensor.sigma_px, max_width_px)
        compile_repair()
        compile_regions()

    @classmethod
    def build(cls, config: Config, context: Context) -> Self:
        """Needs the sensor's imaging model and its bad-pixel map, if there is one."""
        return cls(config, context.sensor, context.bad_pixels_HW)

    def process(self, message: Frame) -> Blobs:
        """The frame's blobs: none if it is constant, or finite nowhere."""
        clean_HW, usable_HW = self._repaired(message.pixels_HW)
        tiling = message.info.tiling
        found = self._found(clean_HW, tiling)
        if len(found.hot_xy):
            usable_HW = usable_HW.copy()
            usable_HW[found.hot_xy[:, 1], found.hot_xy[:, 0]] = False
        points, flags = self._ranked(found.points, tiling)
        blobs = points.join(found.extended)
        return Blobs(
            info=message.info,
            pixels_HW=message.pixels_HW,
            usable_HW=usable_HW,
            xy_px=blobs.xy_px,
            bbox_px=blobs.bbox_px.astype(np.int32),
            snr=blobs.snr,
            flags=np.append(flags, np.full(len(found.extended.snr), Flag.EXTENDED, np.uint16)),
        )

    def search(self, pixels_HW: NDArray[Any]) -> Found:
        """What `process` makes its blobs of: the statistic and all regions, none merged."""
        clean_HW, _ = self._repaired(pixels_HW)
        return self._found(clean_HW, None)

    def _found(self, clean_HW: NDArray[Any], tiling: Tiling | None) -> Found:
        false_alarm = self._config.false_alarms_per_frame / clean_HW.size
        threshold = max(-float(ndtri(min(false_alarm, 0.5))), self._config.min_sigmas)
        if tiling is not None:
            snr_HW = self._by_tiles(clean_HW, tiling)
            regions = find_regions(snr_HW, threshold)
            wide = self._shape.is_wide(regions)
            return Found(snr_HW, regions.take(~wide), regions.take(wide))
        return self._search(clean_HW, threshold)

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
        self._check(pixels_HW.shape)
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

    def _search(self, clean_HW: NDArray[Any], threshold: float) -> Found:
        signal = self._detector.signal(clean_HW)
        if self._detector.judges_shape:
            regions = find_regions(signal.snr_HW, threshold)
            return Found(signal.snr_HW, regions, regions.take(slice(0)))
        points, extended, spikes = self._told_apart(clean_HW, signal, threshold)
        hot_xy = [spikes.peak_xy]
        for _ in range(MENDINGS):
            hiding = self._hides(signal, spikes, threshold)
            if not hiding.any():
                break
            clean_HW, xy = clean_HW.copy(), spikes.peak_xy[hiding]
            clean_HW[xy[:, 1], xy[:, 0]] = np.sort(surroundings(clean_HW, xy), axis=1)[:, 4]
            signal = self._detector.mended(signal, clean_HW, xy)
            points, extended, spikes = self._told_apart(clean_HW, signal, threshold)
            hot_xy.append(spikes.peak_xy)
        return Found(signal.snr_HW, points, extended, np.concatenate(hot_xy))

    def _hides(self, signal: Signal, spikes: Regions, threshold: float) -> NDArray[np.bool_]:
        """Hot pixels (N,) next to something bright, which can be mended."""
        beyond = brightest(signal.snr_HW, spikes.peak_xy, self._beyond)
        hiding = beyond > np.maximum(threshold, SPIKE_FOOT * spikes.snr)
        size = np.array(signal.snr_HW.shape[::-1])  # at the border the filter sees a pixel twice
        inner = (spikes.peak_xy > self._radius) & (spikes.peak_xy < size - 1 - self._radius)
        result: NDArray[np.bool_] = hiding & inner.all(axis=1)
        return result

    def _told_apart(
        self, clean_HW: NDArray[Any], signal: Signal, threshold: float
    ) -> tuple[Regions, Regions, Regions]:
        """Regions shaped like groups, those too wide, and hot pixels."""
        regions = find_regions(signal.snr_HW, threshold)
        shape = self._shape(clean_HW, signal.residual_HW, signal.sigma_HW, regions)
        points, extended, spikes = (
            regions.take(shape == one) for one in (Shape.POINTS, Shape.EXTENDED, Shape.SPIKE)
        )
        return points, extended, spikes

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
        snr_tiles[...] = filtered / np.maximum(-low, self._filter.noise_floor(background))
        return snr_HW

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


def _detector(described: dict[str, Any]) -> tuple[type[Detector], Settings]:
    """Class and settings of `{kind: NAME, …}`; raises ValueError saying what does not fit."""
    settings = dict(described)
    kind = settings.pop("kind", "matched_filter")
    try:
        found: type[Detector] = component("detector", str(kind))
        return found, found.Config.model_validate(settings)
    except ValidationError as error:
        fault = error.errors()[0]
        known = ", ".join(found.Config.model_fields) or "none"
        place = ".".join(map(str, fault["loc"]))
        raise ValueError(f"{kind}: {place}: {fault['msg']}; known there: {known}") from error
    except PipelineError as error:
        raise ValueError(str(error)) from error
