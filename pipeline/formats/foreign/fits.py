"""FITS: the first image of the file, (H, W) or (T, H, W), row 0 first, as it is stored.

Time of a single image: DATE-AVG, or DATE-BEG (else DATE-OBS) plus half of EXPTIME, UTC. A cube's
date is that of its first frame. The image is read whole, since its scaling may need that.
"""

import warnings
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.errors import PipelineError
from pipeline.formats.foreign.footage import Footage, stacked, utc_ns


def read(path: Path) -> Footage:
    """Read the file; raises PipelineError if it is malformed, holds no image, or astropy lacks."""
    try:
        from astropy.io import fits
    except ImportError as error:
        raise PipelineError(
            f"{path}: FITS needs astropy; install it with `pip install irst-pipeline[fits]`"
        ) from error
    try:
        with (
            warnings.catch_warnings(record=True, action="always") as said,
            path.open("rb") as file,
            fits.open(file, memmap=False, uint=True) as units,
        ):
            image = next((unit for unit in units if _is_image(unit)), None)
            stack = None if image is None else np.asarray(image.data)
            header = {} if image is None else dict(image.header)
    except Exception as error:  # astropy meets a damaged header with whatever it hits
        cause = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise PipelineError(f"{path}: not a whole FITS file ({cause}); copy it again") from error
    if stack is None:
        raise PipelineError(f"{path}: holds no image; give a FITS file with one")
    if any("truncated" in str(warning.message) for warning in said):
        raise PipelineError(f"{path}: cut short; copy it again")
    stamp_ns = _time_ns(path, header)
    if stamp_ns is not None and stack.ndim == 2:
        return stacked(path, stack, timestamp_ns=[stamp_ns])
    return stacked(path, stack, start_ns=stamp_ns or 0)


def _is_image(unit: Any) -> bool:
    if any(unit.header[f"NAXIS{axis}"] < 0 for axis in range(1, unit.header["NAXIS"] + 1)):
        raise ValueError("a negative NAXISn")
    return bool(unit.is_image and unit.data is not None)


def _time_ns(path: Path, header: dict[str, Any]) -> int | None:
    for key, share in (("DATE-AVG", 0.0), ("DATE-BEG", 0.5), ("DATE-OBS", 0.5)):
        if key not in header:
            continue
        try:
            exposure_s = float(header.get("EXPTIME", 0.0))
            return utc_ns(str(header[key])) + round(share * exposure_s * 1e9)
        except (ValueError, TypeError, OverflowError) as error:
            raise PipelineError(f"{path}: {key} or EXPTIME: {error}; correct the header") from error
    return None
