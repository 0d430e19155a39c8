"""What a node does before it says ready: made-up messages, so that the first frame finds it warm.

Compiled code, engines, memory and caches are then as they will be; the first real frame of a node
that has done nothing takes a hundred times as long as its second, and a live source does not wait.
"""

import gc
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from pipeline.component import component
from pipeline.messages import Frame, FrameInfo, Patches, Trace, Unmixed
from pipeline.physics import noise
from pipeline.physics.groups import SIZE_PX
from pipeline.physics.psf import render
from pipeline.physics.sensor import Sensor
from pipeline.runtime.flow import Flow
from pipeline.runtime.topology import stage_types

ROUNDS = 5
GROUPS = 16
PITCH_PX = 2 * SIZE_PX


def rehearse(flow: Flow, stages: Sequence[str], sensor: Sensor, shape: tuple[int, int]) -> None:
    """Run a flow of these stages on messages of the kind it takes; nothing comes of them.

    What takes a kind that is not known here is not rehearsed.
    """
    taken = stage_types(component("stage", stages[0]))[0] if stages else None
    if taken in EXAMPLES:
        for number in range(ROUNDS):
            flow.process(EXAMPLES[taken](sensor, shape, number), Trace(0, {}))
    settle()


def settle() -> None:
    """What lives now lives on: the garbage collector need not look at it again in the run."""
    gc.collect()
    gc.freeze()


def example_patches(sensor: Sensor, shape: tuple[int, int], number: int) -> Patches:
    """Pairs of targets on a level sky, the first of them saturated."""
    rng = np.random.default_rng(number)
    middle = np.full((GROUPS, 2, 2), SIZE_PX // 2)
    xy_px = middle + rng.uniform(-1.0, 1.0, middle.shape)
    level = sensor.full_scale / 16.0
    intensity = np.full((GROUPS, 2), 4.0 * level)
    intensity[0, 0] = 16.0 * sensor.full_scale
    mean = level + render(xy_px, intensity, (SIZE_PX, SIZE_PX), sensor.sigma_px)
    counts = mean + rng.normal(0.0, np.sqrt(noise.variance(mean, sensor)))
    box = np.array([2, 2, SIZE_PX - 2, SIZE_PX - 2], np.int32)
    return Patches(
        info=FrameInfo(number, sensor.id, 0, "none", shape),
        counts_BHW=np.clip(np.rint(counts), 0, sensor.full_scale).astype(np.float32),
        background_BHW=np.full_like(counts, level, np.float32),
        usable_BHW=np.ones(counts.shape, np.bool_),
        origin_px=np.zeros((GROUPS, 2), np.int32),
        group=np.arange(GROUPS, dtype=np.int32),
        bbox_px=np.tile(box, (GROUPS, 1)),
        snr=np.full(GROUPS, 10.0, np.float32),
        flags=np.zeros(GROUPS, np.uint16),
    )


def example_frame(sensor: Sensor, shape: tuple[int, int], number: int) -> Frame:
    """The example's windows on a noisy sky, as many as there is room for."""
    patches, rng = example_patches(sensor, shape, number), np.random.default_rng(number)
    level = float(patches.background_BHW.flat[0])
    deviation = float(np.sqrt(noise.variance(np.asarray(level), sensor)))
    pixels_HW = rng.normal(level, deviation, shape).clip(0, sensor.full_scale)
    corners = np.mgrid[: shape[0] - SIZE_PX + 1 : PITCH_PX, : shape[1] - SIZE_PX + 1 : PITCH_PX]
    for (y, x), window in zip(corners.reshape(2, -1).T, patches.counts_BHW, strict=False):
        pixels_HW[y : y + SIZE_PX, x : x + SIZE_PX] = window
    kind = np.uint8 if sensor.full_scale <= np.iinfo(np.uint8).max else np.uint16
    return Frame(patches.info, np.rint(pixels_HW).astype(kind))


def example_unmixed(sensor: Sensor, shape: tuple[int, int], number: int) -> Unmixed:
    """Two targets in each patch, some with a covariance of their own."""
    patches, size = example_patches(sensor, shape, number), 2 * GROUPS
    unsaid = np.full((size, 4), np.nan)
    unsaid[::2] = 0.01, 0.0, 0.01, 1.0
    return Unmixed(
        patches=patches,
        patch=np.repeat(patches.group, 2),
        xy_px=SIZE_PX // 2 + np.random.default_rng(number).uniform(-1.0, 1.0, (size, 2)),
        intensity=np.full(size, sensor.full_scale / 4.0),
        refined=np.zeros(size, np.bool_),
        p_exist=np.ones(size),
        p_count=np.ones(size),
        cov_px2=unsaid[:, :3].copy(),
        intensity_sigma=unsaid[:, 3].copy(),
        joint_px2=np.zeros((GROUPS, 0, 0)),
        cell_px=0.0,
        engine="",
        source="rehearsal",
    )


EXAMPLES: dict[type[Any], Callable[[Sensor, tuple[int, int], int], Any]] = {
    Frame: example_frame,
    Patches: example_patches,
    Unmixed: example_unmixed,
}
