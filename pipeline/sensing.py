"""What the configuration says of the sensor, and what stages are told of it."""

import math
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import ConfigDict, Field, field_validator

from pipeline.component import Context, Settings
from pipeline.errors import PipelineError
from pipeline.formats.calibration import read_calibration
from pipeline.formats.png import decode
from pipeline.physics.geometry import Geometry
from pipeline.physics.sensor import Sensor


class GeometrySettings(Settings):
    """The camera as `physics.geometry` has it; what is not given follows from the sensor.

    fx_px: focal length over pixel pitch, by default 1/ifov_rad; fy_px: the same as fx_px; cx_px,
    cy_px: the middle of the frame. Angles in radians.
    """

    model_config = ConfigDict(allow_inf_nan=False)

    fx_px: float | None = Field(None, gt=0.0)
    fy_px: float | None = Field(None, gt=0.0)
    cx_px: float | None = None
    cy_px: float | None = None
    distortion: tuple[float, float, float, float, float] = Field(
        (0.0, 0.0, 0.0, 0.0, 0.0), description="k1, k2, p1, p2, k3, as OpenCV has them"
    )
    az_rad: float = Field(0.0, description="boresight, clockwise from north")
    el_rad: float = Field(0.0, ge=-math.pi / 2, le=math.pi / 2)
    roll_rad: float = Field(0.0, description="positive: the camera turned clockwise")

    @field_validator("distortion", mode="before")
    @classmethod
    def _five(cls, distortion: Any) -> Any:
        if not isinstance(distortion, list | tuple) or len(distortion) != 5:
            raise ValueError("must be five numbers: k1, k2, p1, p2, k3")
        return distortion


class SensorSettings(Settings):
    """Fields of the sensor that the source does not know, or has wrong."""

    model_config = ConfigDict(allow_inf_nan=False)

    id: str | None = Field(None, min_length=1, max_length=64, pattern=r"^[A-Za-z0-9_.-]+$")
    sigma_px: float | None = Field(None, ge=0.1, le=5.0)
    full_scale: int | None = Field(None, ge=1, le=65535)
    read_noise: float | None = Field(None, ge=0.0, le=1e6)
    gain: float | None = Field(None, gt=0.0, le=1e9)
    ifov_rad: float | None = Field(None, gt=0.0)
    sigma_error: float | None = Field(None, ge=0.0, le=0.5)
    bad_pixels: Path | None = Field(None, description="PNG of the frame's size, not 0 = bad")
    calibration: Path | None = Field(None, description="what `pipeline calibrate` wrote")
    geometry: GeometrySettings | None = Field(None, description="given: targets get angles")

    def overrides(self) -> dict[str, Any]:
        """The fields of `Sensor` that were given."""
        return self.model_dump(exclude_none=True, exclude={"bad_pixels", "calibration", "geometry"})


def stage_context(
    settings: SensorSettings, sensor: Sensor, shape: tuple[int, int], engine: str
) -> Context:
    """What stages may know of the sensor; raises PipelineError if a file of it is not of `shape`.

    Bad is what the map or the calibration says is bad.
    """
    bad_HW = load_bad_pixels(settings.bad_pixels, shape)
    calibration = None
    if settings.calibration is not None:
        calibration = read_calibration(settings.calibration)
        _same_shape(settings.calibration, "calibration", calibration.bad_HW.shape, shape)
        if calibration.full_scale != sensor.full_scale:
            raise PipelineError(
                f"{settings.calibration}: was made at full scale {calibration.full_scale}, but "
                f"the sensor has {sensor.full_scale}; calibrate it with the settings it runs with"
            )
        bad_HW = calibration.bad_HW if bad_HW is None else bad_HW | calibration.bad_HW
    geometry = None
    if settings.geometry is not None:
        geometry = camera(settings.geometry, sensor, shape)
    return Context(sensor, bad_HW, engine, calibration, geometry)


def camera(settings: GeometrySettings, sensor: Sensor, shape: tuple[int, int]) -> Geometry:
    """The geometry of frames of this shape; raises PipelineError if it cannot be inverted there."""
    fx_px = settings.fx_px or (1.0 / sensor.ifov_rad if sensor.ifov_rad else None)
    if fx_px is None:
        raise PipelineError("sensor.geometry: give fx_px, or sensor.ifov_rad")
    middle_x, middle_y = (shape[1] - 1) / 2.0, (shape[0] - 1) / 2.0
    geometry = Geometry(
        fx_px=fx_px,
        fy_px=settings.fy_px or fx_px,
        cx_px=middle_x if settings.cx_px is None else settings.cx_px,
        cy_px=middle_y if settings.cy_px is None else settings.cy_px,
        distortion=settings.distortion,
        boresight=(settings.az_rad, settings.el_rad, settings.roll_rad),
    )
    y, x = np.mgrid[: shape[0] : 16, : shape[1] : 16]
    edge = np.stack([np.append(x, shape[1] - 1), np.append(y, shape[0] - 1)], axis=-1)
    try:
        geometry.angles(edge, np.zeros((len(edge), 3)))
    except ValueError as error:
        raise PipelineError(f"sensor.geometry.distortion: {error}; measure it again") from error
    return geometry


def _same_shape(path: Path, what: str, found: tuple[int, ...], shape: tuple[int, int]) -> None:
    if found != shape:
        raise PipelineError(
            f"{path}: {what} is {found[1]}×{found[0]}, frames are {shape[1]}×{shape[0]}"
        )


def load_bad_pixels(path: Path | None, shape: tuple[int, int]) -> NDArray[np.bool_] | None:
    """Read a bad-pixel map (H, W), True = bad; raises PipelineError if it is not of that shape."""
    if path is None:
        return None
    try:
        image = decode(path.read_bytes())
    except OSError as error:
        raise PipelineError(
            f"{path}: sensor.bad_pixels must be a readable grey PNG ({error.strerror})"
        ) from error
    if image is None or image.ndim != 2:
        raise PipelineError(
            f"{path}: sensor.bad_pixels must be a readable grey PNG, and this is none, or damaged"
        )
    _same_shape(path, "bad-pixel map", image.shape, shape)
    result: NDArray[np.bool_] = image != 0
    if result.all():
        raise PipelineError(f"{path}: marks every pixel as bad; 0 in sensor.bad_pixels is good")
    return result
