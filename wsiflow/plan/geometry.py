"""Planes, and every conversion between them.

Planes and their prefixes:

* ``l0_``  pixels of the slide's level 0.
* ``r_``   pixels of the reading plane: the spacing the model wants. One reading pixel covers ``l0_per_px`` level-0
  pixels, the same in x and y; 1.0 where the slide is read as it is.
* ``t_``   tile cells: column and row of the tissue grid in the reading plane. Tile (0, 0) starts at the slide's corner.
* ``h_``   heatmap cells: ``stride_px`` reading pixels a side, counted from the first tile of the map.

Points are x, y; arrays are rows, columns.

Two conventions say where a score belongs. ``centred`` (default): the window is centred on the heatmap cell that takes
its score. ``reference``: the window is centred on the cell's top-left corner, and patches at the slide's border are
shifted inwards as in Li, Mikailov and Chen (IEEE TAI 2023), so that results can be compared with that system.
"""

from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, Field, FiniteFloat

Convention = Literal["centred", "reference"]


class Frame(NamedTuple):
    """The one transform that is stored with every array of a slide.

    Attributes:
        convention: Where in its heatmap cell a score belongs.
        l0_width_px, l0_height_px: Size of level 0.
        l0_per_px: Level-0 pixels per reading pixel.
        um_px: Size of a reading pixel in micrometres.
        tile_px, window_px, stride_px, halo_px: Sizes in reading pixels.
        block_rows, block_cols: Most tile rows and columns of a block.
        t_col0, t_row0: First tile of the heatmap.
        t_cols, t_rows: Tiles of the heatmap.
    """

    convention: Convention
    l0_width_px: int
    l0_height_px: int
    l0_per_px: float
    um_px: float
    tile_px: int
    window_px: int
    stride_px: int
    halo_px: int
    block_rows: int
    block_cols: int
    t_col0: int
    t_row0: int
    t_cols: int
    t_rows: int

    def block_px(self, tiles: int) -> int:
        """Return how many reading pixels so many tiles in a line have with their halo."""
        return tiles * self.tile_px + 2 * self.halo_px

    def pixel_settings(self) -> dict[str, Any]:
        """Return the transform as far as it concerns which pixels blocks have: windows and scores do not matter."""
        return {name: value for name, value in self._asdict().items() if name not in {"window_px", "stride_px"}}

    @property
    def cells_per_tile(self) -> int:
        """Heatmap cells per tile side."""
        return self.tile_px // self.stride_px

    @property
    def h_shape(self) -> tuple[int, int]:
        """Rows and columns of the heatmap."""
        return self.t_rows * self.cells_per_tile, self.t_cols * self.cells_per_tile


def reading_scale(um_px_l0: float, um_px_target: float, *, tolerance: float) -> float:
    """Return the level-0 pixels per reading pixel: 1.0 where the slide's spacing is near enough to the wanted one.

    Args:
        um_px_l0: The slide's level-0 spacing.
        um_px_target: The spacing to read at.
        tolerance: Relative difference up to which the slide is read as it is.
    """
    return 1.0 if abs(um_px_l0 / um_px_target - 1) <= tolerance else um_px_target / um_px_l0


def r_size_px(l0_px: int, l0_per_px: float) -> int:
    """Return how many reading pixels cover ``l0_px`` level-0 pixels, the last one perhaps in part."""
    return int(np.ceil(round(l0_px / l0_per_px, 6)))


