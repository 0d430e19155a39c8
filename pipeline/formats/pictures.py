"""Folders of pictures and of masks: grey or colour, 8 or 16 bits, PNG, TIFF, JPEG, BMP."""

from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from pipeline.errors import PipelineError

SUFFIXES = (".png", ".tif", ".tiff", ".jpg", ".jpeg", ".bmp")
MASK_NAMES = ("{}.png", "{}_pixels0.png")
ASPECT_TOLERANCE = 0.01


class Pair(NamedTuple):
    """A picture's file and that of its mask."""

    picture: Path
    mask: Path


def paired(pictures: Path, masks: Path) -> tuple[list[Pair], list[Path]]:
    """Every picture of a folder with its mask, by name; and the files that are no pictures.

    Raises PipelineError if a folder or a mask is missing, or there is no picture at all.
    """
    for folder in (pictures, masks):
        if not folder.is_dir():
            raise PipelineError(f"{folder}: no such folder; give one of pictures and one of masks")
    files = sorted(path for path in pictures.iterdir() if path.is_file())
    found = [path for path in files if path.suffix.lower() in SUFFIXES]
    if not found:
        raise PipelineError(f"{pictures}: holds no picture ({', '.join(SUFFIXES)})")
    return [Pair(path, _mask_of(path, masks)) for path in found], sorted({*files} - {*found})


def _mask_of(picture: Path, masks: Path) -> Path:
    names = [name.format(picture.stem) for name in MASK_NAMES]
    for name in names:
        if (masks / name).is_file():
            return masks / name
    raise PipelineError(f"{picture}: has no mask {' or '.join(names)} in {masks}; add it")


def read_picture(path: Path) -> NDArray[Any]:
    """Grey levels (H, W) uint8, uint16 or float32; colours become luminance, alpha is dropped.

    Raises PipelineError if the file is no picture that can be read, or holds several.
    """
    try:
        data = np.frombuffer(path.read_bytes(), np.uint8)
    except OSError as error:
        raise PipelineError(f"{path}: cannot be read ({error.strerror})") from error
    known, pages = cv2.imdecodemulti(data, cv2.IMREAD_UNCHANGED) if data.size else (False, ())
    if not known or not pages:
        raise PipelineError(f"{path}: no picture that can be read; replace or remove it")
    if len(pages) > 1:
        raise PipelineError(f"{path}: holds {len(pages)} pictures; save each in a file of its own")
    image: NDArray[Any] = pages[0]
    if image.dtype not in (np.uint8, np.uint16):
        image = image.astype(np.float32)
    if image.ndim == 3:
        channels = image.shape[2]
        conversion = {1: None, 2: None, 3: cv2.COLOR_BGR2GRAY, 4: cv2.COLOR_BGRA2GRAY}[channels]
        image = image[:, :, 0] if conversion is None else cv2.cvtColor(image, conversion)
    return np.ascontiguousarray(image)


def read_mask(pair: Pair, shape: tuple[int, ...]) -> tuple[NDArray[np.bool_], bool]:
    """Target pixels (H, W) of a picture of this shape, and whether the mask had to be scaled.

    Target is what exceeds half of the mask's greatest value. A mask of another resolution but the
    same proportions, within 1 %, is scaled to the nearest pixel; one of other proportions belongs
    to another picture: raises PipelineError.
    """
    mask = read_picture(pair.mask)
    height, width = shape
    scaled = mask.shape != shape
    if scaled:
        proportion = mask.shape[1] * height / (mask.shape[0] * width)
        if abs(proportion - 1.0) > ASPECT_TOLERANCE:
            raise PipelineError(
                f"{pair.mask}: is {mask.shape[1]}×{mask.shape[0]}, but its picture {pair.picture} "
                f"{width}×{height}; give the mask the picture's size"
            )
        mask = cv2.resize(mask, (width, height), interpolation=cv2.INTER_NEAREST)
    return (mask > 0.5 * mask.max()) if mask.max() > 0 else np.zeros(shape, np.bool_), scaled
