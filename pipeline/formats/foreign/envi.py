"""ENVI: raw counts and a text header beside them; each band is a frame.

Interleave bsq, bil or bip; `acquisition time`, where there is one, is that of the first frame.
"""

import re
from pathlib import Path

import numpy as np

from pipeline.errors import PipelineError
from pipeline.formats.foreign.footage import Footage, stacked, utc_ns

DTYPES = {"1": "u1", "2": "i2", "3": "i4", "12": "u2", "13": "u4", "14": "i8", "15": "u8"}
AXES = {"bsq": (0, 1, 2), "bil": (1, 0, 2), "bip": (2, 0, 1)}  # stored axes → frame, row, column
DATA = (".img", ".dat", ".raw", ".bsq", ".bil", ".bip", "")


def read(path: Path) -> Footage:
    """Map the data; raises PipelineError if a file is missing, malformed or of another length."""
    header, data = _pair(path)
    fields = _fields(header)
    width, height, number = (_whole(header, fields, key) for key in ("samples", "lines", "bands"))
    offset = _whole(header, fields, "header offset", 0)
    kind = _choice(header, fields, "data type", list(DTYPES))
    interleave = _choice(header, fields, "interleave", list(AXES))
    order = _choice(header, fields, "byte order", ["0", "1"], "0")
    dtype = np.dtype(("<" if order == "0" else ">") + DTYPES[kind])
    wanted, size = offset + width * height * number * dtype.itemsize, data.stat().st_size
    if 0 in (width, height, number) or size != wanted:
        raise PipelineError(
            f"{data}: {number} bands of {width}×{height} {dtype.name} need {wanted} bytes, but the "
            f"file has {size}; copy it again, or correct {header.name}"
        )
    frame, row, column = AXES[interleave]
    lengths = dict(zip((frame, row, column), (number, height, width), strict=True))
    shape = (lengths[0], lengths[1], lengths[2])
    stack = np.memmap(data, dtype, "r", offset, shape).transpose(frame, row, column)
    start_ns = 0
    if "acquisition time" in fields:
        try:
            start_ns = utc_ns(fields["acquisition time"])
        except ValueError as error:
            raise PipelineError(f"{header}: acquisition time: {error}; correct it") from error
    return stacked(data, stack, start_ns=start_ns)


def _pair(path: Path) -> tuple[Path, Path]:
    """Header and data, whichever of them was given."""
    if path.suffix.lower() != ".hdr":
        headers = [path.with_suffix(".hdr"), path.with_name(path.name + ".hdr")]
        header = next((file for file in headers if file.is_file()), None)
        if header is None:
            raise PipelineError(f"{path}: no ENVI header beside it; give {headers[0].name}")
        return header, path
    data = next((file for end in DATA if (file := path.with_suffix(end)).is_file()), None)
    if data is None:
        raise PipelineError(f"{path}: no data beside it, e.g. {path.with_suffix('.img').name}")
    return path, data


def _fields(header: Path) -> dict[str, str]:
    text = header.read_text(encoding="latin-1")
    if not text.startswith("ENVI"):
        raise PipelineError(f"{header}: not an ENVI header; its first line must be ENVI")
    found = re.findall(r"^\s*([^=\n{}]+?)\s*=\s*(\{[^}]*\}|[^\n]*)", text, re.MULTILINE)
    return {key.lower(): value.strip("{} \t\r\n") for key, value in found}


def _whole(header: Path, fields: dict[str, str], key: str, default: int | None = None) -> int:
    value = fields.get(key, default)
    if value is None or not str(value).isdecimal():
        raise PipelineError(f"{header}: `{key}` must be a whole number, got {value!r}")
    return int(value)


def _choice(
    header: Path, fields: dict[str, str], key: str, known: list[str], default: str | None = None
) -> str:
    value = str(fields.get(key, default)).lower()
    if value not in known:
        raise PipelineError(f"{header}: `{key}` must be one of {', '.join(known)}, got {value}")
    return value
