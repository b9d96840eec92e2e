"""Tissue: which pixels of an overview and which tiles of a slide are worth looking at.

Input: an overview of a slide, uint8 RGB (rows, cols, 3). Output: boolean masks of the overview and of the tile grid.

Conventions: ``m_`` names pixels of the overview, each ``downsample`` level-0 pixels a side, and ``t_`` cells of the
tile grid; both grids begin at level-0 (0, 0). Hue is OpenCV's, 0 to 179 (red is 0, green 60, blue 120); saturation is 0
to 255. The functions named ``reference`` reproduce the published system with its flaws; the others do not have them.
"""

from typing import Literal, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, Field
from skimage.filters import threshold_otsu

RED_HUE = 15  # hues below are reds that belong with the pinks at the other end of the scale
HUE_LIMIT = 110  # haematoxylin and eosin lie above; a threshold beyond would cut tissue in two
HUES_APART = 30  # two groups of hues closer than this are both tissue
REFERENCE_HUE_LIMIT = 180


class TissueParams(BaseModel, frozen=True, extra="forbid"):
    """How tissue is found."""

    method: Literal["hsv_otsu", "saturation", "all"] = Field(
        description="How tissue is told from glass. hsv_otsu: by a threshold of saturation and, where two colours are "
        "present, of hue. saturation: by saturation alone. all: the whole slide is taken."
    )
    downsample: float = Field(ge=1, le=1024, description="Level-0 pixels per pixel of the overview.")
    min_chroma: int = Field(
        ge=1,
        le=255,
        description="Least difference between the largest and the smallest of red, green and blue that counts as "
        "colour, of 255 grey levels.",
    )
    closing_px: int = Field(
        ge=0, le=100, description="Radius up to which gaps are closed, overview pixels. 0: none is closed."
    )
    min_object_px: int = Field(ge=0, description="Area of the smallest piece of tissue that is kept, overview pixels.")
    min_coverage: float = Field(
        ge=0,
        le=1,
        description="Least part of a tile, 0 to 1, that must be tissue. A tile without any tissue is never selected.",
    )
    dilate_tiles: int = Field(
        ge=0,
        le=16,
        description="How many times the selection grows by its neighbouring tiles, diagonal ones included.",
    )


class ReferenceIndex(NamedTuple):
    """The tile index of the reference system: one thumbnail pixel is one tile."""

    vector: NDArray[np.int64]
    """Shape (9,): ny, nx, 3, xmin, xmax, ymin, ymax, nrows, ncols; xmax and ymax are exclusive."""
    mask: NDArray[np.bool_]
    """Shape (ny, nx): tissue."""
    tile_rows_cols: NDArray[np.int64]
    """Shape (nrows * ncols, 2): row and column of every tile of the kept rectangle, row by row."""
    is_tissue: NDArray[np.bool_]
    """Shape (nrows * ncols,): the mask at those tiles."""


def tissue_mask(overview: NDArray[np.uint8], params: TissueParams) -> NDArray[np.bool_]:
    """Find the tissue on an overview.

    Tissue is what is more saturated than Otsu's threshold and has some colour at all, so that an empty slide, white or
    black, has none. With ``hsv_otsu`` the hues of these pixels are split by Otsu's method as well. Only where the two
    groups are far apart, as ink and tissue are, the lower one is dropped, and never anything above blue (hue 110) or
    among the reds (hue below 15): a hue threshold on the whole image, as the reference has it, loses red tissue, takes
    the hue of grey glass for a signal, and cuts violet tissue on bluish glass in two.

    Args:
        overview: Shape (rows, cols, 3), RGB.
        params: The settings.

    Returns:
        Shape (rows, cols).
    """
    if params.method == "all":
        return np.ones(overview.shape[:2], dtype=np.bool_)
    hue, saturation = _hue_and_saturation(overview)
    chroma = overview.max(axis=2) - overview.min(axis=2)
    mask: NDArray[np.bool_] = (saturation > _otsu(saturation)) & (chroma >= params.min_chroma)
    if params.method == "hsv_otsu":
        mask &= _tissue_hues(hue, mask)
    return _without_small_objects(_closed(mask, params.closing_px), params.min_object_px)


