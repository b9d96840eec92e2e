"""Annotations: what pathologists drew or painted, as a tumour mask.

Input: ASAP XML outlines in level-0 px, or the pixels of a mask image. Output: polygons, and bool masks (rows, cols) at
a reduced scale.

Conventions: a mask pixel is tumour when its centre, level-0 point ((col + 0.5) * downsample, (row + 0.5) * downsample),
lies inside an outline. An outline that crosses itself encloses everything it winds round. Tumour outlines are united,
then exclusions are painted over them, whatever their order in the file. Groups are those of CAMELYON16 and 17.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import ParseError  # what the hardened parser raises too

import numpy as np
from defusedxml.common import DefusedXmlException
from defusedxml.ElementTree import iterparse
from numpy.typing import NDArray

from wsiflow.errors import InputError
from wsiflow.system import faults

TUMOUR_GROUPS = frozenset({"_0", "_1", "tumor", "tumour", "metastases"})
"""Groups whose outlines are tumour, in lower case."""

EXCLUSION_GROUPS = frozenset({"_2", "exclusion", "none", "normal"})
"""Groups whose outlines are cut out of the tumour, in lower case."""

MAX_BYTES = 256 * 2**20
"""A larger XML is refused: the largest of CAMELYON16 are a few MB."""

MAX_POINTS = 4_000_000
"""More points than this are refused."""

NAME_TUMOUR_VALUES = (
    "say which values are tumour, such as evaluation.mask_tumour=[2] in another out= folder"
    " (wsiflow evaluate: --mask-tumour 2)"
)
"""What helps where the values of a mask do not tell."""

OVERHANG_PX = 64
"""How far a point may slip over the slide's edge, level-0 px; farther out the outline is of another slide."""


@dataclass(frozen=True, eq=False)
class TumourOutline:
    """Outlines of one slide.

    Attributes:
        tumour: Polygons of tumour, each float64 (n, 2) of x, y in level-0 px; closed without repeating the first point.
        exclusions: Polygons cut out of the tumour.
        without_area: Names of annotations with one or two points, strays of the mouse that enclose nothing: CAMELYON16
            has one. They are named so that nobody has to wonder.
    """

    tumour: tuple[NDArray[np.float64], ...]
    exclusions: tuple[NDArray[np.float64], ...]
    without_area: tuple[str, ...] = ()


def read_asap(path: Path, *, l0_size_px: tuple[int, int] | None = None) -> TumourOutline:
    """Read the outlines of an ASAP XML file.

    Args:
        path: The file.
        l0_size_px: Width and height of the slide, to refuse the annotation of another one; None where not known.

    Raises:
        InputError: The file is missing, too large, not well-formed or not ASAP's; a group is unknown; a coordinate is
            no number or lies outside the slide.
    """
    tumour: list[NDArray[np.float64]] = []
    exclusions: list[NDArray[np.float64]] = []
    without_area: list[str] = []
    for group, name, polygon in _outlines(path):
        if group.lower() not in TUMOUR_GROUPS | EXCLUSION_GROUPS:
            known = ", ".join(sorted(TUMOUR_GROUPS | EXCLUSION_GROUPS))
            raise InputError(f"annotation {name!r} is of group {group!r}", f"use one of {known}", path=path)
        if l0_size_px is not None:
            _check_inside(polygon, l0_size_px, name, path)
        if len(polygon) < 3:
            without_area.append(name)
        else:
            (tumour if group.lower() in TUMOUR_GROUPS else exclusions).append(polygon)
    return TumourOutline(tuple(tumour), tuple(exclusions), tuple(without_area))


def tumour_mask(outline: TumourOutline, shape: tuple[int, int], *, downsample: int = 32) -> NDArray[np.bool_]:
    """Rasterise outlines; what lies outside the shape is cut off.

    Args:
        outline: Polygons in level-0 px.
        shape: Rows and columns of the mask.
        downsample: Level-0 px per mask px.

    Returns:
        bool (rows, cols), True where a pixel's centre is tumour.
    """
    mask = np.zeros(shape, np.bool_)
    for polygons, value in ((outline.tumour, True), (outline.exclusions, False)):
        for polygon in polygons:
            rows, cols, inside = _filled(polygon / downsample, shape)
            mask[rows, cols][inside] = value
    return mask


def tumour_from_mask(
    values: NDArray[np.uint8], path: Path, *, label: int | None = None, named: Sequence[int] = ()
) -> NDArray[np.bool_]:
    """Tell the tumour of a mask image by the values it is made of.

    {0, 255}: 255 is tumour, as in the challenge. {0, 1}: 1 is tumour, as ASAP writes it, and tissue in a slide that is
    labelled normal. {0, 1, 2}: 2 is tumour and 1 other tissue, as in masks with a tissue class. Anything else, such as
    the 254 of a JPEG, is refused: a mask that has lost its values would lose tumour without a word.

    Args:
        values: uint8 (rows, cols).
        path: Where the values are from, for the message.
        label: The slide's, 0 for normal.
        named: The values that are tumour, where someone has said which; every other value is then none.

    Returns:
        bool (rows, cols).

    Raises:
        InputError: The values fit none of these.
    """
    if named:
        chosen: NDArray[np.bool_] = np.isin(np.arange(256), named)[values]
        return chosen
    found = set(np.flatnonzero(np.bincount(values.ravel(), minlength=256)).tolist())
    for known, tumour in (({0, 255}, 255), ({0, 1}, 2 if label == 0 else 1), ({0, 1, 2}, 2)):
        if found <= known:
            mask: NDArray[np.bool_] = values == tumour
            return mask
    listed = ", ".join(map(str, sorted(found)[:8])) + (", ..." if len(found) > 8 else "")
    remedy = f"write a lossless mask of 0 and 255, of 0 and 1, or of 0, 1 and 2, or {NAME_TUMOUR_VALUES}"
    raise InputError(f"mask values {listed}", remedy, path=path)


