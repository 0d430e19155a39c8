"""The original CSIST-100K files, PNG + XML, to and from a dataset.

    DIR/{train,val,test}/cso_img/image_<id>.png           8- or 16-bit grey
    DIR/{train,val,test}/Annotations/CSO<id>.xml          or DIR/Annotations, for all three

An annotation is `annotation/{filename, size/{width, height, depth}, sigma, object*/{name,
coordinate/{xc, yc, brightness}}}`. There xc is the row and yc the column, px, whole numbers at
pixel centres. Layout and naming: github.com/GrokCV/GrokCSO, README and grokcso/datasets.
"""

import os
import re
import shlex
import shutil
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from itertools import chain
from math import inf
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from xml.etree import ElementTree

import cv2
import numpy as np
from numpy.typing import NDArray

from pipeline.formats.csist import FORMAT, CsistDataset
from pipeline.physics.groups import MAX_TARGETS, SIZE_PX
from pipeline.physics.sensor import Sensor
from trainer.errors import TrainerError

SPLITS = ("train", "val", "test")
IMAGES, ANNOTATIONS = "cso_img", "Annotations"
FULL_SCALE = {8: 255, 16: 65535}
"""Of a PNG by its bits, unless told otherwise."""
PROGRESS_EVERY = 256
FLOAT32_MAX = float(np.finfo(np.float32).max)

Progress = Callable[[int], None]
Item = TypeVar("Item")


@dataclass(frozen=True)
class Unwritten:
    """What a dataset knows and the files cannot hold; the fields are options of `import-csist`.

    profile: a label. full_scale: counts; None: all that the PNG's bits allow. read_noise: counts
    rms. gain: electrons per count, infinite without shot noise. background: counts.
    """

    profile: str = "imported"
    full_scale: int | None = None
    read_noise: float = 0.0
    gain: float = inf
    background: float = 0.0

    @classmethod
    def of(cls, dataset: CsistDataset) -> "Unwritten":
        """Of a dataset about to be exported."""
        sensor = dataset.sensor
        usual = FULL_SCALE[_bits(dataset.image)]
        return cls(
            profile=dataset.profile,
            full_scale=None if sensor.full_scale == usual else sensor.full_scale,
            read_noise=sensor.read_noise,
            gain=sensor.gain,
            background=dataset.background,
        )

    def options(self) -> str:
        """Those that are not the default, as on a command line."""
        told = [(field.name, getattr(self, field.name), field.default) for field in fields(self)]
        return " ".join(
            f"--{name.replace('_', '-')} {shlex.quote(str(value))}"
            for name, value, default in told
            if value != default
        )

    def sensor(self, annotation: Path, sigma_px: float, bits: int) -> Sensor:
        """The sensor of files with those bits and the σ in `annotation`; raises TrainerError."""
        if not 0.0 <= self.background < inf:
            raise TrainerError(
                f"--background: must be zero or more counts, got {self.background}; correct it"
            )
        try:
            return Sensor(
                id=FORMAT,
                sigma_px=sigma_px,
                full_scale=FULL_SCALE[bits] if self.full_scale is None else self.full_scale,
                read_noise=self.read_noise,
                gain=self.gain,
            )
        except ValueError as error:
            raise TrainerError(f"{error}; correct the option, or sigma in {annotation}") from error


class Pair(NamedTuple):
    """The files of one image."""

    image: Path
    annotation: Path


class Annotation(NamedTuple):
    """What the XML of one image says."""

    sigma_px: float
    targets: list[tuple[float, float, float]]  # column px, row px, counts


# --- reading ---------------------------------------------------------------------------------


def find_pairs(folder: Path, split: str) -> list[Pair]:
    """The files of one split, by rising id; ids need not be contiguous.

    folder: holds the splits. Annotations inside the split go before those beside it. Raises
    TrainerError for a folder that is missing or empty, an id given twice, an image without its
    annotation, an annotation without its image.
    """
    _check_split(split)
    images = _by_id([folder / split / IMAGES], "image_", ".png")
    if not images:
        raise TrainerError(
            f"{folder / split / IMAGES}: no image_<id>.png; give the folder that holds {split}/"
        )
    annotations_folder, known = folder / split / ANNOTATIONS, images
    if not annotations_folder.is_dir():
        annotations_folder = folder / ANNOTATIONS
        known = _by_id([folder / name / IMAGES for name in SPLITS], "image_", ".png")
    annotations = _by_id([annotations_folder], "CSO", ".xml")
    for number, path in sorted(images.items()):
        if number not in annotations:
            expected = annotations_folder / f"CSO{number}.xml"
            raise TrainerError(f"{path}: has no annotation; add {expected}, or remove the image")
    for number, path in sorted(annotations.items()):
        if number not in known:
            expected = folder / split / IMAGES / f"image_{number}.png"
            raise TrainerError(f"{path}: has no image; add {expected}, or remove the annotation")
    return [Pair(path, annotations[number]) for number, path in sorted(images.items())]


