"""Calibrations: what turns raw counts of one sensor into uniform ones, as a zarr group.

Arrays: gain float32 (H, W), offset float32 (H, W), bad bool (H, W). Attributes: format
"irst-calibration", format_version, full_scale. Corrected = gain · raw + offset, counts.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.formats import _checks

FORMAT = "irst-calibration"


@dataclass(frozen=True)
class Calibration:
    """Two-point correction and bad pixels of one sensor, (H, W) each."""

    gain_HW: NDArray[np.float32]
    offset_HW: NDArray[np.float32]  # counts
    bad_HW: NDArray[np.bool_]
    full_scale: int


def write_calibration(path: Path, calibration: Calibration) -> None:
    """Write it whole or not at all; raises PipelineError if `path` exists or cannot be written."""
    with _checks.new_group(path) as group:
        group.attrs.update(
            {
                "format": FORMAT,
                "format_version": _checks.FORMAT_VERSION,
                "full_scale": calibration.full_scale,
            }
        )
        group.create_array("gain", data=calibration.gain_HW)
        group.create_array("offset", data=calibration.offset_HW)
        group.create_array("bad", data=calibration.bad_HW)


def read_calibration(path: Path) -> Calibration:
    """Read and check a calibration; raises PipelineError naming what is malformed."""
    group = _checks.open_group(path)
    _checks.check_format(path, group, FORMAT)
    gain_HW = _checks.values(path, group, "gain", "float32", (None, None))
    offset_HW = _checks.values(path, group, "offset", "float32", gain_HW.shape)
    bad_HW = _checks.values(path, group, "bad", "bool", gain_HW.shape)
    wrong = ~(np.isfinite(gain_HW) & (gain_HW > 0.0))
    _checks.refuse(path, "gain", "must be finite and positive", wrong.any(axis=1))
    _checks.refuse(path, "offset", "must be finite", ~np.isfinite(offset_HW).all(axis=1))
    full_scale = _checks.number_attribute(path, group.attrs.asdict(), "full_scale", whole=True)
    return Calibration(gain_HW, offset_HW, bad_HW, int(full_scale))
