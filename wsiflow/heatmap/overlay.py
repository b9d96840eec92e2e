"""Draw the scores of a heatmap on the overview of its slide.

Input: arrays. Output: the bytes of a picture, which the caller writes. The same input gives the same bytes.

Conventions: points are x, y and arrays rows, columns; ``o_`` marks pixels of the overview. Every heatmap is drawn on
the same scale, 0 to 1, so that slides can be compared by eye.
"""

import io
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from wsiflow.plan.outline import png_bytes

#: Colour map of the scores: perceptually uniform. Only its part from teal to yellow is used, since the lower part is
#: purple, as haematoxylin is.
COLOUR_MAP = "viridis"
_FIRST_COLOUR = 0.45

# Opacity at score 0 and at score 1: tissue with low scores stays visible, and there is no haze over glass.
_OPACITY = (0.0, 0.85)
_LEGEND_PX = 26


def overlay_png(
    overview: NDArray[np.uint8],
    heat: NDArray[np.float32],
    *,
    cell_px: float,
    origin_px: tuple[float, float],
    detections: NDArray[np.float64] | None = None,
) -> bytes:
    """Draw a heatmap on the overview of its slide, with the colour scale in a strip below, and return a PNG.

    NaN cells leave the overview unchanged. Where several cells share an overview pixel, their highest score is drawn,
    so that a small lesion stays visible.

    Args:
        overview: uint8 (rows, cols, 3), RGB overview of the slide.
        heat: float32 (h_rows, h_cols), scores, 0 to 1; NaN where there is none.
        cell_px: Overview pixels per heatmap cell, the same in x and y.
        origin_px: Overview x, y of the top-left corner of cell (0, 0).
        detections: float64 (n, 3), probability and overview x, y of points to circle, or None.

    Returns:
        The bytes of a PNG as wide as the overview and higher by the strip of the colour scale.
    """
    shape = (overview.shape[0], overview.shape[1])
    score = heat_on_overview(heat, shape, cell_px=cell_px, origin_px=origin_px)
    image = Image.fromarray(_blend(overview, score))
    if detections is not None:
        _circle(image, detections)
    return png_bytes(_with_legend(image))


def heat_on_overview(
    heat: NDArray[np.float32], shape: tuple[int, int], *, cell_px: float, origin_px: tuple[float, float]
) -> NDArray[np.float32]:
    """Return the score of every overview pixel: of the cell that contains it, or the highest of the cells in it.

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
    """Return the bytes of a JPEG thumbnail of a picture, its longer side at most ``side_px``."""
    with Image.open(io.BytesIO(picture)) as opened:
        opened.draft("RGB", (2 * side_px, 2 * side_px))  # a JPEG is decoded at a fraction, which is far quicker
        small = opened.convert("RGB")
    small.thumbnail((side_px, side_px), Image.Resampling.LANCZOS)
    out = io.BytesIO()
    small.save(out, "JPEG", quality=82, optimize=True)
    return out.getvalue()


def _shared(n_cells: int, n_px: int, cell_px: float, origin: float) -> tuple[NDArray[np.intp], NDArray[np.intp], int]:
    """Return which cells each overview pixel shows along one axis.

    Returns:
        Indices of the pixels that show a cell; the first cell of each; and the end of the cells of the last one. Where
        two pixels begin with the same cell, each shows this cell alone, as ``ufunc.reduceat`` defines it.
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
    """Return the colour map as uint8 (256, 3), RGB."""
    from matplotlib import colormaps

    rgba = colormaps[COLOUR_MAP](np.linspace(_FIRST_COLOUR, 1.0, 256), bytes=True)
    return np.ascontiguousarray(rgba[:, :3], dtype=np.uint8)


def _blend(overview: NDArray[np.uint8], score: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Return the overview with the scored pixels tinted; the tint is more opaque for higher scores."""
    scored = ~np.isnan(score)
    value = np.clip(score[scored], 0.0, 1.0)
    opacity = (_OPACITY[0] + (_OPACITY[1] - _OPACITY[0]) * value)[:, None]
    tint = _colours()[np.rint(value * 255).astype(np.intp)].astype(np.float32)
    out = overview.copy()
    out[scored] = np.rint(overview[scored] * (1 - opacity) + tint * opacity).astype(np.uint8)
    return out


def _circle(image: Image.Image, detections: NDArray[np.float64]) -> None:
    """Circle every detection with a white ring on a black one, so that it is visible on any background."""
    draw = ImageDraw.Draw(image)
    radius = max(6.0, max(image.size) / 80)
    for _, x, y in detections:
        for grow, colour, width in ((1.5, "black", 4), (0.5, "white", 2)):
            r = radius + grow
            draw.ellipse((x - r, y - r, x + r, y + r), outline=colour, width=width)


def _with_legend(image: Image.Image) -> Image.Image:
    """Return a picture with the colour scale from 0 to 1 in a white strip below it."""
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
