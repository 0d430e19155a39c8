"""What both formats share: reading zarr with errors that name the place, writing all or nothing."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import ArrayLike, NDArray

from pipeline.errors import PipelineError
from pipeline.physics.sensor import Sensor

FORMAT_VERSION = 1
UNSIGNED = ("uint8", "uint16")

_STORE_ERRORS = (
    OSError, ValueError, TypeError, KeyError, IndexError, AttributeError, RuntimeError,
    ArithmeticError, MemoryError, SystemError,
)  # fmt: skip
"""What zarr and its codecs raise on metadata and chunks they cannot make sense of, AttributeError
on JSON that is no map, ArithmeticError on a number too large for its type; the last two come of a
chunk that claims a size beyond reason."""


@contextmanager
def named(path: Path, what: str, remedy: str) -> Iterator[None]:
    """Turn what zarr raises inside the block into one line about `what` in `path`."""
    try:
        yield
    except _STORE_ERRORS as error:
        cause = " ".join(str(error).split()) or type(error).__name__
        raise PipelineError(f"{path}: {what} cannot be read ({cause}); {remedy}") from error


def first_line(error: OSError) -> str:
    """The reason an operating-system call failed, without the path it repeats."""
    return error.strerror or str(error).splitlines()[0]


# --- reading ---------------------------------------------------------------------------------


def open_group(path: Path) -> zarr.Group:
    """The zarr group at `path`, read-only; raises PipelineError if there is none."""
    if not path.exists():
        raise PipelineError(f"{path}: no such file or folder; check the path")
    try:
        return zarr.open_group(str(path), mode="r")
    except _STORE_ERRORS as error:
        raise PipelineError(
            f"{path}: not a zarr group; give a folder written by `trainer generate` or a recording"
        ) from error


def format_of(path: Path, group: zarr.Group) -> str:
    """The value of the attribute `format`; raises PipelineError if it is missing."""
    return str(attribute(path, group.attrs.asdict(), "format"))


def check_format(path: Path, group: zarr.Group, name: str) -> None:
    """Raise PipelineError unless the group says it is of this format, in a version known here."""
    found = format_of(path, group)
    if found != name:
        raise PipelineError(f'{path}: attribute `format` must be "{name}", got "{found}"')
    version = attribute(path, group.attrs.asdict(), "format_version")
    if version != FORMAT_VERSION:
        raise PipelineError(
            f"{path}: attribute `format_version` is {version!r}, but only {FORMAT_VERSION} is "
            "known here; write the file again, or use the release that wrote it"
        )


def attribute(path: Path, attributes: dict[str, Any], name: str, parent: str = "") -> Any:
    """One attribute by name; raises PipelineError if it is missing."""
    if name not in attributes:
        raise PipelineError(f"{path}: attribute `{parent}{name}` is missing; add it")
    return attributes[name]


def number_attribute(
    path: Path, attributes: dict[str, Any], name: str, parent: str = "", *, whole: bool = False
) -> float:
    """One attribute that must be a finite number, or a whole one; raises PipelineError."""
    value = attribute(path, attributes, name, parent)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not np.isfinite(value) or (whole and value != int(value)):
        kind = "a whole number" if whole else "a finite number"
        raise PipelineError(f"{path}: attribute `{parent}{name}` must be {kind}, got {value!r}")
    return float(value)


def sensor_from(path: Path, attributes: dict[str, Any], parent: str = "") -> Sensor:
    """The sensor that the attributes describe; raises PipelineError naming the wrong one.

    `gain` null means no shot noise; `id`, `ifov_rad` and `sigma_error` may be left out.
    """
    for name in ("sigma_px", "read_noise"):
        number_attribute(path, attributes, name, parent)
    number_attribute(path, attributes, "full_scale", parent, whole=True)
    if attribute(path, attributes, "gain", parent) is not None:
        number_attribute(path, attributes, "gain", parent)
    for name in ("ifov_rad", "sigma_error"):
        if attributes.get(name) is not None:
            number_attribute(path, attributes, name, parent)
    own = attributes.get("id", "sensor")
    if not isinstance(own, str) or not own:
        raise PipelineError(f"{path}: attribute `{parent}id` must be a name, got {own!r}")
    try:
        return Sensor.from_attributes(attributes)
    except ValueError as error:
        wrong = str(error).removeprefix("sensor.")
        raise PipelineError(f"{path}: attribute `{parent}{wrong}`") from error


def array(
    path: Path, group: zarr.Group, name: str, dtypes: tuple[str, ...], shape: tuple[int | None, ...]
) -> zarr.Array[Any]:
    """The array `name` of the group, not read yet; None in `shape` stands for any length.

    Raises PipelineError if it is missing, not an array, or of another dtype or shape.
    """
    with named(path, f"array `{name}`", "write the file again"):
        found = group.get(name)
    if found is None:
        raise PipelineError(f"{path}: array `{name}` is missing; write the file again")
    if not isinstance(found, zarr.Array):
        raise PipelineError(f"{path}: `{name}` must be an array, but it is a group")
    if found.dtype.newbyteorder("=") not in [np.dtype(dtype) for dtype in dtypes]:
        raise PipelineError(
            f"{path}: array `{name}` must be {' or '.join(dtypes)}, got {found.dtype}"
        )
    fits = len(found.shape) == len(shape) and all(
        wanted in (None, length) for length, wanted in zip(found.shape, shape, strict=True)
    )
    if not fits:
        wanted = ", ".join("any" if length is None else str(length) for length in shape)
        raise PipelineError(
            f"{path}: array `{name}` must have shape ({wanted}), got {tuple(found.shape)}"
        )
    return found


def values(
    path: Path, group: zarr.Group, name: str, dtype: str, shape: tuple[int | None, ...]
) -> NDArray[Any]:
    """The array `name`, checked as by `array` and read whole, in native byte order."""
    found = array(path, group, name, (dtype,), shape)
    with named(path, f"array `{name}`", "a chunk is damaged: copy or write the file again"):
        return np.asarray(found[...], dtype=dtype)


def refuse(path: Path, name: str, rule: str, wrong: ArrayLike) -> None:
    """Raise PipelineError naming the array, the rule and the first row that is wrong, if any."""
    rows = np.flatnonzero(wrong)
    if len(rows):
        raise PipelineError(f"{path}: array `{name}` {rule}; row {rows[0]} is not so")


# --- writing ---------------------------------------------------------------------------------


def dtype_for(sensor: Sensor) -> str:
    """The narrower unsigned type that holds the sensor's full scale."""
    return "uint8" if sensor.full_scale <= 255 else "uint16"


