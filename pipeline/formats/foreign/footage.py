"""Frames of a foreign file, and what its readers share."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import PipelineError

MAX_COUNT = 65535


@dataclass(frozen=True)
class Footage:
    """Frames that are read when asked for."""

    shape: tuple[int, int]  # H, W
    length: int
    full_scale: int  # what the file's type can hold, or says that it holds
    read: Callable[[int], NDArray[Any]]  # index → counts (H, W), uint8 or uint16
    name: Callable[[int], str]  # index → what to call the frame in an error
    timestamp_ns: Sequence[int] | None = None  # UTC since 1970, the middle of the exposure
    start_ns: int = 0  # of the first frame, where there are no timestamps


def stacked(
    path: Path, stack: NDArray[Any], full_scale: int | None = None, **times: Any
) -> Footage:
    """Footage of an array (T, H, W) or (H, W), perhaps mapped from the file."""
    if stack.ndim == 2:
        stack = stack[None]
    if stack.ndim != 3 or 0 in stack.shape:
        raise PipelineError(
            f"{path}: has shape {tuple(stack.shape)}; frames must be grey, (H, W) or (T, H, W)"
        )
    check_dtype(path, stack.dtype)

    def name(index: int) -> str:
        return f"{path}: frame {index}" if len(stack) > 1 else str(path)

    return Footage(
        shape=(stack.shape[1], stack.shape[2]),
        length=len(stack),
        full_scale=full_scale or largest(stack.dtype),
        read=lambda index: counts(stack[index], name(index)),
        name=name,
        **times,
    )


def check_dtype(path: Path, dtype: np.dtype[Any]) -> None:
    """Raise PipelineError unless the type is of whole numbers."""
    if dtype.kind not in "ui":
        raise PipelineError(
            f"{path}: pixels are {dtype.name}; they must be whole counts from 0 to {MAX_COUNT}, "
            "scale and round them first"
        )


def largest(dtype: np.dtype[Any]) -> int:
    """The greatest count of a type, as far as a recording can hold it."""
    return min(int(np.iinfo(dtype).max), MAX_COUNT) if dtype.itemsize <= 1 else MAX_COUNT


def counts(pixels_HW: NDArray[Any], where: str) -> NDArray[Any]:
    """The same counts as uint8 or uint16; raises PipelineError if they do not fit."""
    if pixels_HW.dtype.newbyteorder("=") in (np.uint8, np.uint16):
        return np.asarray(pixels_HW, dtype=pixels_HW.dtype.newbyteorder("="))
    lowest, highest = pixels_HW.min(), pixels_HW.max()
    if lowest < 0 or highest > MAX_COUNT:
        raise PipelineError(
            f"{where}: counts run from {lowest} to {highest}; they must lie in 0…{MAX_COUNT}"
        )
    return pixels_HW.astype(np.uint16)


def utc_ns(text: str) -> int:
    """An ISO date and time as nanoseconds since 1970, UTC; raises ValueError on anything else."""
    found = re.fullmatch(r"(\d{4}-\d\d-\d\d)[T ](\d\d:\d\d:\d\d)(?:\.(\d{1,9}))?Z?", text.strip())
    if found is None:
        raise ValueError(f"{text!r} is no ISO date and time")
    date, clock, fraction = found.groups()
    seconds = datetime.fromisoformat(f"{date}T{clock}").replace(tzinfo=UTC).timestamp()
    return int(seconds) * 1_000_000_000 + int((fraction or "0").ljust(9, "0"))