def tile_coverage(
    mask: NDArray[np.bool_], *, downsample: float, tile_l0_px: float, grid: tuple[int, int]
) -> NDArray[np.float64]:
    """Return which part of every tile is tissue, exactly.

    Args:
        mask: Shape (rows, cols) of the overview.
        downsample: Level-0 pixels per overview pixel.
        tile_l0_px: Level-0 pixels per tile, not necessarily a multiple of ``downsample``.
        grid: Rows and columns of the tile grid.

    Returns:
        Shape ``grid``, 0 to 1. Of a tile that reaches beyond the overview only the part on it counts; a tile that lies
        beyond it has coverage 0.
    """
    summed = np.pad(mask, ((1, 0), (1, 0))).cumsum(axis=0, dtype=np.float64).cumsum(axis=1)
    m_edges = [
        np.minimum(np.arange(cells + 1) * (tile_l0_px / downsample), extent)
        for cells, extent in zip(grid, mask.shape, strict=True)
    ]
    at_corners = _between(_between(summed, m_edges[0]).T, m_edges[1]).T
    tissue = np.diff(np.diff(at_corners, axis=0), axis=1)
    area = np.outer(np.diff(m_edges[0]), np.diff(m_edges[1]))
    # Differences of large sums leave rounding of the order of 1e-9, which must not make a tile of glass tissue. Over a
    # sliver at the edge it grows, so the ends are held.
    coverage = np.divide(tissue, area, out=np.zeros_like(tissue), where=area > 0).round(6)
    return np.clip(coverage, 0, 1)


def select_tiles(coverage: NDArray[np.float64], params: TissueParams) -> NDArray[np.bool_]:
    """Select the tiles with enough tissue and their neighbours.

    Args:
        coverage: Shape (rows, cols), the part of each tile that is tissue.
        params: The settings.

    Returns:
        Shape (rows, cols).
    """
    enough = (coverage > 0) & (coverage >= params.min_coverage)
    around = np.ones((3, 3), dtype=np.uint8)
    return cv2.dilate(enough.astype(np.uint8), around, iterations=params.dilate_tiles) > 0


def reference_index(thumbnail: NDArray[np.uint8]) -> ReferenceIndex:
    """Return the reference system's tile index of a slide.

    Args:
        thumbnail: Shape (ny, nx, 3), RGB, one pixel per tile.

    Returns:
        The index; without any tissue it lists no tile.
    """
    return reference_index_of(reference_mask(thumbnail))


def reference_mask(thumbnail: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Threshold hue and saturation each by Otsu's method on the whole plane, bounds included, as the reference does.

    Args:
        thumbnail: Shape (ny, nx, 3), RGB.

    Returns:
        Shape (ny, nx).
    """
    hue, saturation = _hue_and_saturation(thumbnail)
    least_hue, least_saturation = reference_thresholds(thumbnail)
    return (hue >= least_hue) & (hue <= REFERENCE_HUE_LIMIT) & (saturation >= least_saturation)


def reference_thresholds(thumbnail: NDArray[np.uint8]) -> tuple[int, int]:
    """Return the reference's lower bounds of hue and of saturation for a thumbnail of shape (ny, nx, 3)."""
    hue, saturation = _hue_and_saturation(thumbnail)
    return _otsu(hue), _otsu(saturation)


def reference_index_of(mask: NDArray[np.bool_]) -> ReferenceIndex:
    """Cut the reference's rectangle of tiles around a mask.

    Args:
        mask: Shape (ny, nx).

    Returns:
        The index; without any tissue it lists no tile.
    """
    ny, nx = mask.shape
    t_rows, t_cols = (np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0))
    box = (t_cols[0], t_cols[-1] + 1, t_rows[0], t_rows[-1] + 1) if t_rows.size else (0, 0, 0, 0)
    vector = reference_vector((ny, nx), box)
    xmin, ymin, nrows, ncols = vector[[3, 5, 7, 8]]
    t_row, t_col = np.mgrid[ymin : ymin + nrows, xmin : xmin + ncols].reshape(2, -1)
    return ReferenceIndex(vector, mask, np.stack([t_row, t_col], axis=1), mask[t_row, t_col])


