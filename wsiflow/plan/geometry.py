"""The coordinate planes of a slide and all conversions between them.

Planes and the prefixes of their names:

* ``l0_``  pixels of the slide's level 0.
* ``r_``   pixels of the reading plane, at the spacing that the model expects. One reading pixel covers ``l0_per_px``
  level-0 pixels, the same in x and y; this is 1.0 where level 0 is read unchanged.
* ``t_``   tile cells: column and row of the tissue grid in the reading plane. Tile (0, 0) begins at the slide's corner.
* ``h_``   heatmap cells: ``stride_px`` reading pixels a side, counted from the first tile of the heatmap.

Points are x, y; arrays are rows, columns.

There are two conventions for the place of a score. ``centred`` (the default): the window is centred on the heatmap cell
that holds its score. ``reference``: the window is centred on the cell's top-left corner, and patches at the slide's
border are shifted inwards as in Li, Mikailov and Chen (IEEE TAI 2023), so that results can be compared with theirs.
"""

from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, Field, FiniteFloat

from wsiflow.errors import InputError

Convention = Literal["centred", "reference"]


class Frame(NamedTuple):
    """The transform between all planes of a slide, which is stored with every array of the slide.

    Attributes:
        convention: Place of a score within its heatmap cell.
        l0_width_px, l0_height_px: Size of level 0.
        l0_per_px: Level-0 pixels per reading pixel.
        um_px: Size of a reading pixel in micrometres.
        tile_px, window_px, stride_px, halo_px: Sizes in reading pixels.
        block_rows, block_cols: Maximum number of tile rows and columns of a block.
        t_col0, t_row0: Column and row of the first tile of the heatmap.
        t_cols, t_rows: Number of tile columns and rows of the heatmap.
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
        """Return the length in reading pixels of a row of ``tiles`` tiles, including the halo on both sides."""
        return tiles * self.tile_px + 2 * self.halo_px

    def pixel_settings(self) -> dict[str, Any]:
        """Return the fields that decide which pixels are read for blocks: all but the sizes of windows and strides."""
        return {name: value for name, value in self._asdict().items() if name not in {"window_px", "stride_px"}}

    @property
    def cells_per_tile(self) -> int:
        """Number of heatmap cells along a side of a tile."""
        return self.tile_px // self.stride_px

    @property
    def h_shape(self) -> tuple[int, int]:
        """Number of rows and columns of the heatmap."""
        return self.t_rows * self.cells_per_tile, self.t_cols * self.cells_per_tile


def reading_scale(um_px_l0: float, um_px_target: float, *, tolerance: float) -> float:
    """Return the level-0 pixels per reading pixel; 1.0 where the slide's spacing is within the tolerance of the target.

    Args:
        um_px_l0: Spacing of level 0, um per px.
        um_px_target: Spacing of the reading plane, um per px.
        tolerance: Relative difference up to which level 0 is read unchanged.
    """
    return 1.0 if abs(um_px_l0 / um_px_target - 1) <= tolerance else um_px_target / um_px_l0


def r_size_px(l0_px: int, l0_per_px: float) -> int:
    """Return how many reading pixels cover ``l0_px`` level-0 pixels; the last one may reach beyond them."""
    return int(np.ceil(round(l0_px / l0_per_px, 6)))


def grid_shape(l0_width_px: int, l0_height_px: int, *, l0_per_px: float, tile_px: int) -> tuple[int, int]:
    """Return the rows and columns of the tile grid that covers a slide; the last ones may reach beyond its border."""
    rows, cols = (-(-r_size_px(side, l0_per_px) // tile_px) for side in (l0_height_px, l0_width_px))
    return rows, cols


def patch_origin_px(frame: Frame, t_col: int, t_row: int) -> tuple[int, int]:
    """Return the reading-plane x, y of the top-left pixel, halo included, of a block with this first tile.

    In the reference convention, where blocks are single tiles, the first tile of an axis has no halo before it. A patch
    that would reach beyond the slide's far border is shifted back to one pixel past that border, as in the published
    system (``D - 447`` for a 448 px patch on a side of D px).
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
    """Return how far the windows of a tile reach beyond its near (left, top) and its far side, in reading pixels."""
    before = window_px // 2 - (stride_px // 2 if convention == "centred" else 0)
    return before, window_px - before - stride_px


