"""The commands that bring a sensor in: `convert` foreign files, `calibrate` from uniform scenes."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from pipeline.component import configured_sensor
from pipeline.config import load_config
from pipeline.errors import PipelineError
from pipeline.formats.calibration import write_calibration
from pipeline.formats.foreign import open_footage
from pipeline.formats.foreign.footage import Footage, utc_ns
from pipeline.formats.recording import Recording, RecordingWriter, open_recording
from pipeline.imaging.calibration import Estimate, Level, estimate, measure
from pipeline.physics.sensor import Sensor

NewPath = Annotated[Path, typer.Argument(help="Zarr group to write.")]


def convert(
    path: Annotated[
        Path,
        typer.Argument(
            metavar="IN", help="PNG, TIFF, NPY, FITS, SER or ENVI file, or a folder of them."
        ),
    ],
    out: NewPath,
    config: Annotated[
        Path | None, typer.Option("--config", help="Take the sensor from this configuration.")
    ] = None,
    sensor_id: Annotated[str | None, typer.Option(help="Name of the sensor.")] = None,
    sigma_px: Annotated[float | None, typer.Option(help="Sigma of the PSF, px.")] = None,
    full_scale: Annotated[int | None, typer.Option(help="Count at which it saturates.")] = None,
    read_noise: Annotated[float | None, typer.Option(help="Counts rms.")] = None,
    gain: Annotated[float | None, typer.Option(help="Electrons per count.")] = None,
    ifov_rad: Annotated[float | None, typer.Option(help="Angle of a pixel, radians.")] = None,
    rate_hz: Annotated[
        float | None, typer.Option(help="Frames a second, instead of the file's timestamps.")
    ] = None,
    start: Annotated[
        str | None, typer.Option(help="UTC of the first frame, with --rate-hz: an ISO date.")
    ] = None,
) -> None:
    """Convert image files into a recording, count by count; all of it or nothing."""
    footage = open_footage(path)
    given = {
        "id": sensor_id,
        "sigma_px": sigma_px,
        "full_scale": full_scale,
        "read_noise": read_noise,
        "gain": gain,
        "ifov_rad": ifov_rad,
    }
    known = load_config(config).sensor.overrides() if config else {}
    known |= {name: value for name, value in given.items() if value is not None}
    own = Sensor(full_scale=footage.full_scale)
    sensor = configured_sensor(own, known, "convert")
    timestamp_ns = _timestamps(footage, path, rate_hz, start)
    with RecordingWriter(out, footage.shape, sensor) as writer:
        for index in range(footage.length):
            try:
                writer.append(footage.read(index), timestamp_ns[index])
            except ValueError as error:
                raise PipelineError(f"{footage.name(index)}: {error}") from error
    height, width = footage.shape
    print(f"wrote {out}: {footage.length} frames of {width}×{height}, {sensor}")
    missing = [name for name in ("sigma_px", "read_noise", "gain") if name not in known]
    if missing:
        print(f"not given, so assumed: {', '.join(missing)}; `pipeline calibrate` measures noise")


def _timestamps(
    footage: Footage, path: Path, rate_hz: float | None, start: str | None
) -> Sequence[int]:
    """Nanoseconds of each frame, by the rate or else from the file."""
    if rate_hz is None:
        if start is not None:
            raise PipelineError("--start goes with --rate-hz; give both")
        if footage.timestamp_ns is None:
            raise PipelineError(f"{path}: holds no timestamps; give --rate-hz")
        stamps = footage.timestamp_ns
        late = next((k for k in range(1, len(stamps)) if stamps[k] <= stamps[k - 1]), None)
        if late is not None:
            raise PipelineError(
                f"{footage.name(late)}: its timestamp does not follow that of the frame before; "
                "give --rate-hz instead"
            )
        return stamps
    if not 1e-3 <= rate_hz <= 1e6:
        raise PipelineError(f"--rate-hz must be from 0.001 to 1000000, got {rate_hz:g}")
    first_ns = footage.timestamp_ns[0] if footage.timestamp_ns else footage.start_ns
    try:
        first_ns = first_ns if start is None else utc_ns(start)
    except ValueError as error:
        raise PipelineError(f"--start: {error}; e.g. 2026-01-31T12:00:00.5") from error
    return [first_ns + round(index * 1e9 / rate_hz) for index in range(footage.length)]


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
        found = estimate(_measure(first), _measure(second), first.sensor.full_scale)
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
