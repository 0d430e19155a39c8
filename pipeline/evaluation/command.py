"""The command `pipeline evaluate-detection`."""

import json
from pathlib import Path
from typing import Annotated, Any

import cv2
import typer

from pipeline.config import PipelineConfig, load_config
from pipeline.errors import PipelineError
from pipeline.evaluation.frames import Frames, Pictures, RecordedFrames
from pipeline.evaluation.roc_picture import draw_roc
from pipeline.evaluation.run import UNKNOWN_CAMERA, all_detectors, evaluate, roc
from pipeline.formats.writable import check_png, check_writable
from pipeline.sensing import load_bad_pixels
from pipeline.stages.detect import Detect


def evaluate_detection(
    source: Annotated[
        Path,
        typer.Argument(metavar="IMAGES_DIR|RECORDING.zarr", help="Pictures, or frames with truth."),
    ],
    masks: Annotated[
        Path | None,
        typer.Argument(metavar="MASKS_DIR", help="NAME.png or NAME_pixels0.png for each picture."),
    ] = None,
    out: Annotated[Path | None, typer.Option("--json", help="Write the figures here.")] = None,
    config: Annotated[Path | None, typer.Option("--config", help="YAML configuration.")] = None,
    roc_picture: Annotated[
        Path | None,
        typer.Option("--roc", metavar="PNG", help="Draw the ROC of all detectors; in JSON too."),
    ] = None,
) -> None:
    """Score detection: Pd, false alarms by pixel and by frame, seconds a frame.

    Without --config, pictures are searched by `local_contrast`, which knows nothing of their
    cameras, recordings by the default of `detect`.
    """
    if roc_picture is not None:
        check_png(roc_picture)
    for path in (out, roc_picture):
        if path is not None:
            check_writable(path)
    settings = load_config(config)
    chosen = _detect_settings(settings, config)
    frames: Frames
    if masks is None:
        if source.is_dir() and not (source / "zarr.json").exists():
            raise PipelineError(f"{source}: no recording; for a folder of pictures give MASKS_DIR")
        frames = RecordedFrames(source)
        bad_pixels_HW = load_bad_pixels(settings.sensor.bad_pixels, frames.shape)
    else:
        frames, bad_pixels_HW = Pictures(source, masks), None
        if config is None:
            chosen = UNKNOWN_CAMERA
    result: dict[str, Any] = evaluate(frames, chosen, bad_pixels_HW).to_json()
    result["detector"] = chosen.detector
    pd = "–" if result["pd"] is None else f"{result['pd']:.4f}"
    print(
        f"{result['frames']} frames, {result['targets']} targets, {chosen.detector['kind']}: "
        f"Pd {pd}, Fa {result['fa_pixels'] * 1e6:.2f}e-6 of pixels, "
        f"{result['false_alarms_per_frame']:.3f} false alarms and "
        f"{result['seconds_per_frame'] * 1e3:.2f} ms a frame"
    )
    if roc_picture is not None:
        configs = all_detectors(frames)
        result["roc"] = roc(frames, configs, bad_pixels_HW=bad_pixels_HW)
        _write(roc_picture, cv2.imencode(".png", draw_roc(result["roc"]))[1].tobytes())
    if out is not None:
        _write(out, (json.dumps(result, indent=1) + "\n").encode())


def _detect_settings(settings: PipelineConfig, config: Path | None) -> Detect.Config:
    found = settings.stages.get("detect")
    if not isinstance(found, Detect.Config):
        raise PipelineError(f"{config}: topology has no stage `detect`; add it to front.stages")
    return found


def _write(path: Path, content: bytes) -> None:
    try:
        path.write_bytes(content)
    except OSError as error:
        raise PipelineError(f"{path}: cannot be written ({error.strerror})") from error
    print(f"wrote {path}")
