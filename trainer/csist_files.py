"""The original CSIST-100K files, PNG + XML, to and from a dataset.

    DIR/{train,val,test}/cso_img/image_<id>.png           8- or 16-bit grey
    DIR/{train,val,test}/Annotations/CSO<id>.xml          or DIR/Annotations, for all three

Layout and naming: github.com/GrokCV/GrokCSO, README and grokcso/datasets.
"""

import os
import re
import shlex
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from itertools import chain
from math import inf
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np

from pipeline.formats.csist import FORMAT, CsistDataset
from pipeline.physics.groups import MAX_TARGETS, SIZE_PX
from pipeline.physics.sensor import Sensor
from trainer.csist_annotation import format_annotation, parse_annotation
from trainer.csist_image import FULL_SCALE, bits_of, decode_image, encode_image
from trainer.errors import TrainerError

SPLITS = ("train", "val", "test")
IMAGES, ANNOTATIONS = "cso_img", "Annotations"
PROGRESS_EVERY = 256

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
        usual = FULL_SCALE[bits_of(dataset.image)]
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


# --- reading ---------------------------------------------------------------------------------


def split_folder(folder: Path, split: str | None) -> Path:
    """The folder that holds cso_img/ of one split.

    folder: holds the splits. Without `split` it may be a split itself, or else hold just one.
    Raises TrainerError for a folder that is missing, a split of another name, and when it is not
    clear which one is meant.
    """
    if not folder.is_dir():
        raise TrainerError(f"{folder}: no such folder; check the path")
    if split is not None:
        _check_split(split)
        return folder / split
    if (folder / IMAGES).is_dir():
        return folder.resolve()  # whose parent may hold the annotations, also for `.`
    present = [name for name in SPLITS if (folder / name).is_dir()]
    if not present:
        raise TrainerError(
            f"{folder}: holds neither {IMAGES}/ nor {', '.join(SPLITS)}; give a folder that does"
        )
    if len(present) > 1:
        raise TrainerError(f"{folder}: holds {', '.join(present)}; say which with --split")
    return folder / present[0]


def find_pairs(split: Path) -> list[Pair]:
    """The files of one split, by rising id; ids need not be contiguous.

    split: the folder that holds cso_img/. Annotations inside it go before those beside it. Raises
    TrainerError for a folder that is missing or empty, an id given twice, an image without its
    annotation, an annotation without its image.
    """
    images = _images_by_id([split])
    if not images:
        raise TrainerError(
            f"{split / IMAGES}: no image_<id>.png; add images, or give another DIR or --split"
        )
    folder, known = split / ANNOTATIONS, images
    beside = split.parent / ANNOTATIONS
    if beside.is_dir() and not folder.is_dir():
        others = [split.parent / name for name in SPLITS if name != split.name]
        folder, known = beside, _images_by_id([split, *others])
    annotations = _by_id([folder], "CSO", ".xml")
    for number, path in sorted(images.items()):
        if number not in annotations:
            expected = folder / f"CSO{number}.xml"
            raise TrainerError(f"{path}: has no annotation; add {expected}, or remove the image")
    for number, path in sorted(annotations.items()):
        if number not in known:
            expected = split / IMAGES / f"image_{number}.png"
            raise TrainerError(f"{path}: has no image; add {expected}, or remove the annotation")
    return [Pair(path, annotations[number]) for number, path in sorted(images.items())]


def read_pairs(pairs: list[Pair], unwritten: Unwritten, progress: Progress) -> CsistDataset:
    """The dataset of these files, at least one; all must be of one σ and of the same bits.

    Positions and intensities are rounded to float32. progress: called with the number of images
    read. Raises TrainerError naming the file that is wrong.
    """
    first_image = _read(pairs[0].image, decode_image)
    first = _read(pairs[0].annotation, parse_annotation)
    sensor = unwritten.sensor(pairs[0].annotation, first.sigma_px, bits_of(first_image))
    image = np.empty((len(pairs), SIZE_PX, SIZE_PX), first_image.dtype)
    target_count = np.zeros(len(pairs), np.uint8)
    target = np.full((len(pairs), MAX_TARGETS, 3), np.nan, np.float32)
    for index, pair in _counted(pairs, progress):
        found = _read(pair.image, decode_image)
        annotation = _read(pair.annotation, parse_annotation)
        _check_same(pair.image, "bits", bits_of(found), bits_of(image))
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


def _images_by_id(splits: Iterable[Path]) -> dict[int, Path]:
    return _by_id([split / IMAGES for split in splits], "image_", ".png")


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


def _read(path: Path, parse: Callable[[bytes], Item]) -> Item:
    with _reading(path):
        return parse(path.read_bytes())


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Errors of the block name the file."""
    try:
        yield
    except OSError as error:
        raise TrainerError(f"{path}: cannot be read ({error.strerror}); check it") from error
    except TrainerError as error:
        raise TrainerError(f"{path}: {error}") from error


def _counted(items: Sequence[Item], progress: Progress) -> Iterator[tuple[int, Item]]:
    """`enumerate` that tells now and then how many are done."""
    for index, item in enumerate(items):
        yield index, item
        done = index + 1
        if done % PROGRESS_EVERY == 0 or done == len(items):
            progress(done)


# --- writing ---------------------------------------------------------------------------------


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
            png = encode_image(dataset.image[index])
            (new / IMAGES / f"image_{index}.png").write_bytes(png)
            text = format_annotation(index, dataset.sensor.sigma_px, target[index, :count])
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
