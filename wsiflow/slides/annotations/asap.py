"""ASAP's XML, the format of CAMELYON16 and CAMELYON17.

Coordinates count from the corner of level 0, also where the slide states bounds. Polygons, rectangles and splines are
areas; a spline is the polygon through its points, as in the masks that ASAP itself writes. Dots, point sets and
measurements enclose nothing. Points follow their ``Order`` where every one has its own.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from wsiflow.errors import InputError
from wsiflow.slides.annotations import xml_file
from wsiflow.slides.annotations.outlines import Format, NoArea, Outline, Polygon, SlidePlace, as_outline, rectangle

_ROOT = "ASAP_Annotations"
_AREAS = {"", "polygon", "rectangle", "spline"}


def read(path: Path, _slide: SlidePlace) -> Iterator[Outline | NoArea]:
    """Yield the annotations of a file.

    Raises:
        InputError: The file is not ASAP's, not well-formed, or a coordinate is not a number.
        EnvironmentFault: The system refuses to read the file.
    """
    coordinates: list[tuple[str, float, float]] = []
    total, root = 0, None
    for event, element in xml_file.events(path, "export the annotation from ASAP again"):
        if event == "start":
            root = _checked_root(element, path) if root is None else root
            continue
        if element.tag == "Coordinate":
            coordinates.append(
                (element.get("Order", ""), *xml_file.point(element.get("X"), element.get("Y"), path)),
            )
            total += 1
            xml_file.require_points(total, path)
        elif element.tag == "Annotation":
            yield _annotation(element, _in_order(coordinates))
            coordinates = []
        element.clear()  # this frees its memory


def _checked_root(element: Any, path: Path) -> Any:
    """Return the root element; raise InputError if it is not that of ASAP."""
    if element.tag != _ROOT:
        remedy = "give an annotation saved by ASAP"
        raise InputError(f"the root element is {element.tag!r}, expected {_ROOT!r}", remedy, path=path)
    return element


def _annotation(element: Any, polygon: Polygon) -> Outline | NoArea:
    name, kind = element.get("Name", ""), element.get("Type", "")
    if kind.lower() not in _AREAS:
        return NoArea(name, kind)
    if kind.lower() == "rectangle" and len(polygon) == 2:
        polygon = rectangle(polygon)
    return as_outline(name, element.get("PartOfGroup", "None"), polygon)


def _in_order(coordinates: list[tuple[str, float, float]]) -> Polygon:
    """Return the points in the order that they state, or in that of the file where they do not state one."""
    polygon = np.array([pair for _, *pair in coordinates], np.float64).reshape(-1, 2)
    try:
        order = [float(place) for place, _, _ in coordinates]
    except ValueError:
        return polygon
    return polygon[np.argsort(order, kind="stable")] if len(set(order)) == len(order) else polygon


FORMAT = Format("ASAP XML", lambda syntax: syntax == ("xml", _ROOT), read)