def read_pairs(pairs: list[Pair], unwritten: Unwritten, progress: Progress) -> CsistDataset:
    """The dataset of these files, at least one; all must be of one σ and of the same bits.

    Positions and intensities are rounded to float32. progress: called with the number of images
    read. Raises TrainerError naming the file that is wrong.
    """
    first_image, first = _read_image(pairs[0].image), _read_annotation(pairs[0].annotation)
    sensor = unwritten.sensor(pairs[0].annotation, first.sigma_px, _bits(first_image))
    image = np.empty((len(pairs), SIZE_PX, SIZE_PX), first_image.dtype)
    target_count = np.zeros(len(pairs), np.uint8)
    target = np.full((len(pairs), MAX_TARGETS, 3), np.nan, np.float32)
    for index, pair in _counted(pairs, progress):
        found, annotation = _read_image(pair.image), _read_annotation(pair.annotation)
        _check_same(pair.image, "bits", _bits(found), _bits(image))
        _check_same(pair.annotation, "sigma", annotation.sigma_px, sensor.sigma_px)
        if found.max() > sensor.full_scale:
            raise TrainerError(
                f"{pair.image}: has a pixel of {found.max()}, full_scale is {sensor.full_scale}; "
                "give the sensor's with --full-scale"
            )
        image[index] = found
        number = target_count[index] = len(annotation.targets)
        target[index, :number] = np.reshape(annotation.targets, (number, 3))
    return CsistDataset(
        image=image,
        target_count=target_count,
        target_xy_px=target[..., :2],
        target_intensity=target[..., 2],
        sensor=sensor,
        profile=unwritten.profile,
        seed=None,
        background=unwritten.background,
    )


def _check_same(path: Path, field: str, found: float, first: float) -> None:
    if found != first:
        raise TrainerError(
            f"{path}: {field} is {found}, in the first file {first}; "
            "import them as datasets of their own"
        )


def _check_split(split: str) -> None:
    if split not in SPLITS:
        raise TrainerError(f"--split: no `{split}`; use {', '.join(SPLITS)}")


def _by_id(folders: Iterable[Path], prefix: str, suffix: str) -> dict[int, Path]:
    """The files of that suffix by the id in their name; a folder may be missing."""
    name = re.compile(rf"{prefix}_?([0-9]+)\{suffix}")  # CSO_<id> is how the README names them
    found: dict[int, Path] = {}
    for path in chain.from_iterable(map(_files, folders)):
        if path.suffix != suffix:
            continue
        match = name.fullmatch(path.name)
        if match is None:
            raise TrainerError(f"{path}: is not named {prefix}<id>{suffix}; rename or remove it")
        number = int(match[1])
        if number in found:
            raise TrainerError(f"{path}: has the id of {found[number]}; remove one of them")
        found[number] = path
    return found


def _files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    with _reading(folder):
        return sorted(folder.iterdir())


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise TrainerError(f"{path}: cannot be read ({error.strerror}); check it") from error


def _read_image(path: Path) -> NDArray[Any]:
    """(11, 11) uint8 or uint16."""
    with _reading(path):
        png = path.read_bytes()
    if not _is_whole(png):
        raise TrainerError(f"{path}: not a PNG, truncated or damaged; copy it again")
    # The header itself: OpenCV stretches 1 to 4 bits to 8 and turns a palette into colours.
    width, height, bits, colour = struct.unpack_from(">IIBB", png, 16)
    if colour != 0 or bits not in FULL_SCALE:
        kind = f"{bits}-bit {'grey' if colour == 0 else 'colour, palette or alpha'}"
        raise TrainerError(f"{path}: must be an 8- or 16-bit grey PNG, got {kind}; convert it")
    if (width, height) != (SIZE_PX, SIZE_PX):
        raise TrainerError(
            f"{path}: must be {SIZE_PX}×{SIZE_PX} pixels, got {width}×{height}; crop or remove it"
        )
    image = cv2.imdecode(np.frombuffer(png, np.uint8), cv2.IMREAD_UNCHANGED)
    if image is None or image.shape != (SIZE_PX, SIZE_PX):
        raise TrainerError(f"{path}: cannot be decoded as a grey PNG; write it again")
    return image


