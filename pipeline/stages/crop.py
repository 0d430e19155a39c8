"""Blobs → patches: a window round each group that can be unmixed, and its local background."""

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from pipeline.component import Settings, Stage
from pipeline.errors import PipelineError
from pipeline.messages import Blobs, Flag, Patches, Tiling
from pipeline.physics import noise
from pipeline.physics.groups import SIZE_PX
from pipeline.physics.plane_fit import compile_planes, fit_planes
from pipeline.physics.sensor import Sensor

REACH = SIZE_PX // 2
Integers = NDArray[np.int64]


class Crop(Stage[Blobs, Patches]):
    """Windows of 11 × 11 px centred on the blobs' pixels, moved where frame or tile ends (EDGE).

    EXTENDED and OVERFLOW blobs stay as groups without a window, and so do those in CLUTTER: where
    what surrounds the blob deviates from a plane by far more than the sensor's noise, nothing
    could be told apart. Blobs of the same window become one group, MERGED. Where a pixel is not
    usable, `counts_BHW` holds the background.
    """

    class Config(Settings):
        """max_clutter: rms about the background plane over the sensor's noise, at most.

        Over clouds the scene's targets stay below 1.5; on a horizon it is 10 and more.
        """

        max_clutter: float = Field(5.0, gt=1.0)

    def __init__(self, config: Config, sensor: Sensor) -> None:
        super().__init__(config, sensor)
        compile_planes()

    def process(self, message: Blobs) -> Patches:
        """One patch for each group that has a window, groups in the order of the blobs."""
        flags = message.flags.astype(np.int64)
        windowed = flags & (Flag.EXTENDED | Flag.OVERFLOW) == 0
        wanted = np.rint(message.xy_px).astype(np.int64) - REACH
        origin = clamped(wanted, message.pixels_HW.shape, message.info.tiling)
        moved = windowed & (origin != wanted).any(axis=1)
        flags[moved] |= Flag.EDGE
        first, bbox_px, snr, flags = _by_window(message, flags, origin, windowed)

        group = np.flatnonzero(windowed[first])
        origin = origin[first][group]
        y = origin[:, 1, None] + np.arange(SIZE_PX)
        x = origin[:, 0, None] + np.arange(SIZE_PX)
        here = (y[:, :, None], x[:, None, :])
        usable_BHW = message.usable_HW[here]
        counts_BHW = np.where(usable_BHW, message.pixels_HW[here], 0).astype(np.float32)
        centre = message.xy_px[first][group] - origin
        plane_BHW, rms = fit_planes(counts_BHW, centre, usable_BHW)
        background_BHW = plane_BHW.astype(np.float32)
        saturated = (usable_BHW & (counts_BHW >= self._sensor.full_scale)).any(axis=(1, 2))
        cluttered = rms > self._config.max_clutter * self._noise(background_BHW)
        flags[group[saturated]] |= Flag.SATURATED
        flags[group[~usable_BHW.all(axis=(1, 2))]] |= Flag.BAD_PIXEL
        flags[group[cluttered]] |= Flag.CLUTTER
        calm = ~cluttered
        return Patches(
            info=message.info,
            counts_BHW=np.where(usable_BHW, counts_BHW, background_BHW)[calm],
            background_BHW=background_BHW[calm],
            usable_BHW=usable_BHW[calm],
            origin_px=origin[calm].astype(np.int32),
            group=group[calm].astype(np.int32),
            bbox_px=bbox_px,
            snr=snr,
            flags=flags.astype(np.uint16),
        )

    def _noise(self, background_BHW: NDArray[np.float32]) -> NDArray[np.float64]:
        """Deviation (B,) in counts that the sensor itself gives the background."""
        level: NDArray[np.float64] = background_BHW.mean(axis=(1, 2), dtype=np.float64)
        deviation: NDArray[np.float64] = np.sqrt(noise.variance(level, self._sensor))
        return deviation


def clamped(origin: Integers, shape: tuple[int, ...], tiling: Tiling | None) -> Integers:
    """Origins (N, 2) x, y moved as little as keeps the window in its tile, or else the frame.

    Raises PipelineError if not even one window fits in.
    """
    size = np.array(shape[::-1])
    low = np.zeros_like(origin)
    if tiling is not None:
        low = (origin + REACH) // tiling.pitch_px * tiling.pitch_px
        size = np.array([tiling.size_px, tiling.size_px])
    if size.min() < SIZE_PX:
        raise PipelineError(
            f"crop: {size[0]}×{size[1]} px is smaller than the {SIZE_PX}×{SIZE_PX} window; "
            "use larger frames or tiles"
        )
    return np.clip(origin, low, low + size - SIZE_PX)


def _by_window(
    blobs: Blobs, flags: Integers, origin: Integers, windowed: NDArray[np.bool_]
) -> tuple[Integers, NDArray[np.int32], NDArray[np.float32], Integers]:
    """First blob, box, SNR and flags of each group; blobs without a window stay by themselves."""
    number = len(origin)
    window = origin[:, 1] * blobs.pixels_HW.shape[1] + origin[:, 0]
    window = np.where(windowed, window, -1 - np.arange(number))
    if len(set(window.tolist())) == number:  # as nearly always
        return np.arange(number), blobs.bbox_px, blobs.snr, flags
    _, first, row = np.unique(window, return_index=True, return_inverse=True)
    order = np.argsort(first)
    first, row = first[order], np.argsort(order)[row]
    bbox_px, snr, joint_flags = blobs.bbox_px[first], blobs.snr[first], flags[first]
    if len(first) < number:
        np.minimum.at(bbox_px[:, :2], row, blobs.bbox_px[:, :2])
        np.maximum.at(bbox_px[:, 2:], row, blobs.bbox_px[:, 2:])
        np.maximum.at(snr, row, blobs.snr)
        np.bitwise_or.at(joint_flags, row, flags)
        joint_flags[np.bincount(row) > 1] |= Flag.MERGED
    return first, bbox_px, snr, joint_flags
