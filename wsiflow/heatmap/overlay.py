"""Pictures and outlines for people and viewers: tissue as PNG and QuPath GeoJSON, scores drawn on the slide.

Input: arrays. Output: bytes of a file; writing it is the caller's. The same input gives the same bytes.

Conventions: points are x, y and arrays rows, columns; ``m_`` is a mask pixel, ``o_`` a pixel of the slide overview,
``l0_`` a level-0 pixel. Every heatmap is drawn on one fixed scale, 0 to 1, so that slides can be compared by eye.
"""

import io
import json
import uuid
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

Ring = NDArray[np.float64]
Vertex = tuple[int, int]

#: Colour map of the scores: perceptually uniform, and its bright end is a colour that stained tissue does not have.
COLOUR_MAP = "viridis"

_TISSUE_RGB = (46, 134, 171)
# Opacity at score 0 and at score 1: what is not suspicious stays readable as tissue.
_OPACITY = (0.30, 0.85)
_LEGEND_PX = 26
# Headings along pixel borders: right, down, left, up. The step each takes from corner to corner (rows, columns), and
# where the pixel on its right lies as seen from the corner it leaves.
_STEP = ((0, 1), (1, 0), (0, -1), (-1, 0))
_RIGHT_OF = ((0, 0), (0, -1), (-1, -1), (-1, 0))
_IDS = uuid.UUID("6f3f6cb2-5d0e-5b39-9c6b-0f0a3c1f7a55")


def tissue_png(mask: NDArray[np.bool_]) -> bytes:
    """Return a tissue mask as an 8-bit grey PNG: 255 tissue, 0 elsewhere.

    Args:
        mask: bool (rows, cols).
    """
    return _png(Image.fromarray(mask.astype(np.uint8) * 255))


def tissue_geojson(mask: NDArray[np.bool_], *, downsample: float, offset: tuple[float, float]) -> str:
    """Return the outlines of a tissue mask as a GeoJSON FeatureCollection that QuPath opens.

    One annotation per 4-connected piece, its polygon with holes along the exact pixel borders: the areas of all
    polygons add up to the area of the mask. Rings are closed and simple; outer rings have positive signed area. Ids
    follow from the coordinates, so the same mask gives the same text.

    Args:
        mask: bool (rows, cols).
        downsample: Level-0 pixels per mask pixel.
        offset: Level-0 x, y of the mask's top-left corner in the viewer's frame. QuPath counts from the bounding box
            that some scanners store, so a caller subtracts ``openslide.bounds-x`` and ``-y`` there.
    """
    features = [
        _feature([_l0_ring(ring, downsample, offset) for ring in rings], number)
        for number, rings in enumerate(_polygons(mask), start=1)
    ]
    return json.dumps({"type": "FeatureCollection", "features": features}, separators=(",", ":")) + "\n"


def overlay_png(
    overview: NDArray[np.uint8],
    heat: NDArray[np.float32],
    *,
    cell_px: float,
    origin_px: tuple[float, float],
    detections: NDArray[np.float64] | None = None,
) -> bytes:
    """Draw a heatmap on the overview of its slide and return a PNG, with the colour scale in a strip below.

    NaN cells leave the slide as it is. Where several cells share an overview pixel the highest score is drawn, so that
    a small lesion does not vanish in the average.

    Args:
        overview: uint8 (rows, cols, 3), the slide, RGB.
        heat: float32 (h_rows, h_cols), scores 0 to 1, NaN where there is none.
        cell_px: Overview pixels per heatmap cell, the same in x and y.
        origin_px: Overview x, y of the top-left corner of cell (0, 0).
        detections: float64 (n, 3), probability and overview x, y of points to circle, or None.

    Returns:
        A PNG as wide as the overview and one legend strip higher.
    """
    shape = (overview.shape[0], overview.shape[1])
    score = heat_on_overview(heat, shape, cell_px=cell_px, origin_px=origin_px)
    image = Image.fromarray(_blend(overview, score))
    if detections is not None:
        _circle(image, detections)
    return _png(_with_legend(image))


def heat_on_overview(
    heat: NDArray[np.float32], shape: tuple[int, int], *, cell_px: float, origin_px: tuple[float, float]
) -> NDArray[np.float32]:
    """Return the score of every overview pixel: of the cell it lies in, or the highest of the cells it holds.

    Args:
        heat: float32 (h_rows, h_cols), NaN where there is no score.
        shape: Rows and columns of the overview.
        cell_px: Overview pixels per cell.
        origin_px: Overview x, y of the top-left corner of cell (0, 0).

    Returns:
        float32 ``shape``, NaN where there is no score.
    """
    out = np.full(shape, np.nan, dtype=np.float32)
    o_rows, h_rows, h_row_end = _shared(heat.shape[0], shape[0], cell_px, origin_px[1])
    o_cols, h_cols, h_col_end = _shared(heat.shape[1], shape[1], cell_px, origin_px[0])
    if len(o_rows) and len(o_cols):
        drawn = np.fmax.reduceat(heat[:h_row_end, :h_col_end], h_rows, axis=0)
        out[np.ix_(o_rows, o_cols)] = np.fmax.reduceat(drawn, h_cols, axis=1)
    return out


