"""Tissue detection: which pixels of an overview and which tiles of a slide contain tissue.

Input: an overview of a slide, uint8 RGB (rows, cols, 3). Output: boolean masks of the overview and of the tile grid.

Conventions: the prefix ``m_`` marks pixels of the overview, each ``downsample`` level-0 pixels a side, and ``t_`` cells
of the tile grid; both grids begin at level-0 (0, 0). Hue is OpenCV's, 0 to 179 (red is 0, green 60, blue 120);
saturation is 0 to 255. Functions whose names begin with ``reference`` reproduce the published system with its flaws.
"""

from typing import Annotated, Any, Literal, NamedTuple

import cv2
import numpy as np
import skimage
from numpy.typing import NDArray
from pydantic import BaseModel, BeforeValidator, Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from wsiflow.plan.geometry import Frame, window_reach_px
from wsiflow.plan.glass import tissue_by_glass
from wsiflow.system.paths import AbsolutePath

RED_HUE = 15  # hues below this are reds, which continue the pinks at the other end of the scale
HUE_LIMIT = 110  # haematoxylin and eosin have larger hues, so a larger threshold would split the tissue
_TILES_AT_ONCE = 4096  # of a large slide, so that sums over windows take some MB
HUES_APART = 30  # two groups of hues whose means are closer than this are both tissue
REFERENCE_HUE_LIMIT = 180


def _listed(value: object) -> object:
    """Return a list of values also where a single one is given."""
    return [value] if isinstance(value, str | int) else value


_Names = Annotated[tuple[str, ...], BeforeValidator(_listed)]
_Greys = Annotated[tuple[Annotated[int, Field(ge=0, le=255)], ...], BeforeValidator(_listed)]


