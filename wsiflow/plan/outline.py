"""Tissue masks for people and viewers: a PNG image of the mask, and its outlines as GeoJSON for QuPath.

Input: arrays. Output: the bytes or the text of a file, which the caller writes. The same input gives the same bytes.

Conventions: points are x, y and arrays rows, columns; ``m_`` is a mask pixel, ``l0_`` a level-0 pixel.
"""

import io
import json
import uuid
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

Ring = NDArray[np.float64]
Vertex = tuple[int, int]
_TISSUE_RGB = (46, 134, 171)

# Headings along pixel borders: right, down, left, up. `_STEP` is the step of each from corner to corner (row, column),
# and `_RIGHT_OF` the offset from the corner it leaves to the pixel on its right.
_STEP = ((0, 1), (1, 0), (0, -1), (-1, 0))
_RIGHT_OF = ((0, 0), (0, -1), (-1, -1), (-1, 0))
_IDS = uuid.UUID("6f3f6cb2-5d0e-5b39-9c6b-0f0a3c1f7a55")


def tissue_png(mask: NDArray[np.bool_]) -> bytes:
    """Return a tissue mask as an 8-bit greyscale PNG: 255 for tissue, 0 elsewhere.

    Args:
        mask: bool (rows, cols).
    """
    return png_bytes(Image.fromarray(mask.astype(np.uint8) * 255))


def tissue_geojson(mask: NDArray[np.bool_], *, downsample: float, offset: tuple[float, float]) -> str:
    """Return the outlines of a tissue mask as a GeoJSON FeatureCollection that QuPath opens.

    Each 4-connected piece is one annotation, whose polygon and holes follow the pixel borders exactly, so the areas of
    all polygons add up to the area of the mask. Rings are closed and simple, and outer rings have positive signed area.
    Ids are derived from the coordinates, so the same mask gives the same text.

    Args:
        mask: bool (rows, cols).
        downsample: Level-0 pixels per mask pixel.
        offset: Level-0 x, y of the mask's top-left corner in the viewer's coordinates. QuPath counts from the bounding
            box that some scanners store; for these the caller passes minus ``openslide.bounds-x`` and ``-y``.
    """
    features = [
        _feature([_l0_ring(ring, downsample, offset) for ring in rings], number)
        for number, rings in enumerate(polygons(mask)[1], start=1)
    ]
    return json.dumps({"type": "FeatureCollection", "features": features}, separators=(",", ":")) + "\n"


def simplified_rings(mask: NDArray[np.bool_], *, tolerance_px: float) -> list[Ring]:
    """Return the outlines of a mask for drawing: few points, and slanted lines where pixel borders are stairs.

    A line is drawn through the midpoints of the pixel borders, and points are left out that lie nearer to it than a
    tolerance.

    Args:
        mask: bool (rows, cols).
        tolerance_px: The tolerance, mask pixels.

    Returns:
        float64 (n, 2) each, x, y in mask pixels, of outer rings and holes; the first point is not repeated at the end.
    """
    return [thinned(_midpoints(ring), tolerance_px) for rings in polygons(mask)[1] for ring in rings]


def thinned(ring: Ring, tolerance: float) -> Ring:
    """Return a ring, float64 (n, 2) of x, y, without the points that lie nearer than a tolerance to what is left."""
    few = cv2.approxPolyDP(ring.astype(np.float32), tolerance, closed=True).reshape(-1, 2).astype(np.float64)
    return few if len(few) > 2 else ring  # what is as small as the tolerance would shrink to a line


def _midpoints(ring: Ring) -> Ring:
    """Return the midpoints of the pixel borders along a closed ring, whose corners have whole coordinates."""
    sides = np.diff(ring, axis=0)
    lengths = np.abs(sides).sum(axis=1).astype(np.int64)
    along = np.concatenate([np.arange(n) for n in lengths]) + 0.5
    headings = np.repeat(sides / lengths[:, None], lengths, axis=0)
    return np.asarray(np.repeat(ring[:-1], lengths, axis=0) + headings * along[:, None])


def png_bytes(image: Image.Image) -> bytes:
    """Return an image as PNG; the same pixels give the same bytes."""
    out = io.BytesIO()
    image.save(out, "PNG", optimize=False, compress_level=6)
    return out.getvalue()


def _feature(rings: Sequence[Ring], number: int) -> dict[str, Any]:
    coordinates = [[[_number(x), _number(y)] for x, y in ring] for ring in rings]
    return {
        "type": "Feature",
        "id": str(uuid.uuid5(_IDS, json.dumps(coordinates))),
        "geometry": {"type": "Polygon", "coordinates": coordinates},
        "properties": {
            "objectType": "annotation",
            "name": f"tissue {number}",
            "classification": {"name": "Tissue", "color": list(_TISSUE_RGB)},
            "isLocked": True,
        },
    }


