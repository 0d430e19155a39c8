"""The XML of one CSIST-100K image: σ and the targets.

`annotation/{filename, size/{width, height, depth}, sigma, object*/{name, coordinate/{xc, yc,
brightness}}}`. There xc is the row and yc the column, px, whole numbers at pixel centres
(github.com/GrokCV/GrokCSO, README and grokcso/datasets). Errors do not name the file; the caller
does.
"""

from math import inf
from typing import NamedTuple
from xml.etree import ElementTree

import numpy as np
from numpy.typing import NDArray

from pipeline.physics.groups import MAX_TARGETS, SIZE_PX
from trainer.errors import TrainerError

FLOAT32_MAX = float(np.finfo(np.float32).max)


class Annotation(NamedTuple):
    """What the XML of one image says."""

    sigma_px: float
    targets: list[tuple[float, float, float]]  # column px, row px, counts


# --- reading ---------------------------------------------------------------------------------


def parse_annotation(text: bytes) -> Annotation:
    """What an XML says; raises TrainerError for a field that is missing or wrong."""
    root = _parse(text)
    size = _number(root, "size/width"), _number(root, "size/height")
    if size != (SIZE_PX, SIZE_PX):
        raise TrainerError(
            f"size is {size[0]:g}×{size[1]:g}, the image is {SIZE_PX}×{SIZE_PX}; correct it"
        )
    objects = root.findall("object")
    if len(objects) > MAX_TARGETS:
        raise TrainerError(
            f"has {len(objects)} targets, a dataset holds at most {MAX_TARGETS}; "
            "remove some, or the image"
        )
    return Annotation(
        sigma_px=_number(root, "sigma"),
        targets=[_target(node, f"object {n}: ") for n, node in enumerate(objects, start=1)],
    )


class _TreeBuilder(ElementTree.TreeBuilder):
    """Refuses a DOCTYPE, without which there are no entities to expand and no files to fetch."""

    def doctype(self, _name: str, _public: str | None, _system: str | None) -> None:
        raise TrainerError("has a DOCTYPE, which no annotation needs; remove it")


def _parse(text: bytes) -> ElementTree.Element:
    parser = ElementTree.XMLParser(target=_TreeBuilder())
    try:
        parser.feed(text)
        root: ElementTree.Element = parser.close()
    except (ElementTree.ParseError, LookupError, ValueError) as error:  # the latter: its encoding
        raise TrainerError(f"not well-formed XML ({error}); write it again") from error
    if root.tag != "annotation":
        raise TrainerError(f"must hold <annotation>, got <{root.tag[:40]}>; replace it")
    return root


def _target(node: ElementTree.Element, place: str) -> tuple[float, float, float]:
    row = _number(node, "coordinate/xc", place)
    column = _number(node, "coordinate/yc", place)
    return column, row, _number(node, "coordinate/brightness", place)


def _number(node: ElementTree.Element, field: str, place: str = "") -> float:
    """The number in a field that float32 can hold; an error names the field after `place`."""
    text = node.findtext(field)
    if text is None:
        raise TrainerError(f"{place}{field} is missing; add it")
    try:
        number = float(text)
    except ValueError:
        number = inf
    if not abs(number) <= FLOAT32_MAX:
        raise TrainerError(f"{place}{field} must be a finite number, got {text[:40]!r}; mend it")
    return number


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


def format_annotation(number: int, sigma_px: float, target_K3: NDArray[np.float32]) -> str:
    """The XML of the image with that id; its numbers are the shortest that come back the same.

    target_K3: column px, row px, counts.
    """
    objects = "".join(
        _OBJECT.format(row=row, column=column, intensity=intensity)
        for column, row, intensity in (map(str, target) for target in target_K3)
    )
    return _ANNOTATION.format(number=number, size=SIZE_PX, sigma_px=sigma_px, objects=objects)
