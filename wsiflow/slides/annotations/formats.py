"""The formats of annotations, and how a file of any of them is read.

A format is recognised by what a file holds, not by its name. To add one: a file that ends in a `Format`, and a line in
`FORMATS`.
"""

import codecs
import dataclasses
from contextlib import closing
from pathlib import Path

import numpy as np

from wsiflow.errors import InputError
from wsiflow.slides.annotations import asap, geojson, imagescope, ndpa, xml_file
from wsiflow.slides.annotations.outlines import Drawing, Format, NoArea, Origin, Outline, SlidePlace, Syntax
from wsiflow.system import faults

FORMATS: tuple[Format, ...] = (asap.FORMAT, imagescope.FORMAT, ndpa.FORMAT, geojson.FORMAT)
"""All formats."""

_BLANK = b" \t\r\n\0"
_IMAGE = "image"
_IMAGES = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+", b"\x89PNG", b"\xff\xd8\xff", b"BM")


def read(path: Path, slide: SlidePlace = SlidePlace(), *, origin: Origin | None = None) -> Drawing:  # noqa: B008
    """Read the annotations of a file of any known format.

    Args:
        path: The file.
        slide: What is known of the slide that was annotated.
        origin: Where coordinates count from; None for what the format usually does.

    Returns:
        The annotations, in level-0 px of the slide.

    Raises:
        InputError: The file is missing, of no known format or damaged; or it cannot be placed without the slide.
        EnvironmentFault: The system refuses to read the file.
    """
    form = format_of(path)
    items = list(form.read(path, slide))
    areas = [one for one in items if isinstance(one, Outline)]
    if (origin or form.origin) == "bounds":
        areas = _from_bounds(areas, slide, form, path)
    return Drawing(tuple(areas), tuple(one for one in items if isinstance(one, NoArea)), form.name)


def format_of(path: Path) -> Format:
    """Return the format of a file.

    Raises:
        InputError: The file is missing, or of no known format.
        EnvironmentFault: The system refuses to read the file.
    """
    syntax = _syntax(path)
    if syntax.root == _IMAGE:
        remedy = "give a mask image as mask_path, and outlines as annotation_path"
        raise InputError("the annotation is an image", remedy, path=path)
    known = next((form for form in FORMATS if form.recognises(syntax)), None)
    if known is None:
        what = f"its root element is {syntax.root!r}" if syntax.root else "it is neither XML nor JSON"
        names = ", ".join(form.name for form in FORMATS)
        raise InputError(f"the annotation is of no known format: {what}", f"give one of {names}", path=path)
    return known


def _syntax(path: Path) -> Syntax:
    """Return how a file begins."""
    try:
        with path.open("rb") as file:
            start = file.read(4096)
    except OSError as error:
        raise faults.unreadable(error, "the annotation", "correct the path", path=path) from error
    if start.startswith(_IMAGES):
        return Syntax("", _IMAGE)
    # UTF-16, which some programs write, has a zero in each letter of the markup.
    text = start.removeprefix(codecs.BOM_UTF8).removeprefix(codecs.BOM_UTF16_LE).removeprefix(codecs.BOM_UTF16_BE)
    first = text.lstrip(_BLANK)[:1]
    if first == b"<":
        with closing(xml_file.events(path, "export the annotation again")) as events:
            _, root = next(events)
        return Syntax("xml", root.tag)
    return Syntax("json") if first in {b"{", b"["} else Syntax("")


def _from_bounds(areas: list[Outline], slide: SlidePlace, form: Format, path: Path) -> list[Outline]:
    """Return outlines that count from the corner of the scanned area in level-0 px.

    Raises:
        InputError: That corner is not known.
    """
    if slide.l0_bounds_corner is None:
        cause = f"{form.name} counts from the corner of the scanned area, which only the slide states"
        raise InputError(cause, "give the slide beside it, or set evaluation.outline_origin=slide", path=path)
    shift = np.array(slide.l0_bounds_corner, np.float64)
    if not shift.any():
        return areas
    return [
        dataclasses.replace(one, polygon=one.polygon + shift, holes=tuple(hole + shift for hole in one.holes))
        for one in areas
    ]
