"""What a file of annotations holds once it is read: outlines in level-0 px, with their groups and names.

Every format has a file of its own beside this one, which ends in a `Format`; `wsiflow.slides.annotations.formats` lists
them. A format reads its file in the plane that it counts in, and says which plane that is.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

Polygon = NDArray[np.float64]
"""float64 (n, 2) of x, y in level-0 px; it is closed, but the first point is not repeated."""

COMPANION_SUFFIXES = (".xml", ".XML", ".geojson", ".annotations", ".annotation", ".ndpa")
"""Extensions by which the annotation of a slide is found beside it."""

Origin = Literal["slide", "bounds"]
"""Where a format counts from: the corner of level 0, or that of the scanned area, which some viewers crop to."""


@dataclass(frozen=True, eq=False)
class Outline:
    """An annotated area.

    Attributes:
        name: Name of the annotation, for messages.
        group: Name of its group, class or layer as the file states it; empty where there is none.
        polygon: Its outline. Where it crosses itself, it encloses every point with a winding number other than 0.
        holes: Outlines of the holes in it.
        hints: Other texts that may say what it encloses, such as a title.
    """

    name: str
    group: str
    polygon: Polygon
    holes: tuple[Polygon, ...] = ()
    hints: tuple[str, ...] = ()


class NoArea(NamedTuple):
    """An annotation that encloses nothing, such as a point: its name, which is told, and what it is."""

    name: str
    kind: str

    def __str__(self) -> str:
        """Return the name, with what it is where that is not an outline of too few points."""
        return f"{self.name} ({self.kind})" if self.kind else self.name


@dataclass(frozen=True)
class Drawing:
    """The annotations of a file.

    Attributes:
        outlines: The areas, in level-0 px of the slide, in the order of the file.
        without_area: The annotations that enclose nothing.
        format: Name of the file's format.
    """

    outlines: tuple[Outline, ...] = ()
    without_area: tuple[NoArea, ...] = ()
    format: str = ""


@dataclass(frozen=True)
class SlidePlace:
    """What readers of annotations need to know about the slide that was annotated; None where it is not known.

    Attributes:
        l0_size_px: Width and height of level 0.
        l0_bounds_corner: Level-0 x, y of the top-left corner of the scanned area; (0, 0) where the slide states none.
        mpp: Micrometres per level-0 pixel along x and y, as the slide states them.
        centre_offset_nm: Where the centre of the image lies from the centre of the glass, nm; Hamamatsu states it.
    """

    l0_size_px: tuple[int, int] | None = None
    l0_bounds_corner: tuple[int, int] | None = None
    mpp: tuple[float, float] | None = None
    centre_offset_nm: tuple[float, float] | None = None


class Syntax(NamedTuple):
    """How a file begins: ``xml`` with the tag of its root, ``json``, or neither."""

    kind: Literal["xml", "json", ""]
    root: str = ""


@dataclass(frozen=True)
class Format:
    """A format of annotations.

    Attributes:
        name: What it is called in messages.
        recognises: Tells by the beginning of a file whether it is of this format.
        read: Yields the annotations of a file, in the plane of the format.
        origin: Where that plane begins.
        needs_slide: Whether the file cannot be read, or not be placed, without the slide.
    """

    name: str
    recognises: Callable[[Syntax], bool]
    read: Callable[[Path, SlidePlace], Iterator[Outline | NoArea]]
    origin: Origin = "slide"
    needs_slide: bool = field(default=False)


def as_outline(
    name: str, group: str, polygon: Polygon, *, holes: tuple[Polygon, ...] = (), hints: tuple[str, ...] = ()
) -> Outline | NoArea:
    """Return an annotation of a polygon; one of fewer than three points encloses nothing."""
    polygon = opened(polygon)
    if len(polygon) < 3:
        return NoArea(name, "")
    kept = tuple(ring for ring in map(opened, holes) if len(ring) >= 3)
    return Outline(name, group, polygon, kept, tuple(filter(None, hints)))


def opened(ring: Polygon) -> Polygon:
    """Return a ring without its last point where that repeats the first."""
    return ring[:-1] if len(ring) > 3 and np.array_equal(ring[0], ring[-1]) else ring


def points(values: object) -> Polygon:
    """Return pairs of numbers as a polygon.

    Raises:
        ValueError: They are no pairs of numbers.
    """
    array = np.array(values, np.float64)
    if array.size == 0:
        return np.empty((0, 2))
    if array.ndim != 2 or array.shape[1] < 2:
        raise ValueError("the coordinates are not pairs of numbers")
    return array[:, :2]


def rectangle(corners: Polygon) -> Polygon:
    """Return the rectangle around some points."""
    (x0, y0), (x1, y1) = corners.min(axis=0), corners.max(axis=0)
    return np.array([(x0, y0), (x1, y0), (x1, y1), (x0, y1)])


def ellipse(corners: Polygon, *, sides: int = 180) -> Polygon:
    """Return the ellipse that fills the rectangle around some points, as a polygon."""
    low, high = corners.min(axis=0), corners.max(axis=0)
    turn = np.linspace(0, 2 * np.pi, sides, endpoint=False)
    around: Polygon = (low + high) / 2 + (high - low) / 2 * np.column_stack([np.cos(turn), np.sin(turn)])
    return around
