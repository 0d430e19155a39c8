"""The commands that bring a sensor in: `convert` foreign files, `calibrate` from uniform scenes."""

import math
from pathlib import Path
from typing import Annotated

import typer

from pipeline.errors import PipelineError
from pipeline.formats.calibration import write_calibration
from pipeline.formats.recording import Recording, open_recording
from pipeline.imaging.calibration import Estimate, Level, estimate, measure

NewPath = Annotated[Path, typer.Argument(help="Zarr group to write.")]


def calibrate(
    low: Annotated[Path, typer.Argument(help="Recording of a uniform scene, the darker one.")],
    high: Annotated[Path, typer.Argument(help="Recording of a brighter uniform scene.")],
    out: NewPath,
) -> None:
    """Make a calibration from two uniform scenes, and estimate read noise and gain."""
    recordings = [open_recording(path) for path in (low, high)]
    first, second = recordings
    if first.shape != second.shape or first.sensor.full_scale != second.sensor.full_scale:
        raise PipelineError(
            f"{high}: frames are {second.shape[1]}×{second.shape[0]} up to "
            f"{second.sensor.full_scale}, those of {low} {first.shape[1]}×{first.shape[0]} up to "
            f"{first.sensor.full_scale}; record both with the same settings"
        )
    try:
        found = estimate(_measure(first), _measure(second), first.sensor)
    except PipelineError as error:
        raise PipelineError(f"{low} and {high}: {error}") from error
    write_calibration(out, found.calibration)
    print(_description(found, out))


def _measure(recording: Recording) -> Level:
    frames = (recording.frame(index) for index in range(len(recording)))
    try:
        return measure(frames, recording.sensor.full_scale)
    except ValueError as error:
        raise PipelineError(f"{recording.path}: {error}") from error


def _description(found: Estimate, out: Path) -> str:
    calibration = found.calibration
    bad, total = int(calibration.bad_HW.sum()), calibration.bad_HW.size
    good_HW = ~calibration.bad_HW
    lines = [
        f"# wrote {out}: levels {found.levels[0]:.1f} and {found.levels[1]:.1f} counts, "
        f"gain varies by {100 * calibration.gain_HW[good_HW].std():.2f} % rms",
        f"# {bad} of {total} pixels are bad: {found.unlike} unlike their neighbours, "
        f"{found.noisy} noisy, {found.saturated} saturated or zero",
    ]
    if found.pedestal:
        lines.append(
            "# the counts hold a pedestal: read_noise and gain fit between the levels only"
        )
    shot = "# no shot noise seen" if math.isinf(found.gain) else f"gain: {found.gain:.4g}"
    lines += [
        "sensor:",
        f"  calibration: {out}",
        f"  read_noise: {found.read_noise:.4g}",
        f"  {shot}",
        "topology:",
        "  front: {stages: [calibrate, detect, crop]}",
    ]
    return "\n".join(lines)