def _is_whole(png: bytes) -> bool:
    """Whether all chunks are there, up to the end mark, each with the right checksum.

    Checked here because libpng complains on standard error, in words of its own.
    """
    if not png.startswith(b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"):
        return False
    start = 8
    while start + 12 <= len(png):
        length, kind = struct.unpack_from(">I4s", png, start)
        end = start + 12 + length
        if png[end - 4 : end] != struct.pack(">I", zlib.crc32(png[start + 4 : end - 4])):
            return False
        if kind == b"IEND":
            return True
        start = end
    return False


class _TreeBuilder(ElementTree.TreeBuilder):
    """Refuses a DOCTYPE, without which there are no entities to expand and no files to fetch."""

    def doctype(self, _name: str, _public: str | None, _system: str | None) -> None:
        raise TrainerError("has a DOCTYPE, which no annotation needs; remove it")


def _parse(path: Path) -> ElementTree.Element:
    with _reading(path):
        text = path.read_bytes()
    parser = ElementTree.XMLParser(target=_TreeBuilder())
    try:
        parser.feed(text)
        root: ElementTree.Element = parser.close()
    except TrainerError as error:
        raise TrainerError(f"{path}: {error}") from error
    except (ElementTree.ParseError, LookupError, ValueError) as error:  # the latter: its encoding
        raise TrainerError(f"{path}: not well-formed XML ({error}); write it again") from error
    if root.tag != "annotation":
        raise TrainerError(f"{path}: must hold <annotation>, got <{root.tag[:40]}>; replace it")
    return root


def _read_annotation(path: Path) -> Annotation:
    root = _parse(path)
    place = str(path)
    size = _number(place, root, "size/width"), _number(place, root, "size/height")
    if size != (SIZE_PX, SIZE_PX):
        raise TrainerError(
            f"{path}: size is {size[0]:g}×{size[1]:g}, the image is {SIZE_PX}×{SIZE_PX}; correct it"
        )
    objects = root.findall("object")
    if len(objects) > MAX_TARGETS:
        raise TrainerError(
            f"{path}: has {len(objects)} targets, a dataset holds at most {MAX_TARGETS}; "
            "remove some, or the image"
        )
    return Annotation(
        sigma_px=_number(place, root, "sigma"),
        targets=[_target(f"{path}: object {n}", node) for n, node in enumerate(objects, start=1)],
    )


def _target(place: str, node: ElementTree.Element) -> tuple[float, float, float]:
    row = _number(place, node, "coordinate/xc")
    column = _number(place, node, "coordinate/yc")
    return column, row, _number(place, node, "coordinate/brightness")


def _number(place: str, node: ElementTree.Element, field: str) -> float:
    """The number in a field that float32 can hold."""
    text = node.findtext(field)
    if text is None:
        raise TrainerError(f"{place}: {field} is missing; add it")
    try:
        number = float(text)
    except ValueError:
        number = inf
    if not abs(number) <= FLOAT32_MAX:
        raise TrainerError(f"{place}: {field} must be a finite number, got {text[:40]!r}; mend it")
    return number


def _bits(image: NDArray[Any]) -> int:
    return 8 * image.dtype.itemsize


def _counted(items: Sequence[Item], progress: Progress) -> Iterator[tuple[int, Item]]:
    """`enumerate` that tells now and then how many are done."""
    for index, item in enumerate(items):
        yield index, item
        done = index + 1
        if done % PROGRESS_EVERY == 0 or done == len(items):
            progress(done)


# --- writing ---------------------------------------------------------------------------------

_ANNOTATION = """\
<?xml version="1.0" ?>
<annotation>
\t<filename>CSO{number}</filename>
\t<size>
\t\t<width>{size}</width>
\t\t<height>{size}</height>
\t\t<depth>1</depth>
\t</size>
\t<sigma>{sigma_px}</sigma>
{objects}</annotation>
"""
_OBJECT = """\
\t<object>
\t\t<name>Target</name>
\t\t<coordinate>
\t\t\t<xc>{row}</xc>
\t\t\t<yc>{column}</yc>
\t\t\t<brightness>{intensity}</brightness>
\t\t</coordinate>
\t</object>
"""


def write_files(folder: Path, split: str, dataset: CsistDataset, progress: Progress) -> Path:
    """Write a dataset as one split, which must not exist; returns the split's folder.

    Ids count from 0, annotations lie inside the split. progress: called with the number of images
    written. Raises TrainerError; then nothing is left of the split.
    """
    _check_split(split)
    if len(dataset) == 0:
        raise TrainerError(f"{folder / split}: the dataset has no images to write; give another")
    target = np.concatenate([dataset.target_xy_px, dataset.target_intensity[..., None]], axis=-1)
    with _new_folder(folder / split) as new:
        (new / IMAGES).mkdir()
        (new / ANNOTATIONS).mkdir()
        for index, count in _counted(dataset.target_count.tolist(), progress):
            _, png = cv2.imencode(".png", dataset.image[index])
            (new / IMAGES / f"image_{index}.png").write_bytes(png.tobytes())
            text = _annotation(index, dataset.sensor.sigma_px, target[index, :count])
            (new / ANNOTATIONS / f"CSO{index}.xml").write_text(text, encoding="utf-8")
    return folder / split


def refuse_existing(path: Path) -> None:
    """Raise TrainerError if there is something at `path`."""
    if path.exists():
        raise TrainerError(f"{path}: exists already; remove it or choose another name")


@contextmanager
def _new_folder(path: Path) -> Iterator[Path]:
    """A folder to fill; it appears at `path` at the end of the block, or not at all."""
    refuse_existing(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.mkdir(parents=True)
        yield partial
        partial.rename(path)
    except OSError as error:
        raise TrainerError(f"{path}: cannot be written ({error.strerror})") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _annotation(number: int, sigma_px: float, target_K3: NDArray[np.float32]) -> str:
    """The XML of one image; its numbers are the shortest that give the same float32 again."""
    objects = "".join(
        _OBJECT.format(row=row, column=column, intensity=intensity)
        for column, row, intensity in (map(str, target) for target in target_K3)
    )
    return _ANNOTATION.format(number=number, size=SIZE_PX, sigma_px=sigma_px, objects=objects)