def grid_shape(l0_width_px: int, l0_height_px: int, *, l0_per_px: float, tile_px: int) -> tuple[int, int]:
    """Return rows and columns of the tile grid that covers the whole slide, the last row and column perhaps in part."""
    rows, cols = (-(-r_size_px(side, l0_per_px) // tile_px) for side in (l0_height_px, l0_width_px))
    return rows, cols


def patch_origin_px(frame: Frame, t_col: int, t_row: int) -> tuple[int, int]:
    """Return the reading-plane x, y of the top-left pixel of the block whose first tile is ``t_col, t_row``.

    In the reference convention, whose blocks are single tiles, the first tile of an axis has no halo before it, and a
    patch that would pass the slide's far side is shifted back to one pixel past the edge (``D - 447`` for a 448 px
    patch: oracle O-4).
    """
    return (
        _axis_origin_px(frame, t_col, frame.l0_width_px),
        _axis_origin_px(frame, t_row, frame.l0_height_px),
    )


def _axis_origin_px(frame: Frame, index: int, side_px: int) -> int:
    origin = frame.tile_px * index - frame.halo_px
    if frame.convention == "centred":
        return origin
    if index == 0:
        origin = 0
    patch_px = frame.block_px(1)
    return side_px - (patch_px - 1) if origin + patch_px > side_px else origin


def window_reach_px(window_px: int, stride_px: int, convention: Convention) -> tuple[int, int]:
    """Return how far the windows of a tile reach beyond its near (left, top) and far side, in reading pixels."""
    before = window_px // 2 - (stride_px // 2 if convention == "centred" else 0)
    return before, window_px - before - stride_px


def subsampling(fine: Frame, coarse: Frame) -> tuple[int, int] | str:
    """Return which cells of a fine map have the windows of a coarse one, or why none have.

    A window of the coarse map begins at a multiple of its stride less what its window reaches beyond the cell. In the
    reference convention that reach is the same at every stride. Centred, it is half a stride less, so the windows of
    both meet where the coarse cell's centre is a fine cell's: the coarse stride is an odd multiple of the fine one.

    Args:
        fine: Transform of the map that there is.
        coarse: Transform of the map that is wanted.

    Returns:
        Step and first cell, along rows and columns alike: the cells ``first::step``. Or the reason in one line.
    """
    same = {
        name: value
        for name, value in fine.pixel_settings().items()
        if name not in {"halo_px", "block_rows", "block_cols"}
    }
    differing = [name for name, value in same.items() if value != getattr(coarse, name)]
    if fine.window_px != coarse.window_px or differing:
        return f"the maps differ in {', '.join(differing or ['window_px'])}"
    step, rest = divmod(coarse.stride_px, fine.stride_px)
    if rest or step < 1:
        return f"stride {coarse.stride_px} is no multiple of stride {fine.stride_px}"
    reaches = (window_reach_px(each.window_px, each.stride_px, each.convention)[0] for each in (fine, coarse))
    shift_px = next(reaches) - next(reaches)
    first, rest = divmod(shift_px, fine.stride_px)
    if rest:
        strides = f"stride {coarse.stride_px} is an even multiple of stride {fine.stride_px}"
        return f"{strides}: the centres of its cells lie between those of the fine map"
    return step, first


def window_offsets_px(frame: Frame) -> NDArray[np.int64]:
    """Return the top-left x, y of every window of one tile, relative to that tile's top-left pixel, row by row.

    Centred: the window's centre is the cell's centre (its lower-right middle pixel where the stride is odd).
    Reference: the window's centre is the cell's top-left corner.

    Returns:
        int64 (cells_per_tile ** 2, 2), x and y in reading pixels.
    """
    before, _ = window_reach_px(frame.window_px, frame.stride_px, frame.convention)
    steps = np.arange(frame.cells_per_tile) * frame.stride_px - before
    rows, cols = np.meshgrid(steps, steps, indexing="ij")
    return np.stack([cols.ravel(), rows.ravel()], axis=1).astype(np.int64)


def h_from_t(frame: Frame, t_col: int, t_row: int) -> tuple[int, int]:
    """Return the heatmap row and column of the first cell of a tile."""
    m = frame.cells_per_tile
    return (t_row - frame.t_row0) * m, (t_col - frame.t_col0) * m


def l0_from_h(frame: Frame, h_points: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the level-0 x, y to which the scores of heatmap cells belong.

    Args:
        frame: The slide's transform.
        h_points: float64 (n, 2), column and row of cells; a fraction lies between cells.

    Returns:
        float64 (n, 2), x and y in level-0 pixels: cell centres, or corners in the reference convention.
    """
    half = 0.5 if frame.convention == "centred" else 0.0
    t_origin = np.array([frame.t_col0, frame.t_row0]) * frame.tile_px
    return (t_origin + (np.asarray(h_points) + half) * frame.stride_px) * frame.l0_per_px


def cells_on_slide(frame: Frame) -> tuple[int, int]:
    """Return how many rows and columns of the heatmap have the place of their score on the slide.

    The last tiles may reach beyond the slide; what is there is padding, and a score of it would be a detection nowhere.
    """
    rows, cols = frame.h_shape
    l0 = l0_from_h(frame, np.column_stack([np.arange(max(rows, cols))] * 2).astype(np.float64))
    return int((l0[:rows, 1] < frame.l0_height_px).sum()), int((l0[:cols, 0] < frame.l0_width_px).sum())


def l0_from_h_corner(frame: Frame, h_col: float, h_row: float) -> tuple[float, float]:
    """Return the level-0 x, y of the top-left corner of the area that a heatmap cell covers."""
    x, y = (
        (first * frame.tile_px + h * frame.stride_px) * frame.l0_per_px
        for first, h in ((frame.t_col0, h_col), (frame.t_row0, h_row))
    )
    return x, y


MAX_UPSAMPLE = 16
"""Pixels enlarged more often than this hold nothing a model could know."""


class GeometryParams(BaseModel, frozen=True, extra="forbid"):
    """Which plane is read and where scores belong.

    Attributes:
        convention: ``centred``, or ``reference`` for the geometry of Li, Mikailov and Chen with its shifts.
        spacing: ``model`` reads at the spacing the model was trained for, ``native`` reads level 0 as it is, a number
            of um per pixel reads at that. The window keeps its pixels: at another spacing than its own a model sees
            another piece of the slide.
        tolerance: A slide whose spacing differs from the wanted one by at most this fraction is read as it is.
        max_upsample: How many times a slide coarser than the wanted spacing may be enlarged; coarser ones are refused.
    """

    convention: Convention
    spacing: Literal["model", "native"] | Annotated[FiniteFloat, Field(gt=0, le=100)]
    tolerance: float = Field(ge=0, lt=0.5)
    max_upsample: float = Field(ge=1, le=MAX_UPSAMPLE)