class NewGroup:
    """A zarr group written beside `path` under a hidden name and renamed when it is complete.

    So an interrupted write leaves nothing that looks whole. Raises PipelineError if `path` exists.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
        self._refuse_existing()
        try:
            self._partial.mkdir(parents=True)
        except OSError as error:
            raise PipelineError(f"{path}: cannot write there ({first_line(error)})") from error
        with self.all_or_nothing():
            self.group = zarr.open_group(str(self._partial), mode="w-", zarr_format=3)

    def _refuse_existing(self) -> None:
        if self.path.exists():
            raise PipelineError(f"{self.path}: exists already; remove it or choose another name")

    def commit(self) -> None:
        """Give the group its name."""
        self._refuse_existing()
        self._partial.rename(self.path)

    def discard(self) -> None:
        """Remove what was written."""
        shutil.rmtree(self._partial, ignore_errors=True)

    @contextmanager
    def all_or_nothing(self) -> Iterator[None]:
        """Whatever is raised inside the block removes what was written, OSError in one line."""
        try:
            yield
        except OSError as error:
            self.discard()
            raise PipelineError(f"{self.path}: cannot be written ({first_line(error)})") from error
        except BaseException:
            self.discard()
            raise


@contextmanager
def new_group(path: Path) -> Iterator[zarr.Group]:
    """A group to fill; it appears at `path` at the end of the block, or not at all."""
    new = NewGroup(path)
    with new.all_or_nothing():
        yield new.group
        new.commit()
