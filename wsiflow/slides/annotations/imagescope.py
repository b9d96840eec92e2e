"""The XML of Aperio ImageScope and of HALO, whose ``.annotations`` have the same form with other words.

Coordinates count from the corner of level 0, also where the slide states bounds. A layer (``Annotation``) is the group
of its regions; ImageScope may keep its name in an attribute. ``NegativeROA`` marks a hole, in every region of the layer
that it lies in. Rectangles of two points and ellipses are stated by their box; arrows, rulers and pins enclose nothing.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from wsiflow.slides.annotations import fill, xml_file
from wsiflow.slides.annotations.outlines import (
    Format,
    NoArea,
    Outline,
    Polygon,
    SlidePlace,
    as_outline,
    ellipse,
    rectangle,
)

# ImageScope numbers its types, HALO names them.
_AREAS = {"": "polygon", "0": "polygon", "1": "rectangle", "2": "ellipse", "polygon": "polygon", "freehand": "polygon"}
_AREAS |= {"rectangle": "rectangle", "ellipse": "ellipse", "circle": "ellipse"}
_KINDS = {"3": "arrow", "4": "ruler", "5": "counter"}
_UNNAMED = re.compile(r"(layer|annotation|region)?\s*\d*", re.IGNORECASE)


@dataclass
class _Region:
    """A region while it is read."""

    attributes: dict[str, str]
    points: list[tuple[float, float]] = field(default_factory=list)


@dataclass
class _Layer:
    """A layer while it is read: its attributes, the texts of its attributes, its regions, and the one that is read."""

    attributes: dict[str, str]
    texts: list[str] = field(default_factory=list)
    regions: list[_Region] = field(default_factory=list)
    open: _Region | None = None


def read(path: Path, _slide: SlidePlace) -> Iterator[Outline | NoArea]:
    """Yield the annotations of a file.

    Raises:
        InputError: The file is not well-formed, or a coordinate is not a number.
        EnvironmentFault: The system refuses to read the file.
    """
    layer, total = _Layer({}), 0
    for event, element in xml_file.events(path, "export the annotation again"):
        if event == "start":
            if element.tag == "Annotation":
                yield from _of_layer(layer)
                layer = _Layer(dict(element.attrib))
            elif element.tag == "Region":
                layer.open = _Region(dict(element.attrib))
            continue
        if element.tag in {"Vertex", "V"}:
            total += 1
            xml_file.require_points(total, path)
        _add(layer, element, path)
        element.clear()  # this frees its memory
    yield from _of_layer(layer)


def _add(layer: _Layer, element: Any, path: Path) -> None:
    """Add an element that has ended to its layer."""
    region = layer.open
    if region is None:
        layer.texts += _texts(element) if element.tag == "Attribute" else []
    elif element.tag in {"Vertex", "V"}:
        region.points.append(xml_file.point(element.get("X"), element.get("Y"), path))
    elif element.tag == "Region":
        layer.regions.append(region)
        layer.open = None


def _texts(element: Any) -> list[str]:
    """Return what an attribute of a layer says: its value where it is a description, else its name."""
    name, value = element.get("Name", "").strip(), element.get("Value", "").strip()
    return [text for text in (value, "" if name.lower() == "description" else name) if text]


def _of_layer(layer: _Layer) -> Iterator[Outline | NoArea]:
    """Yield the annotations of a layer, with its holes where they belong."""
    group = layer.attributes.get("Name", "").strip()
    hints = (*([] if group and not _UNNAMED.fullmatch(group) else layer.texts),)
    group = "" if _UNNAMED.fullmatch(group) else group
    if not group and hints and not _UNNAMED.fullmatch(hints[0]):
        group, hints = hints[0], hints[1:]
    areas, holes = list[tuple[_Region, Polygon]](), list[tuple[_Region, Polygon]]()
    for number, region in enumerate(layer.regions, start=1):
        region.attributes.setdefault("Id", str(number))
        shape = _shape(region)
        if isinstance(shape, str):
            yield NoArea(_name(region, layer), shape)
        elif region.attributes.get("NegativeROA", "0").strip().lower() in {"1", "true"}:
            holes.append((region, shape))
        else:
            areas.append((region, shape))
    if not areas:
        yield from (NoArea(_name(region, layer), "negative region") for region, _ in holes)
    inside = _placed([polygon for _, polygon in areas], [hole for _, hole in holes if len(hole) >= 3])
    for (region, polygon), own in zip(areas, inside, strict=True):
        text = region.attributes.get("Text", "").strip()
        yield as_outline(_name(region, layer), group, polygon, holes=tuple(own), hints=(text, *hints))


def _name(region: _Region, layer: _Layer) -> str:
    own = region.attributes.get("Text", "").strip() or f"region {region.attributes['Id']}"
    return " of ".join(filter(None, (own, layer.attributes.get("Name", "").strip())))


def _shape(region: _Region) -> Polygon | str:
    """Return the polygon of a region, or what it is where it encloses nothing."""
    kind = region.attributes.get("Type", "").strip().lower()
    if kind not in _AREAS:
        return _KINDS.get(kind, region.attributes.get("Type", ""))
    polygon = np.array(region.points, np.float64).reshape(-1, 2)
    if _AREAS[kind] == "ellipse" and len(polygon) >= 2:
        return ellipse(polygon)
    return rectangle(polygon) if _AREAS[kind] == "rectangle" and len(polygon) == 2 else polygon


def _placed(polygons: list[Polygon], holes: list[Polygon]) -> list[list[Polygon]]:
    """Return the holes of each polygon: those that lie in it; one that lies in none is cut from all that it meets."""
    placed: list[list[Polygon]] = [[] for _ in polygons]
    for hole in holes:
        around = [index for index, one in enumerate(polygons) if len(one) >= 3 and fill.share_within(hole, one) > 0.5]
        for index in around or range(len(polygons)):
            placed[index].append(hole)
    return placed


FORMAT = Format("ImageScope or HALO XML", lambda syntax: syntax == ("xml", "Annotations"), read)
