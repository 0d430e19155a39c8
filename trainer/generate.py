"""Datasets of patches and recordings of scenes, drawn from a seed; needs no torch."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from pipeline.formats.csist import write_csist
from pipeline.formats.recording import RecordingWriter
from pipeline.physics.groups import PROFILES
from pipeline.physics.scene import Scene, SceneSettings
from trainer.clutter import KINDS
from trainer.errors import TrainerError
from trainer.yolo.scenes import SceneDraw, draw_frame

SCENE, CLUTTER = "scene", "clutter"
CLUTTER_DRAW = SceneDraw(height=256, width=320)
FRAME_INTERVAL_NS = 10_000_000
"""A scene is recorded at 100 Hz; its clock starts at 0."""


def available_profiles() -> list[str]:
    """The benchmark's profiles of patches, whole scenes, and frames of clutter."""
    return [*PROFILES, SCENE, CLUTTER]


def generate(
    profile: str,
    count: int,
    seed: int,
    out: Path,
    progress: Callable[[int], None],
    backgrounds: Sequence[str] | None = None,
) -> None:
    """Write `count` patches of a profile, or frames of a scene, to the zarr group `out`.

    progress: called with the number written. backgrounds: of clutter, by default all. Raises
    TrainerError or PipelineError.
    """
    if backgrounds is not None and profile != CLUTTER:
        raise TrainerError(f"--backgrounds: are for --profile {CLUTTER}")
    for kind in backgrounds or ():
        if kind not in KINDS:
            raise TrainerError(f"--backgrounds: no `{kind}`; use {', '.join(KINDS)}")
    if profile == SCENE:
        write_scene(out, count, seed, progress)
    elif profile == CLUTTER:
        draw = replace(CLUTTER_DRAW, kinds=tuple(backgrounds)) if backgrounds else CLUTTER_DRAW
        write_clutter(out, count, seed, progress, draw)
    elif profile in PROFILES:
        write_csist(out, PROFILES[profile], count, seed, progress)
    else:
        raise TrainerError(f"--profile: no `{profile}`; use {', '.join(available_profiles())}")


def write_scene(out: Path, frames: int, seed: int, progress: Callable[[int], None]) -> None:
    """Record a scene with its truth, and its bad pixels as `bad_pixels_path(out)`."""
    settings = SceneSettings(seed=seed)
    scene = Scene(settings)
    with RecordingWriter(out, (settings.height, settings.width), settings.sensor) as writer:
        for index in range(frames):
            frame = scene.frame(index)
            writer.append(
                frame.pixels_HW,
                index * FRAME_INTERVAL_NS,
                xy_px=frame.xy_px,
                target_id=frame.target_id,
                intensity=frame.intensity,
            )
            progress(index + 1)
        _write_mask(bad_pixels_path(out), scene.bad_pixels_HW)


def write_clutter(
    out: Path,
    frames: int,
    seed: int,
    progress: Callable[[int], None],
    draw: SceneDraw,
) -> None:
    """Record frames of point targets over clutter with their truth, no two of one scene."""
    with RecordingWriter(out, (draw.height, draw.width), draw.sensor) as writer:
        first = 0
        for index in range(frames):
            frame = draw_frame(draw, np.random.default_rng([seed, index]))
            end = first + len(frame.intensity)
            writer.append(
                frame.pixels_HW,
                index * FRAME_INTERVAL_NS,
                xy_px=frame.xy_px,
                target_id=np.arange(first, end, dtype=np.int32),
                intensity=frame.intensity.astype(np.float32),
            )
            first = end
            progress(index + 1)


def _write_mask(path: Path, mask_HW: NDArray[np.bool_]) -> None:
    try:
        path.write_bytes(cv2.imencode(".png", mask_HW.astype(np.uint8) * 255)[1].tobytes())
    except OSError as error:
        path.unlink(missing_ok=True)
        raise TrainerError(f"{path}: cannot be written ({error.strerror})") from error


def bad_pixels_path(recording: Path) -> Path:
    """Beside `NAME.zarr`: NAME.bad_pixels.png, for `sensor: {bad_pixels: …}` in a config."""
    return recording.with_suffix(".bad_pixels.png")
