"""Annotations by pathologists, outlines or mask images, converted to tumour masks.

Input: ASAP XML outlines in level-0 px, or the pixels of a mask image. Output: polygons, and bool masks (rows, cols) at
a reduced scale.

Conventions: a mask pixel is tumour when its centre, level-0 point ((col + 0.5) * downsample, (row + 0.5) * downsample),
lies inside an outline. An outline that crosses itself encloses every point with a winding number other than 0. Tumour
outlines are united, and exclusions are then cut out, whatever their order in the file. Groups are those of CAMELYON16
and CAMELYON17.
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
"""Annotation groups, in lower case, whose outlines enclose tumour."""

EXCLUSION_GROUPS = frozenset({"_2", "exclusion", "none", "normal"})
"""Annotation groups, in lower case, whose outlines are cut out of the tumour."""

MAX_BYTES = 256 * 2**20
"""Maximum size of an XML file; the largest of CAMELYON16 have a few MB."""

MAX_POINTS = 4_000_000
"""Maximum number of points of an XML file."""

NAME_TUMOUR_VALUES = (
    "set which values are tumour, for example evaluation.mask_tumour=[2] in another out= folder"
    " (wsiflow evaluate: --mask-tumour 2)"
)
"""The remedy where the values of a mask do not show which of them are tumour."""

OVERHANG_PX = 64
"""How far a point may lie outside the slide, level-0 px; an outline that is farther out belongs to another slide."""


@dataclass(frozen=True, eq=False)
class TumourOutline:
    """The tumour outlines of one slide.

    Attributes:
        tumour: Polygons of tumour, each float64 (n, 2) of x, y in level-0 px. They are closed, but their first point is
            not repeated.
        exclusions: Polygons that are cut out of the tumour, in the same form.
        without_area: Names of annotations with one or two points, which enclose nothing, such as accidental clicks
            (CAMELYON16 has one). They are not in the mask, but can be reported.
    """

    tumour: tuple[NDArray[np.float64], ...]
    exclusions: tuple[NDArray[np.float64], ...]
    without_area: tuple[str, ...] = ()


def read_asap(path: Path, *, l0_size_px: tuple[int, int] | None = None) -> TumourOutline:
    """Read the outlines of an ASAP XML file.

    Args:
        path: The file.
        l0_size_px: Width and height of the slide at level 0, used to refuse the annotation of another slide; None where
            they are unknown.

    Raises:
        InputError: The file is missing, too large, not well-formed XML or not from ASAP; a group is unknown; or a
            coordinate is not a number or lies outside the slide.
        EnvironmentFault: The system refuses to read the file.
    """
    tumour: list[NDArray[np.float64]] = []
    exclusions: list[NDArray[np.float64]] = []
    without_area: list[str] = []
    for group, name, polygon in _outlines(path):
        if group.lower() not in TUMOUR_GROUPS | EXCLUSION_GROUPS:
            known = ", ".join(sorted(TUMOUR_GROUPS | EXCLUSION_GROUPS))
            cause = f"annotation {name!r} has the unknown group {group!r}"
            raise InputError(cause, f"use one of {known}", path=path)
        if l0_size_px is not None:
            _check_inside(polygon, l0_size_px, name, path)
        if len(polygon) < 3:
            without_area.append(name)
        else:
            (tumour if group.lower() in TUMOUR_GROUPS else exclusions).append(polygon)
    return TumourOutline(tuple(tumour), tuple(exclusions), tuple(without_area))


def tumour_mask(outline: TumourOutline, shape: tuple[int, int], *, downsample: int = 32) -> NDArray[np.bool_]:
    """Rasterise outlines to a tumour mask; the parts of outlines outside the mask are cut off.

    Args:
        outline: Polygons in level-0 px.
        shape: Number of rows and columns of the mask.
        downsample: Level-0 px per mask px.

    Returns:
        bool (rows, cols), True where the centre of a pixel is tumour.
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
    """Return the tumour mask of a mask image, whose set of values shows which value is tumour.

    {0, 255}: 255 is tumour, as in the CAMELYON16 challenge. {0, 1}: 1 is tumour, as ASAP writes it; in a slide that is
    labelled normal it is tissue. {0, 1, 2}: 2 is tumour and 1 is other tissue, as in masks with a tissue class. Any
    other set is refused: in a mask with values such as the 254 of a JPEG, tumour would be lost without notice.

    Args:
        values: uint8 (rows, cols), the pixels of the mask image.
        path: File of the mask image, for messages.
        label: Label of the slide, 0 for normal; None where it is unknown.
        named: The values that the user declares to be tumour; all other values are then not tumour.

    Returns:
        bool (rows, cols).

    Raises:
        InputError: The image has another set of values.
    """
    if named:
        chosen: NDArray[np.bool_] = np.isin(np.arange(256), named)[values]
        return chosen
    present = set(np.flatnonzero(np.bincount(values.ravel(), minlength=256)).tolist())
    for known, tumour in (({0, 255}, 255), ({0, 1}, 2 if label == 0 else 1), ({0, 1, 2}, 2)):
        if present <= known:
            mask: NDArray[np.bool_] = values == tumour
            return mask
    listed = ", ".join(map(str, sorted(present)[:8])) + (", ..." if len(present) > 8 else "")
    remedy = f"write a lossless mask of 0 and 255, of 0 and 1, or of 0, 1 and 2, or {NAME_TUMOUR_VALUES}"
    raise InputError(f"the mask has the values {listed}", remedy, path=path)


