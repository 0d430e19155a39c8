# mypy: allow-untyped-defs, allow-untyped-calls
# ruff: noqa: ANN001, ANN202
"""Windows cut out of a frame, compiled: one round each group of blobs, and what is seen in it."""

import math

import numpy as np

from pipeline.messages import Blobs, Flag, FrameInfo, Patches
from pipeline.physics.compiled import compiled, read_only
from pipeline.physics.groups import SIZE_PX
from pipeline.physics.noise import ROUNDING_VARIANCE
from pipeline.physics.plane_fit import fit_plane
from pipeline.physics.sensor import Sensor

REACH = SIZE_PX // 2
WITHOUT_WINDOW = int(Flag.EXTENDED | Flag.OVERFLOW)
EDGE, MERGED, SATURATED = int(Flag.EDGE), int(Flag.MERGED), int(Flag.SATURATED)
BAD_PIXEL, CLUTTER = int(Flag.BAD_PIXEL), int(Flag.CLUTTER)


def cut_windows(blobs: Blobs, sensor: Sensor, max_clutter: float) -> Patches:
    """Blobs of one window become one group, and each group without clutter has a patch.

    A window is centred on its first blob's pixel, and moved as little as keeps it in its tile, or
    else the frame; there must be room for it. max_clutter: rms about the background plane over the
    sensor's noise, at most.
    """
    height, width = blobs.pixels_HW.shape
    tiling = blobs.info.tiling
    room = (0, width, height) if tiling is None else (tiling.pitch_px, *[tiling.size_px] * 2)
    camera = float(sensor.full_scale), sensor.read_noise**2 + ROUNDING_VARIANCE, sensor.gain
    fields = _cut_all(
        read_only(blobs.pixels_HW),
        read_only(blobs.usable_HW),
        read_only(blobs.xy_px),
        read_only(blobs.bbox_px),
        read_only(blobs.snr),
        read_only(blobs.flags),
        room,
        camera,
        max_clutter,
    )
    return Patches(blobs.info, *fields)


def compile_windows() -> None:
    """Have this compiled, or read from its cache, now instead of with the first frame."""
    for dtype in (np.uint8, np.uint16, np.float32):
        image = np.zeros((SIZE_PX, SIZE_PX), dtype)
        nothing = np.zeros(0)
        blobs = Blobs(
            info=FrameInfo(0, "", 0, "", image.shape),
            pixels_HW=image,
            usable_HW=np.ones(image.shape, np.bool_),
            xy_px=np.zeros((0, 2)),
            bbox_px=np.zeros((0, 4), np.int32),
            snr=nothing.astype(np.float32),
            flags=nothing.astype(np.uint16),
        )
        cut_windows(blobs, Sensor(), 1.0)


@compiled
def _cut_all(pixels, usable, xy_px, bbox_px, snr, flags, room, camera, max_clutter):
    """All fields of `Patches` but the first."""
    blobs = len(flags)
    bbox_px, snr, flags = bbox_px.copy(), snr.copy(), flags.copy()
    group, origin = np.empty(blobs, np.int32), np.empty((blobs, 2), np.int32)
    centre = np.empty((blobs, 2))
    groups, windows = _join(xy_px, room, bbox_px, snr, flags, group, origin, centre)
    shape = windows, SIZE_PX, SIZE_PX
    counts, background = np.empty(shape, np.float32), np.empty(shape, np.float32)
    good = np.empty(shape, np.bool_)
    weight, plane = np.empty(shape[1:], np.bool_), np.empty(shape[1:])
    patches = 0
    for b in range(windows):
        here = counts[patches], good[patches]
        _cut(pixels, usable, origin[b], *here)
        seen = _examine(*here, centre[b], camera, max_clutter, weight, plane, background[patches])
        flags[group[b]] |= seen
        if seen & CLUTTER == 0:
            group[patches] = group[b]
            origin[patches, 0], origin[patches, 1] = origin[b, 0], origin[b, 1]
            patches += 1
    return (
        counts[:patches], background[:patches], good[:patches], origin[:patches], group[:patches],
        bbox_px[:groups], snr[:groups], flags[:groups],
    )  # fmt: skip


@compiled
def _join(xy_px, room, bbox_px, snr, flags, group, origin, centre):
    """Make groups of blobs; → numbers of groups and of windows.

    bbox_px, snr and flags are the blobs' and become the groups'. Filled for each window, in the
    order of the groups: its group, its origin, and where in it its first blob is.
    """
    groups, windows = 0, 0
    for n in range(len(flags)):
        flag = flags[n]
        if flag & WITHOUT_WINDOW == 0:
            x, moved_x = _begin(xy_px[n, 0], room[0], room[1])
            y, moved_y = _begin(xy_px[n, 1], room[0], room[2])
            if moved_x or moved_y:
                flag |= EDGE
            same = _find(origin[:windows], x, y)
            if same < windows:
                g = group[same]
                for k in range(2):
                    bbox_px[g, k] = min(bbox_px[g, k], bbox_px[n, k])
                    bbox_px[g, 2 + k] = max(bbox_px[g, 2 + k], bbox_px[n, 2 + k])
                snr[g] = max(snr[g], snr[n])
                flags[g] |= flag | MERGED
                continue
            group[windows] = groups
            origin[windows, 0], origin[windows, 1] = x, y
            centre[windows, 0], centre[windows, 1] = xy_px[n, 0] - x, xy_px[n, 1] - y
            windows += 1
        for k in range(4):
            bbox_px[groups, k] = bbox_px[n, k]
        snr[groups], flags[groups] = snr[n], flag
        groups += 1
    return groups, windows


@compiled
def _begin(centre_px, pitch, size):
    """Where a window begins along an axis, and whether it was moved; pitch 0: no tiles."""
    wanted = int(np.rint(centre_px)) - REACH
    low = (wanted + REACH) // pitch * pitch if pitch else 0
    begin = min(max(wanted, low), low + size - SIZE_PX)
    return begin, begin != wanted


@compiled
def _find(origin, x, y):
    """Number of the window (B, 2) that begins there, B if none does."""
    for b in range(len(origin)):
        if origin[b, 0] == x and origin[b, 1] == y:
            return b
    return len(origin)


@compiled
def _cut(pixels, usable, begin, counts, good):
    """Fill a window's counts (H, W), zero where they say nothing, and which of them are good."""
    height, width = pixels.shape
    if not (0 <= begin[0] <= width - SIZE_PX and 0 <= begin[1] <= height - SIZE_PX):
        raise IndexError("crop: a blob is outside of the frame")
    for i in range(SIZE_PX):
        for j in range(SIZE_PX):
            y, x = begin[1] + i, begin[0] + j
            good[i, j] = usable[y, x]
            counts[i, j] = pixels[y, x] if good[i, j] else 0


@compiled
def _examine(counts, good, centre, camera, max_clutter, weight, plane, background):
    """Fill a window's background (H, W), and counts that are not good with it; → its flags."""
    full_scale, variance, gain = camera
    rms = fit_plane(counts, centre[0], centre[1], good, weight, plane)
    seen, total = 0, 0.0
    for i in range(SIZE_PX):
        for j in range(SIZE_PX):
            background[i, j] = plane[i, j]
            total += background[i, j]
            if not good[i, j]:
                counts[i, j] = background[i, j]
                seen |= BAD_PIXEL
            elif counts[i, j] >= full_scale:
                seen |= SATURATED
    level = max(total / SIZE_PX**2, 0.0)
    if rms > max_clutter * math.sqrt(variance + level / gain):
        seen |= CLUTTER
    return seen
