"""Fill outlines: which pixels of a mask lie inside.

A pixel belongs to an outline when its centre, level-0 point ((col + 0.5) * downsample, (row + 0.5) * downsample), lies
inside. An outline that crosses itself encloses every point with a winding number other than 0. Outlines are united; a
hole is cut out of its own outline only.
"""

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from wsiflow.slides.annotations.outlines import Outline, Polygon

_SIDE = 256  # of the grid on which shares of an area are counted


def painted(outlines: Iterable[Outline], shape: tuple[int, int], *, downsample: float) -> NDArray[np.bool_]:
    """Return which pixels of a mask lie inside outlines; the parts of outlines outside the mask are cut off.

    Args:
        outlines: Outlines in level-0 px.
        shape: Number of rows and columns of the mask.
        downsample: Level-0 px per mask px.

    Returns:
        bool (rows, cols).
    """
    mask = np.zeros(shape, np.bool_)
    for outline in outlines:
        rows, cols, inside = _filled(outline.polygon / downsample, shape)
        for hole in outline.holes:
            _cut(inside, (rows, cols), _filled(hole / downsample, shape))
        mask[rows, cols][inside] = True
    return mask


def share_on_slide(outline: Outline, l0_size_px: tuple[int, int]) -> float:
    """Return which part of the area of an outline lies on a slide of some width and height, 0 to 1."""
    width, height = l0_size_px
    return share_within(outline.polygon, np.array([(0, 0), (width, 0), (width, height), (0, height)], np.float64))


def share_within(polygon: Polygon, other: Polygon) -> float:
    """Return which part of the area of a polygon lies in another one, 0 to 1, counted on a grid of its box."""
    corner, end = polygon.min(axis=0), polygon.max(axis=0)
    scale = _SIDE / np.maximum(end - corner, 1e-9)
    rows, cols, inside = _filled((polygon - corner) * scale, (_SIDE, _SIDE))
    if not inside.any():  # a line: its points tell
        around = [bool(_filled(other - point + 0.5, (1, 1))[2].any()) for point in polygon]
        return float(np.mean(around))
    within = np.zeros((_SIDE, _SIDE), np.bool_)
    other_rows, other_cols, other_inside = _filled((other - corner) * scale, (_SIDE, _SIDE))
    within[other_rows, other_cols] = other_inside
    return float(within[rows, cols][inside].mean())


def _cut(inside: NDArray[np.bool_], window: tuple[slice, slice], hole: tuple[slice, slice, NDArray[np.bool_]]) -> None:
    """Remove the pixels of a hole from those of a window."""
    spans = [(max(a.start, b.start), min(a.stop, b.stop)) for a, b in zip(window, hole[:2], strict=True)]
    if any(first >= last for first, last in spans):
        return
    own, others = (
        tuple(slice(first - of.start, last - of.start) for (first, last), of in zip(spans, place, strict=True))
        for place in (window, hole[:2])
    )
    inside[own] &= ~hole[2][others]


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