class TissueParams(BaseModel, frozen=True, extra="forbid"):
    """How tissue is found."""

    method: Literal["adaptive", "hsv_otsu", "saturation", "all", "given"] = Field(
        description="How tissue is told from glass. adaptive: what differs from the slide's own glass, pale tissue and "
        "grey slides included; ink and black borders are left out. hsv_otsu: by a threshold of saturation and, where "
        "two colours are present, of hue. saturation: by saturation alone. all: the whole slide is taken. given: by a "
        "file for each slide, a mask or outlines."
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
    # Plans and folders of versions without the following keys stay valid: each is recorded only where it is set.
    windows: Literal["touching", "all"] = Field(
        default="all",
        description="Which windows of the selected tiles are scored. touching: those that touch tissue, and blocks "
        "hold no more than these need. all: every one, as in the reference's geometry and with tiles.halo_px=widest.",
    )
    regions: _Names = Field(
        default=(),
        description="Names or classes of the outlines in a slide's roi_path that are its regions of interest. Empty: "
        "all.",
    )
    folder: AbsolutePath | None = Field(
        default=None,
        description="For given: folder of the files of the slides whose tissue_mask_path is not in the manifest, each "
        "called as its slide. null: a folder tissue or tissue_masks beside the slide.",
    )
    values: _Greys = Field(
        default=(),
        description="For given: values of masks that are tissue; every other value is none. Empty: 1 of 1 to 7, which "
        "is clean tissue of GrandQC, else everything but 0.",
    )
    outlines: _Names = Field(
        default=(),
        description="For given: names or classes of outlines that are tissue. Empty: tissue, where an outline is "
        "called so, else all.",
    )

    @model_validator(mode="after")
    def _fits_together(self) -> "TissueParams":
        for name in ("folder", "values", "outlines"):
            if getattr(self, name) and self.method != "given":
                raise ValueError(
                    f"tissue.{name} is set, but tissue={self.method} finds tissue itself: add tissue=given"
                )
        return self

    @model_serializer(mode="wrap")
    def _without_defaults(self, plain: SerializerFunctionWrapHandler) -> dict[str, Any]:
        values: dict[str, Any] = plain(self)
        return {name: value for name, value in values.items() if name not in _LATER_KEYS or value not in _UNSET}


_LATER_KEYS = frozenset({"windows", "regions", "folder", "values", "outlines"})
_UNSET: tuple[object, ...] = ("all", (), [], None)  # JSON has lists where Python has tuples


class ReferenceIndex(NamedTuple):
    """The tile index of the reference system, in which one thumbnail pixel stands for one tile."""

    vector: NDArray[np.int64]
    """Shape (9,): ny, nx, 3, xmin, xmax, ymin, ymax, nrows, ncols; xmax and ymax are exclusive."""
    mask: NDArray[np.bool_]
    """Shape (ny, nx): True for tissue."""
    tile_rows_cols: NDArray[np.int64]
    """Shape (nrows * ncols, 2): row and column of every tile of the kept rectangle, row by row."""
    is_tissue: NDArray[np.bool_]
    """Shape (nrows * ncols,): True for the tiles of the kept rectangle that are tissue."""


def tissue_mask(overview: NDArray[np.uint8], params: TissueParams) -> NDArray[np.bool_]:
    """Return the tissue mask of an overview.

    ``adaptive`` compares each pixel with the slide's glass, see `wsiflow.plan.glass`. With the other methods pixels are
    tissue if their saturation is above Otsu's threshold and their chroma is at least ``min_chroma``, so that an empty
    slide, white or black, has no tissue. With ``hsv_otsu`` the hues of these pixels are split by Otsu's method
    as well. The group of lower hues is dropped only where the two groups are far apart, as ink and tissue are; hues
    above blue (110) and reds (below 15) are always kept. A hue threshold on the whole image, as in the reference, loses
    red tissue, treats the hue of grey glass as a signal, and splits violet tissue on bluish glass.

    Args:
        overview: uint8 (rows, cols, 3), RGB.
        params: The settings. With the method ``given`` the mask comes from a file, and the overview is not looked at.

    Returns:
        bool (rows, cols).
    """
    if params.method in {"all", "given"}:
        return np.ones(overview.shape[:2], dtype=np.bool_)
    if params.method == "adaptive":
        return cleaned(tissue_by_glass(overview, least_tint=params.min_chroma), params)
    hue, saturation = _hue_and_saturation(overview)
    chroma = overview.max(axis=2) - overview.min(axis=2)
    mask: NDArray[np.bool_] = (saturation > _otsu(saturation)) & (chroma >= params.min_chroma)
    if params.method == "hsv_otsu":
        mask &= _tissue_hues(hue, mask)
    return cleaned(mask, params)


def cleaned(mask: NDArray[np.bool_], params: TissueParams) -> NDArray[np.bool_]:
    """Return a mask, bool (rows, cols), whose gaps are closed, without its small pieces."""
    return _without_small_objects(_closed(mask, params.closing_px), params.min_object_px)


def tile_coverage(
    mask: NDArray[np.bool_], *, downsample: float, tile_l0_px: float, grid: tuple[int, int]
) -> NDArray[np.float64]:
    """Return the exact fraction of every tile that is tissue.

    Args:
        mask: bool (rows, cols), the tissue on the overview.
        downsample: Level-0 pixels per overview pixel.
        tile_l0_px: Side of a tile in level-0 pixels, not necessarily a multiple of ``downsample``.
        grid: Number of rows and columns of the tile grid.

    Returns:
        float64 of shape ``grid``, 0 to 1. Of a tile that extends beyond the overview only the part inside counts; a
        tile outside the overview has coverage 0.
    """
    summed = np.pad(mask, ((1, 0), (1, 0))).cumsum(axis=0, dtype=np.float64).cumsum(axis=1)
    m_edges = [
        np.minimum(np.arange(cells + 1) * (tile_l0_px / downsample), extent)
        for cells, extent in zip(grid, mask.shape, strict=True)
    ]
    at_corners = _between(_between(summed, m_edges[0]).T, m_edges[1]).T
    tissue = np.diff(np.diff(at_corners, axis=0), axis=1)
    area = np.outer(np.diff(m_edges[0]), np.diff(m_edges[1]))
    # Differences of large sums have rounding errors of about 1e-9, which must not turn a tile of glass into tissue. For
    # a sliver at the border the division magnifies them, so the result is clipped.
    coverage = np.divide(tissue, area, out=np.zeros_like(tissue), where=area > 0).round(6)
    return np.clip(coverage, 0, 1)


def select_tiles(coverage: NDArray[np.float64], params: TissueParams) -> NDArray[np.bool_]:
    """Return which tiles have enough tissue or are their neighbours.

    Args:
        coverage: float64 (rows, cols), the fraction of each tile that is tissue.
        params: The settings, of which ``min_coverage`` and ``dilate_tiles`` are used.

    Returns:
        bool (rows, cols).
    """
    enough = (coverage > 0) & (coverage >= params.min_coverage)
    around = np.ones((3, 3), dtype=np.uint8)
    return cv2.dilate(enough.astype(np.uint8), around, iterations=params.dilate_tiles) > 0


def touching_cells(
    mask: NDArray[np.bool_], tiles: NDArray[np.bool_], frame: Frame, *, downsample: float
) -> NDArray[np.bool_]:
    """Return which heatmap cells of the selected tiles have a window that touches tissue.

    Args:
        mask: bool (rows, cols), the tissue on the overview.
        tiles: bool (rows, cols), the selected tiles.
        frame: The slide's transform, in the centred convention.
        downsample: Level-0 pixels per overview pixel.

    Returns:
        bool (n, m, m), the cells of each selected tile, in row-major order of the tiles. A window touches tissue where
        it holds a part, however small, of a pixel of the mask.
    """
    summed = np.pad(mask, ((1, 0), (1, 0))).cumsum(axis=0, dtype=np.int32).cumsum(axis=1, dtype=np.int32)
    first, last = (
        [_tile_edges(frame, downsample, tiles.shape[axis], mask.shape[axis], far=far) for axis in (0, 1)]
        for far in (False, True)
    )
    places = np.argwhere(tiles)
    cells = np.empty((len(places), frame.cells_per_tile, frame.cells_per_tile), np.bool_)
    for begin in range(0, len(places), _TILES_AT_ONCE):
        rows, cols = places[begin : begin + _TILES_AT_ONCE].T
        above, below = first[0][rows, :, None], last[0][rows, :, None]
        left, right = first[1][cols, None], last[1][cols, None]
        inside = summed[below, right] - summed[above, right] - summed[below, left] + summed[above, left]
        cells[begin : begin + _TILES_AT_ONCE] = inside > 0
    return cells


def with_whole_squares(cells: NDArray[np.bool_], side: int) -> NDArray[np.bool_]:
    """Return cells, bool (n, m, m), with the rest of each square of ``side`` cells of which any is True."""
    n, m, _ = cells.shape
    squares = cells.reshape(n, m // side, side, m // side, side).any(axis=(2, 4))
    return squares.repeat(side, axis=1).repeat(side, axis=2)


def _tile_edges(frame: Frame, downsample: float, tiles: int, m_side: int, *, far: bool) -> NDArray[np.intp]:
    """Return where windows begin or, with ``far``, end on an axis of the overview, (tiles, m), in whole pixels."""
    before, _ = window_reach_px(frame.window_px, frame.stride_px, frame.convention)
    starts_px = np.arange(tiles * frame.cells_per_tile) * frame.stride_px - before
    # Products of fractions may be a millionth of a pixel off, which must not count as another pixel.
    edges = ((starts_px + frame.window_px * far) * (frame.l0_per_px / downsample)).round(6)
    whole = np.ceil(edges) if far else np.floor(edges)
    return np.asarray(whole.clip(0, m_side), np.intp).reshape(tiles, frame.cells_per_tile)


def reference_index(thumbnail: NDArray[np.uint8]) -> ReferenceIndex:
    """Return the reference system's tile index for a thumbnail.

    Args:
        thumbnail: uint8 (ny, nx, 3), RGB, one pixel per tile.

    Returns:
        The index, which lists no tile if there is no tissue.
    """
    return reference_index_of(reference_mask(thumbnail))


def reference_mask(thumbnail: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Return the reference system's tissue mask: hue and saturation are at least Otsu's thresholds of the whole image.

    Args:
        thumbnail: uint8 (ny, nx, 3), RGB.

    Returns:
        bool (ny, nx).
    """
    hue, saturation = _hue_and_saturation(thumbnail)
    least_hue, least_saturation = reference_thresholds(thumbnail)
    return (hue >= least_hue) & (hue <= REFERENCE_HUE_LIMIT) & (saturation >= least_saturation)


def reference_thresholds(thumbnail: NDArray[np.uint8]) -> tuple[int, int]:
    """Return the reference system's lower bounds of hue and saturation for a thumbnail, uint8 (ny, nx, 3), RGB."""
    hue, saturation = _hue_and_saturation(thumbnail)
    return _otsu(hue), _otsu(saturation)


def reference_index_of(mask: NDArray[np.bool_]) -> ReferenceIndex:
    """Return the reference system's tile index for a tissue mask.

    Args:
        mask: bool (ny, nx), one pixel per tile.

    Returns:
        The index, which lists no tile if there is no tissue.
    """
    ny, nx = mask.shape
    t_rows, t_cols = (np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0))
    box = (t_cols[0], t_cols[-1] + 1, t_rows[0], t_rows[-1] + 1) if t_rows.size else (0, 0, 0, 0)
    vector = reference_vector((ny, nx), box)
    xmin, ymin, nrows, ncols = vector[[3, 5, 7, 8]]
    t_row, t_col = np.mgrid[ymin : ymin + nrows, xmin : xmin + ncols].reshape(2, -1)
    return ReferenceIndex(vector, mask, np.stack([t_row, t_col], axis=1), mask[t_row, t_col])


def reference_vector(shape: tuple[int, int], box: tuple[int, int, int, int]) -> NDArray[np.int64]:
    """Return the nine numbers that the reference system stores for a slide, see `ReferenceIndex.vector`.

    Args:
        shape: Number of rows and columns of the thumbnail.
        box: xmin, xmax, ymin, ymax of the tissue in thumbnail pixels, the maxima exclusive; all 0 without tissue.

    Returns:
        int64 (9,). The kept rectangle has one row and one column more than the box, unless the thumbnail ends there.
    """
    ny, nx = shape
    xmin, xmax, ymin, ymax = box
    nrows = min(ymax, ny - 1) - ymin + 1 if ymax else 0
    ncols = min(xmax, nx - 1) - xmin + 1 if xmax else 0
    return np.array([ny, nx, 3, xmin, xmax, ymin, ymax, nrows, ncols], dtype=np.int64)


def _hue_and_saturation(rgb: NDArray[np.uint8]) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Return OpenCV's hue and saturation, each uint8 (rows, cols), of an image (rows, cols, 3), RGB."""
    hsv = np.asarray(cv2.cvtColor(np.ascontiguousarray(rgb), cv2.COLOR_RGB2HSV), dtype=np.uint8)
    return hsv[..., 0], hsv[..., 1]


def _otsu(values: NDArray[np.integer]) -> int:
    """Return Otsu's threshold, the largest value of the lower class; of a constant array, its only value."""
    return int(skimage.filters.threshold_otsu(values))  # type: ignore[no-untyped-call]


def _tissue_hues(hue: NDArray[np.uint8], coloured: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Return where the hue may be that of tissue, bool (rows, cols); the threshold is that of the coloured pixels."""
    # The scale is rotated to begin above the reds, which then lie beside the pinks.
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
    """Return the morphological closing of a mask by a disc; pixels outside the image do not influence it."""
    disc = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * radius_px + 1, 2 * radius_px + 1))
    return cv2.morphologyEx(mask.astype(np.uint8), cv2.MORPH_CLOSE, disc) > 0


def _without_small_objects(mask: NDArray[np.bool_], least_px: int) -> NDArray[np.bool_]:
    """Return a mask without its 8-connected components of less than ``least_px`` pixels."""
    _, labels, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=8)
    keep = stats[:, cv2.CC_STAT_AREA] >= least_px
    keep[0] = False
    return np.asarray(keep[labels], dtype=np.bool_)


def _between(values: NDArray[np.float64], at: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the linear interpolation between the rows of an array.

    Args:
        values: float64 (rows, cols).
        at: float64 (n,), row numbers, not necessarily whole.

    Returns:
        float64 (n, cols).
    """
    below = np.minimum(at.astype(np.intp), len(values) - 2)
    weight = (at - below)[:, np.newaxis]
    return np.asarray(values[below] * (1 - weight) + values[below + 1] * weight)