def _outlines(path: Path) -> Iterator[tuple[str, str, NDArray[np.float64]]]:
    """Yield the group, name and polygon, float64 (n, 2) in level-0 px, of every annotation of a file.

    Raises:
        InputError: The file cannot be read as ASAP XML.
    """
    remedy = "export the annotation from ASAP again"
    try:
        if (size := path.stat().st_size) > MAX_BYTES:
            cause = f"the annotation has {size} bytes, at most {MAX_BYTES} are allowed"
            raise InputError(cause, "simplify the outlines", path=path)
        with path.open("rb") as file:
            yield from _parsed(iterparse(file, ("start", "end"), forbid_dtd=True), path)
    except DefusedXmlException as error:
        raise InputError(f"the XML has a document type or entities ({error})", remedy, path=path) from error
    except (ParseError, LookupError, ValueError) as error:  # the last two for encodings that the parser does not know
        raise InputError(f"the annotation is not well-formed XML ({error})", remedy, path=path) from error
    except OSError as error:
        raise faults.unreadable(error, "the annotation", "correct the path", path=path) from error


def _parsed(events: Iterable[tuple[str, Any]], path: Path) -> Iterator[tuple[str, str, NDArray[np.float64]]]:
    """Yield the annotations from the parser's events; each element is cleared after use, to free its memory."""
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
                raise InputError(f"the outlines have more than {MAX_POINTS} points", "simplify them", path=path)
        elif element.tag == "Annotation":
            polygon = np.array(points, np.float64).reshape(-1, 2)
            yield element.get("PartOfGroup", "None"), element.get("Name", ""), polygon
            points = []
        element.clear()


def _checked_root(element: Any, path: Path) -> Any:
    """Return the root element; raise InputError if it is not that of ASAP."""
    if element.tag != "ASAP_Annotations":
        remedy = "give an annotation saved by ASAP"
        raise InputError(f"the root element is {element.tag!r}, expected 'ASAP_Annotations'", remedy, path=path)
    return element


def _point(element: Any, path: Path) -> tuple[float, float]:
    """Return the x, y of a coordinate element, level-0 px; raise InputError if they are not finite numbers."""
    try:
        x, y = float(element.attrib["X"]), float(element.attrib["Y"])
    except (KeyError, ValueError) as error:
        cause = f"the coordinate {dict(element.attrib)} does not have numbers X and Y"
        raise InputError(cause, "write X and Y as in 12.5", path=path) from error
    if not (math.isfinite(x) and math.isfinite(y)):
        raise InputError(f"the coordinate X={x} Y={y} is not finite", "write finite numbers", path=path)
    return x, y


def _check_inside(polygon: NDArray[np.float64], l0_size_px: tuple[int, int], name: str, path: Path) -> None:
    """Refuse an outline that reaches farther than `OVERHANG_PX` outside the slide."""
    outside = ((polygon < -OVERHANG_PX) | (polygon > np.array(l0_size_px) + OVERHANG_PX)).any(axis=1)
    if outside.any():
        x, y = polygon[outside][0].tolist()
        size = f"{l0_size_px[0]} x {l0_size_px[1]} px"
        cause = f"annotation {name!r} has the point {x:g}, {y:g}, but the slide has {size}"
        raise InputError(cause, "give the annotation of this slide, in level-0 px", path=path)


def _filled(m_polygon: NDArray[np.float64], shape: tuple[int, int]) -> tuple[slice, slice, NDArray[np.bool_]]:
    """Return the pixels whose centres are inside a polygon: slices of rows and columns, and a mask of that window.

    Every edge adds its direction, +1 or -1, to all pixels to its right in each row whose centre line it crosses. The
    sum for a pixel is its winding number, which is not 0 inside the polygon.
    """
    p = m_polygon - 0.5  # so that the centre of pixel (row, col) is at y = row, x = col
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
    """Return the row, x and direction of every crossing of an edge with the centre line of a row from row0 to row1 - 1.

    An edge includes its upper end and excludes its lower end, so that a corner of two edges is crossed once.
    """
    start, end = p, np.roll(p, -1, axis=0)
    upper, lower = np.minimum(start[:, 1], end[:, 1]), np.maximum(start[:, 1], end[:, 1])
    top, bottom = (np.clip(np.ceil(y), row0, row1).astype(np.int64) for y in (upper, lower))
    spans = bottom - top
    edge = np.repeat(np.arange(len(p)), spans)
    rows = np.arange(len(edge)) - np.repeat(np.cumsum(spans) - spans, spans) + top[edge]
    (x0, y0), (x1, y1) = start[edge].T, end[edge].T
    return rows, x0 + (rows - y0) * (x1 - x0) / (y1 - y0), np.sign(y1 - y0).astype(np.int64)