def thumbnail(picture: bytes, *, side_px: int) -> bytes:
    """Return a small JPEG of a picture, its longer side at most ``side_px``."""
    with Image.open(io.BytesIO(picture)) as opened:
        small = opened.convert("RGB")
    small.thumbnail((side_px, side_px), Image.Resampling.LANCZOS)
    out = io.BytesIO()
    small.save(out, "JPEG", quality=82, optimize=True)
    return out.getvalue()


def _shared(n_cells: int, n_px: int, cell_px: float, origin: float) -> tuple[NDArray[np.intp], NDArray[np.intp], int]:
    """Return, along one axis, the pixels that show cells, the first cell each shows, and the end of the last's cells.

    A pixel that starts with the same cell as the next one shows that cell alone, as ``reduceat`` understands it.
    """
    if cell_px >= 1:
        cells = np.floor((np.arange(n_px) + 0.5 - origin) / cell_px).astype(np.intp)
        pixels = np.flatnonzero((cells >= 0) & (cells < n_cells))
        first = cells[pixels]
        return pixels, first, int(first[-1]) + 1 if len(first) else 0
    held_by = np.floor(origin + (np.arange(n_cells) + 0.5) * cell_px).astype(np.intp)
    inside = np.flatnonzero((held_by >= 0) & (held_by < n_px))
    pixels, places = np.unique(held_by[inside], return_index=True)
    return pixels, inside[places], int(inside[-1]) + 1 if len(inside) else 0


@lru_cache(maxsize=1)
def _colours() -> NDArray[np.uint8]:
    """Return the colour map as uint8 (256, 3)."""
    from matplotlib import colormaps

    rgba = colormaps[COLOUR_MAP](np.arange(256), bytes=True)
    return np.ascontiguousarray(rgba[:, :3], dtype=np.uint8)


def _blend(overview: NDArray[np.uint8], score: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Return the overview with the scored pixels tinted, the more opaque the higher the score."""
    scored = ~np.isnan(score)
    value = np.clip(score[scored], 0.0, 1.0)
    opacity = (_OPACITY[0] + (_OPACITY[1] - _OPACITY[0]) * value)[:, None]
    tint = _colours()[np.rint(value * 255).astype(np.intp)].astype(np.float32)
    out = overview.copy()
    out[scored] = np.rint(overview[scored] * (1 - opacity) + tint * opacity).astype(np.uint8)
    return out


def _circle(image: Image.Image, detections: NDArray[np.float64]) -> None:
    """Ring every detection, white inside black, so that it shows on any ground."""
    draw = ImageDraw.Draw(image)
    radius = max(6.0, max(image.size) / 80)
    for _, x, y in detections:
        for grow, colour, width in ((1.5, "black", 4), (0.5, "white", 2)):
            r = radius + grow
            draw.ellipse((x - r, y - r, x + r, y + r), outline=colour, width=width)


def _with_legend(image: Image.Image) -> Image.Image:
    """Return the picture with the colour scale from 0 to 1 in a white strip below it."""
    width, height = image.size
    out = Image.new("RGB", (width, height + _LEGEND_PX), "white")
    out.paste(image, (0, 0))
    bar_px = max(1, min(256, width - 40))
    bar = Image.fromarray(np.tile(_colours()[np.linspace(0, 255, bar_px).astype(np.intp)], (10, 1, 1)))
    left, top = (width - bar_px) // 2, height + 8
    out.paste(bar, (left, top))
    draw, font = ImageDraw.Draw(out), ImageFont.load_default(12)
    draw.text((left - 5, top + 5), "0", fill="black", font=font, anchor="rm")
    draw.text((left + bar_px + 5, top + 5), "1", fill="black", font=font, anchor="lm")
    return out


def _png(image: Image.Image) -> bytes:
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
    """Return whole numbers as int, others to a hundredth of a pixel."""
    return int(value) if float(value).is_integer() else round(float(value), 2)


def _l0_ring(m_ring: Ring, downsample: float, offset: tuple[float, float]) -> Ring:
    return m_ring * downsample + np.asarray(offset, dtype=np.float64)


def _polygons(mask: NDArray[np.bool_]) -> list[list[Ring]]:
    """Return, for every 4-connected piece in raster order, its outer ring and then its holes, x, y in mask pixels."""
    count, labels = cv2.connectedComponents(mask.astype(np.uint8), connectivity=4)
    pieces: list[list[Ring]] = [[] for _ in range(count - 1)]
    for inside, loop in _loops(mask):
        ring = np.array([*loop, loop[0]], dtype=np.float64)[:, ::-1]
        pieces[labels[inside] - 1].append(ring)
    # The outer ring of a piece is its only one of positive area.
    return [sorted(rings, key=_signed_area, reverse=True) for rings in pieces]


def _signed_area(ring: Ring) -> float:
    """Return the area of a closed ring, positive where it turns from x to y."""
    x, y = ring.T
    return float(x[:-1] @ y[1:] - x[1:] @ y[:-1]) / 2


def _loops(mask: NDArray[np.bool_]) -> Iterator[tuple[Vertex, list[Vertex]]]:
    """Yield the corners of every simple loop of pixel borders, with the row and column of a pixel of its piece.

    Borders are walked with the mask on the right. Where two pixels meet in a corner only, the walk stays with its own
    pixel; where it passes a corner twice nevertheless, it is split there, so that no ring touches itself.
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
    """Return, by corner (row, column), the headings of the borders that leave it with the mask on their right."""
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
    """Return the corners where the walk from ``start`` turns, until it is back, and note the borders walked."""
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
    """Cut a walk into loops that pass every corner once."""
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
