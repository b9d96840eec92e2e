"""Hamamatsu's NDPA: outlines in nanometres from the centre of the glass, which need the slide to become pixels.

The centre of the image lies ``XOffsetFromSlideCentre`` and ``YOffsetFromSlideCentre`` from there, as the slide states.
Closed freehand outlines and circles are areas; open lines, pins, pointers, texts and rulers enclose nothing. An outline
has no group but a title, by which it is recognised.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from wsiflow.errors import InputError
from wsiflow.slides.annotations import xml_file
from wsiflow.slides.annotations.outlines import Format, NoArea, Outline, Polygon, SlidePlace, as_outline, ellipse

_REMEDY = "save the annotation in NDP.view again"


def read(path: Path, slide: SlidePlace) -> Iterator[Outline | NoArea]:
    """Yield the annotations of a file.

    Raises:
        InputError: The file is not well-formed, a coordinate is not a number, or the slide does not state its place.
        EnvironmentFault: The system refuses to read the file.
    """
    for event, element in xml_file.events(path, _REMEDY):
        if event == "end" and element.tag == "ndpviewstate":
            yield _annotation(element, slide, path)
            element.clear()  # this frees its memory


def _annotation(view: Any, slide: SlidePlace, path: Path) -> Outline | NoArea:
    title = (view.findtext("title") or "").strip()
    name = title or f"annotation {view.get('id', '')}".rstrip()
    drawn = view.find("annotation")
    if drawn is None:
        return NoArea(name, "no annotation")
    kind = drawn.get("type", "").lower()
    if kind == "circle":
        x, y = xml_file.point(drawn.findtext("x"), drawn.findtext("y"), path)
        radius, _ = xml_file.point(drawn.findtext("radius"), "0", path)
        polygon = ellipse(np.array([(x - radius, y - radius), (x + radius, y + radius)]))
    elif _is_closed(drawn, kind):
        listed = drawn.findall("pointlist/point")
        xml_file.require_points(len(listed), path)
        pairs = [xml_file.point(one.findtext("x"), one.findtext("y"), path) for one in listed]
        polygon = np.array(pairs, np.float64).reshape(-1, 2)
    else:
        return NoArea(name, drawn.get("displayname", kind).removeprefix("Annotate").lower() or "line")
    placed = _l0_from(polygon, (view.findtext("coordformat") or "nanometers").strip().lower(), slide, path)
    return as_outline(name, "", placed, hints=(title, (view.findtext("details") or "").strip()))


def _is_closed(drawn: Any, kind: str) -> bool:
    """Tell whether an annotation is a closed outline."""
    closed = (drawn.findtext("closed") or "1").strip()
    return drawn.find("pointlist") is not None and closed != "0" and not kind.endswith("line")


def _l0_from(polygon: Polygon, unit: str, slide: SlidePlace, path: Path) -> Polygon:
    """Return a polygon in level-0 px.

    Raises:
        InputError: The unit is not known, or the slide does not state what is needed.
    """
    if unit in {"pixels", "pixel"}:
        return polygon
    if unit not in {"nanometers", "nanometres"}:
        raise InputError(f"the outlines are in {unit!r}, expected 'nanometers'", _REMEDY, path=path)
    if slide.l0_size_px is None or slide.mpp is None or slide.centre_offset_nm is None:
        cause = (
            "the outlines are in nanometres from the centre of the glass, and the slide does not state where it lies"
        )
        remedy = "give it beside its own slide of Hamamatsu (.ndpi, .vms), or export outlines in level-0 px"
        raise InputError(cause, remedy, path=path)
    nm_px, size = 1000 * np.array(slide.mpp), np.array(slide.l0_size_px)
    return np.asarray((polygon - np.array(slide.centre_offset_nm)) / nm_px + size / 2, np.float64)


FORMAT = Format("Hamamatsu NDPA", lambda syntax: syntax == ("xml", "annotations"), read, needs_slide=True)