def reference_vector(shape: tuple[int, int], box: tuple[int, int, int, int]) -> NDArray[np.int64]:
    """Return the nine numbers the reference keeps of a slide.

    Args:
        shape: Rows and columns of the thumbnail.
        box: xmin, xmax, ymin, ymax of the tissue in thumbnail pixels, the maxima exclusive; all 0 without tissue.

    Returns:
        Shape (9,). The kept rectangle has one row and one column more than the box, unless the thumbnail ends there.
    """
    ny, nx = shape
    xmin, xmax, ymin, ymax = box
    nrows = min(ymax, ny - 1) - ymin + 1 if ymax else 0
    ncols = min(xmax, nx - 1) - xmin + 1 if xmax else 0
    return np.array([ny, nx, 3, xmin, xmax, ymin, ymax, nrows, ncols], dtype=np.int64)


def _hue_and_saturation(rgb: NDArray[np.uint8]) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Return OpenCV's hue and saturation, uint8, of shape (rows, cols)."""
    hsv = np.asarray(cv2.cvtColor(np.ascontiguousarray(rgb), cv2.COLOR_RGB2HSV), dtype=np.uint8)
    return hsv[..., 0], hsv[..., 1]


def _otsu(values: NDArray[np.integer]) -> int:
    """Return Otsu's threshold: the largest value of the lower class; the only value of a flat array."""
    return int(threshold_otsu(values))  # type: ignore[no-untyped-call]


def _tissue_hues(hue: NDArray[np.uint8], coloured: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Return where the hue may be tissue's, judged from the hues of the coloured pixels."""
    # Turned so that the scale begins behind the reds and they end up beside the pinks.
    turned = (hue.astype(np.int16) + 180 - RED_HUE) % 180
    values = turned[coloured]
    if values.size == 0:
        return coloured
    threshold = _otsu(values)
    low, high = values[values <= threshold], values[values > threshold]
    if high.size == 0 or high.mean() - low.mean() < HUES_APART:
        return np.ones_like(coloured)
    limit = min(threshold, HUE_LIMIT - RED_HUE)
    return np.asarray(turned > limit)


def _closed(mask: NDArray[np.bool_], radius_px: int) -> NDArray[np.bool_]:
    """Close gaps by a disc; the world beyond the border is neither tissue nor glass."""
    disc = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * radius_px + 1, 2 * radius_px + 1))
    return cv2.morphologyEx(mask.astype(np.uint8), cv2.MORPH_CLOSE, disc) > 0


def _without_small_objects(mask: NDArray[np.bool_], least_px: int) -> NDArray[np.bool_]:
    """Drop pieces (touching also at corners) of less than an area."""
    _, labels, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=8)
    keep = stats[:, cv2.CC_STAT_AREA] >= least_px
    keep[0] = False
    return np.asarray(keep[labels], dtype=np.bool_)


def _between(values: NDArray[np.float64], at: NDArray[np.float64]) -> NDArray[np.float64]:
    """Interpolate linearly between the rows of an array.

    Args:
        values: Shape (rows, cols).
        at: Shape (n,), row numbers, not necessarily whole.

    Returns:
        Shape (n, cols).
    """
    below = np.minimum(at.astype(np.intp), len(values) - 2)
    weight = (at - below)[:, np.newaxis]
    return np.asarray(values[below] * (1 - weight) + values[below + 1] * weight)
