"""File formats of the project: both are zarr groups, documented in their modules."""

from pathlib import Path

from pipeline.errors import PipelineError
from pipeline.formats import _checks, csist, recording
from pipeline.formats.mosaic import Mosaic
from pipeline.formats.recording import Recording


def open_any(path: Path) -> Recording | Mosaic:
    """Open a recording, or a CSIST dataset laid out as frames; its attribute `format` decides.

    Raises PipelineError if it is neither, or malformed.
    """
    group = _checks.open_group(path)
    found = _checks.format_of(path, group)
    if found == recording.FORMAT:
        return recording.recording_from(path, group)
    if found == csist.FORMAT:
        return Mosaic(csist.dataset_from(path, group))
    raise PipelineError(
        f'{path}: attribute `format` must be "{recording.FORMAT}" or "{csist.FORMAT}", '
        f'got "{found}"'
    )