def _outlines(path: Path) -> Iterator[tuple[str, str, NDArray[np.float64]]]:
    """Yield group, name and polygon of every annotation.

    Raises:
        InputError: The file cannot be read as ASAP XML.
    """
    remedy = "export the annotation from ASAP again"
    try:
        if (size := path.stat().st_size) > MAX_BYTES:
            raise InputError(f"{size} bytes, at most {MAX_BYTES} are read", "simplify the outlines", path=path)
        with path.open("rb") as file:
            yield from _parsed(iterparse(file, ("start", "end"), forbid_dtd=True), path)
    except DefusedXmlException as error:
        raise InputError(f"XML with a document type or entities ({error})", remedy, path=path) from error
    except (ParseError, LookupError, ValueError) as error:  # the last two: encodings the parser does not know
        raise InputError(f"not well-formed XML ({error})", remedy, path=path) from error
    except OSError as error:
        raise faults.unreadable(error, "the annotation", "correct the path", path=path) from error


def _parsed(events: Iterable[tuple[str, Any]], path: Path) -> Iterator[tuple[str, str, NDArray[np.float64]]]:
    """Follow the parser, forgetting each element once it is used."""
    points: list[tuple[float, float]] = []
    total, root = 0, None
    for event, element in events:
        if event == "start":
            root = _checked_root(element, path) if root is None else root
            continue
        if element.tag == "Coordinate":
            points.append(_point(element, path))
            total += 1
            if total > MAX_POINTS:
                raise InputError(f"more than {MAX_POINTS} points", "simplify the outlines", path=path)
        elif element.tag == "Annotation":
            polygon = np.array(points, np.float64).reshape(-1, 2)
            yield element.get("PartOfGroup", "None"), element.get("Name", ""), polygon
            points = []
        element.clear()


def _checked_root(element: Any, path: Path) -> Any:
    """Return the first element when it is ASAP's."""
    if element.tag != "ASAP_Annotations":
        remedy = "give an annotation saved by ASAP"
        raise InputError(f"the XML is a {element.tag!r}, expected 'ASAP_Annotations'", remedy, path=path)
    return element


def _point(element: Any, path: Path) -> tuple[float, float]:
    """Return x, y of a coordinate."""
    try:
        x, y = float(element.attrib["X"]), float(element.attrib["Y"])
    except (KeyError, ValueError) as error:
        raise InputError(f"coordinate {dict(element.attrib)}", "write X and Y as in 12.5", path=path) from error
    if not (math.isfinite(x) and math.isfinite(y)):
        raise InputError(f"coordinate X={x} Y={y}", "write finite numbers", path=path)
    return x, y


def _check_inside(polygon: NDArray[np.float64], l0_size_px: tuple[int, int], name: str, path: Path) -> None:
    """Refuse an outline beyond the slide's edge."""
    beyond = ((polygon < -OVERHANG_PX) | (polygon > np.array(l0_size_px) + OVERHANG_PX)).any(axis=1)
    if beyond.any():
        x, y = polygon[beyond][0].tolist()
        cause = f"annotation {name!r} has the point {x:g}, {y:g}, the slide is {l0_size_px[0]} x {l0_size_px[1]} px"
        raise InputError(cause, "give the annotation of this slide, in level-0 px", path=path)


def _filled(m_polygon: NDArray[np.float64], shape: tuple[int, int]) -> tuple[slice, slice, NDArray[np.bool_]]:
    """Return the rows and columns of a window and the pixels in it whose centres a polygon winds round.

    Every edge adds its direction, +1 or -1, to the pixels right of it in each row whose centre line it crosses; the sum
    is the winding number.
    """
    p = m_polygon - 0.5  # now pixel (row, col) has its centre at y = row, x = col
    first, last = np.ceil(p.min(axis=0)), np.ceil(p.max(axis=0))
    (col0, row0), (col1, row1) = (np.clip(corner, 0, shape[::-1]).astype(np.int64).tolist() for corner in (first, last))
    window = slice(row0, row1), slice(col0, col1)
    if row0 == row1 or col0 == col1:
        return *window, np.zeros((row1 - row0, col1 - col0), np.bool_)
    rows, x, direction = _crossings(p, row0, row1)
    cols = np.clip(np.ceil(x), col0, col1).astype(np.int64) - col0
    width = col1 - col0 + 1
    turns = np.bincount((rows - row0) * width + cols, direction, (row1 - row0) * width).reshape(-1, width)
    return *window, np.cumsum(turns[:, :-1], axis=1) != 0


def _crossings(
    p: NDArray[np.float64], row0: int, row1: int
) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.int64]]:
    """Return row, x and direction of every crossing of an edge with a centre line between two rows.

    An edge reaches from its upper end, included, to its lower end, excluded, so that a shared corner is crossed once.
    """
    start, end = p, np.roll(p, -1, axis=0)
    upper, lower = np.minimum(start[:, 1], end[:, 1]), np.maximum(start[:, 1], end[:, 1])
    top, bottom = (np.clip(np.ceil(y), row0, row1).astype(np.int64) for y in (upper, lower))
    spans = bottom - top
    edge = np.repeat(np.arange(len(p)), spans)
    rows = np.arange(len(edge)) - np.repeat(np.cumsum(spans) - spans, spans) + top[edge]
    (x0, y0), (x1, y1) = start[edge].T, end[edge].T
    return rows, x0 + (rows - y0) * (x1 - x0) / (y1 - y0), np.sign(y1 - y0).astype(np.int64)
