"""NPY: one array (T, H, W) or (H, W) of numpy's own format; it has no timestamps."""

import warnings
from pathlib import Path

import numpy as np

from pipeline.errors import PipelineError
from pipeline.formats.foreign.footage import Footage, stacked


def read(path: Path) -> Footage:
    """Map the file; raises PipelineError if it is malformed or no array of counts."""
    try:
        with warnings.catch_warnings(action="ignore"):
            stack = np.lib.format.open_memmap(path, mode="r")
    except Exception as error:  # numpy meets a damaged header with whatever it hits
        cause = str(error).splitlines()[0] if str(error) else "nothing in it"
        raise PipelineError(f"{path}: not a whole NPY file ({cause}); write it again") from error
    return stacked(path, stack)
