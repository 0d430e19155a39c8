"""Whether a file can be written, known before the work whose figures go into it."""

from pathlib import Path

from pipeline.errors import PipelineError


def check_writable(path: Path) -> None:
    """Raise PipelineError unless a file can be written there; what is there stays as it is."""
    if not path.absolute().parent.is_dir():
        raise PipelineError(f"{path}: no such folder {path.parent}; make it first")
    try:
        there = path.exists()
        path.open("ab").close()
        if not there:
            path.resolve().unlink()  # not a link that led nowhere
    except OSError as error:
        raise PipelineError(
            f"{path}: cannot be written ({error.strerror}); choose another file"
        ) from error


def check_png(path: Path) -> None:
    """Raise PipelineError unless the name of a picture to write ends in .png."""
    if path.suffix.lower() != ".png":
        raise PipelineError(f"{path}: a picture is a PNG; give a path that ends in .png")