def subsampling(fine: Frame, coarse: Frame) -> tuple[int, int]:
    """Return which cells of a fine heatmap have the same windows as a coarse one.

    A window begins at a multiple of the stride minus its reach beyond the cell. In the reference convention that reach
    is the same at every stride. In the centred convention it is shorter by half a stride, so windows of both maps
    coincide only where the centre of a coarse cell is the centre of a fine one: where the coarse stride is an odd
    multiple of the fine stride.

    Args:
        fine: Transform of the existing map.
        coarse: Transform of the map to derive from it.

    Returns:
        The step and the first cell, the same along rows and columns: the cells ``first::step``.

    Raises:
        InputError: The maps have no windows in common; the message says why.
    """
    free = {"halo_px", "block_rows", "block_cols"}
    same = {name: value for name, value in fine.pixel_settings().items() if name not in free}
    differing = [name for name, value in same.items() if value != getattr(coarse, name)]
    if fine.window_px != coarse.window_px or differing:
        raise _not_taken(coarse, f"the maps differ in {', '.join(differing or ['window_px'])}")
    step, rest = divmod(coarse.stride_px, fine.stride_px)
    if rest or step < 1:
        raise _not_taken(coarse, f"it is not a multiple of stride {fine.stride_px}")
    reaches = (window_reach_px(each.window_px, each.stride_px, each.convention)[0] for each in (fine, coarse))
    shift_px = next(reaches) - next(reaches)
    first, rest = divmod(shift_px, fine.stride_px)
    if rest:
        cause = f"it is an even multiple of stride {fine.stride_px}, so its cells' centres lie between those of the map"
        raise _not_taken(coarse, cause)
    return step, first


def _not_taken(coarse: Frame, cause: str) -> InputError:
    remedy = "run at that stride, or take an odd multiple (any, in the reference's convention)"
    return InputError(f"stride {coarse.stride_px} cannot be taken from a finer map: {cause}", remedy)


def window_offsets_px(frame: Frame) -> NDArray[np.int64]:
    """Return the top-left x, y of every window of a tile, relative to the tile's top-left pixel, row by row.

    In the centred convention the window's centre is the cell's centre (its lower-right middle pixel where the stride is
    odd). In the reference convention the window's centre is the cell's top-left corner.

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
    """Return the level-0 x, y of the scores of heatmap cells.

    Args:
        frame: The slide's transform.
        h_points: float64 (n, 2), column and row of cells; fractions are positions between cells.

    Returns:
        float64 (n, 2), x and y in level-0 pixels: cell centres, or corners in the reference convention.
    """
    half = 0.5 if frame.convention == "centred" else 0.0
    t_origin = np.array([frame.t_col0, frame.t_row0]) * frame.tile_px
    return (t_origin + (np.asarray(h_points) + half) * frame.stride_px) * frame.l0_per_px


def cells_on_slide(frame: Frame) -> tuple[int, int]:
    """Return how many rows and columns of the heatmap have scores whose place is on the slide.

    The last tiles may reach beyond the slide. The pixels there are padding, and a detection there would be false.
    """
    rows, cols = frame.h_shape
    l0 = l0_from_h(frame, np.column_stack([np.arange(max(rows, cols))] * 2).astype(np.float64))
    return int((l0[:rows, 1] < frame.l0_height_px).sum()), int((l0[:cols, 0] < frame.l0_width_px).sum())


def l0_from_h_corner(frame: Frame, h_col: float, h_row: float) -> tuple[float, float]:
    """Return the level-0 x, y of the top-left corner of a heatmap cell, the same in both conventions."""
    x, y = (
        (first * frame.tile_px + h * frame.stride_px) * frame.l0_per_px
        for first, h in ((frame.t_col0, h_col), (frame.t_row0, h_row))
    )
    return x, y


MAX_UPSAMPLE = 16
"""Upper limit of the setting `max_upsample`: pixels enlarged further contain no information for a model."""


class GeometryParams(BaseModel, frozen=True, extra="forbid"):
    """Which plane is read and where scores belong."""

    convention: Convention = Field(
        description="Where a score belongs. centred: at the centre of its heatmap cell. reference: at the cell's "
        "corner, the geometry of Li, Mikailov and Chen with its shifts at the border."
    )
    spacing: Literal["model", "native"] | Annotated[FiniteFloat, Field(gt=0, le=100)] = Field(
        description="Spacing at which slides are read. model: the one the model was trained for. native: level 0 as it "
        "is. A number: um per pixel. The window keeps its number of pixels, so that at another spacing than its own a "
        "model sees another piece of the slide."
    )
    tolerance: float = Field(
        ge=0,
        lt=0.5,
        description="Largest difference, as a fraction, between a slide's spacing and the requested one at which the "
        "slide is read as it is.",
    )
    max_upsample: float = Field(
        ge=1,
        le=MAX_UPSAMPLE,
        description="How many times a slide that is coarser than the requested spacing may be enlarged; coarser slides "
        "are refused.",
    )