def _number(value: float) -> float | int:
    """Return a whole number as int, and any other rounded to a hundredth of a pixel."""
    return int(value) if float(value).is_integer() else round(float(value), 2)


def _l0_ring(m_ring: Ring, downsample: float, offset: tuple[float, float]) -> Ring:
    return m_ring * downsample + np.asarray(offset, dtype=np.float64)


def polygons(mask: NDArray[np.bool_]) -> tuple[NDArray[np.int32], list[list[Ring]]]:
    """Return the 4-connected pieces of a mask, in raster order, and the outlines of each.

    Args:
        mask: bool (rows, cols).

    Returns:
        int32 (rows, cols), the number of the piece that a pixel belongs to, from 1 on, 0 outside; and for each piece
        its rings along the borders of pixels, float64 (n, 2), x and y in mask pixels, closed by the first point at the
        end: the outer ring, then the holes.
    """
    count, labels = cv2.connectedComponents(mask.astype(np.uint8), connectivity=4)
    pieces: list[list[Ring]] = [[] for _ in range(count - 1)]
    for inside, loop in _loops(mask):
        ring = np.array([*loop, loop[0]], dtype=np.float64)[:, ::-1]
        pieces[labels[inside] - 1].append(ring)
    # The outer ring of a piece is its only ring with a positive area.
    return labels.astype(np.int32), [sorted(rings, key=_signed_area, reverse=True) for rings in pieces]


def _signed_area(ring: Ring) -> float:
    """Return the area of a closed ring, which is positive if the ring turns from the x to the y axis."""
    x, y = ring.T
    return float(x[:-1] @ y[1:] - x[1:] @ y[:-1]) / 2


def _loops(mask: NDArray[np.bool_]) -> Iterator[tuple[Vertex, list[Vertex]]]:
    """Yield every simple loop of pixel borders: row and column of a pixel of its piece, and the corners of the loop.

    Borders are followed with the mask on their right. Where two pixels touch only at a corner, the path stays with its
    own pixel. A path that nevertheless passes a corner twice is split there, so that no ring touches itself.
    """
    leaving = _borders(mask)
    walked: set[tuple[Vertex, int]] = set()
    for start, headings in leaving.items():
        for heading in headings:
            if (start, heading) not in walked:
                inside = (start[0] + _RIGHT_OF[heading][0], start[1] + _RIGHT_OF[heading][1])
                for loop in _split(_walk(leaving, walked, start, heading)):
                    yield inside, loop


def _borders(mask: NDArray[np.bool_]) -> dict[Vertex, list[int]]:
    """Return the headings of all pixel borders by the corner (row, column) at which they begin, mask on their right."""
    m = np.pad(mask, 1)
    inner = m[1:-1, 1:-1]
    neighbours = (m[:-2, 1:-1], m[1:-1, 2:], m[2:, 1:-1], m[1:-1, :-2])
    leaving: dict[Vertex, list[int]] = {}
    for heading, (neighbour, (d_row, d_col)) in enumerate(zip(neighbours, _RIGHT_OF, strict=True)):
        for row, col in np.argwhere(inner & ~neighbour).tolist():
            leaving.setdefault((row - d_row, col - d_col), []).append(heading)
    return leaving


def _walk(
    leaving: Mapping[Vertex, Sequence[int]], walked: set[tuple[Vertex, int]], start: Vertex, heading: int
) -> list[Vertex]:
    """Return the corners at which the path from ``start`` turns until it closes, and add its borders to ``walked``."""
    corners = []
    vertex, turned = start, heading
    while (vertex, turned) not in walked:
        walked.add((vertex, turned))
        vertex = (vertex[0] + _STEP[turned][0], vertex[1] + _STEP[turned][1])
        options = leaving[vertex]
        ahead = options[0] if len(options) == 1 else (turned + 1) % 4
        if ahead != turned:
            corners.append(vertex)
        turned = ahead
    return corners


def _split(corners: Sequence[Vertex]) -> list[list[Vertex]]:
    """Return the loops into which a closed path is divided, so that each passes every corner at most once."""
    loops, path, place = [], list[Vertex](), dict[Vertex, int]()
    for corner in corners:
        if corner in place:
            cut = place[corner]
            loops.append(path[cut:])
            for passed in path[cut + 1 :]:
                del place[passed]
            del path[cut + 1 :]
        else:
            place[corner] = len(path)
            path.append(corner)
    return [*loops, path]
