"""Division of tissue tiles into blocks, which are read and predicted as one, and groups, the units of array tasks.

Input: a boolean grid of tissue tiles, and which of their heatmap cells are scored. Output: blocks (rectangles of tiles,
cropped to their scored cells) in row-major order, and groups (runs of consecutive blocks whose costs are as equal as
the order allows).

Every block is read with a halo, so its cost is its area including the halo. Each piece of tissue is cut into strips of
rows or of columns, whichever cost less, such that the sum of these areas is minimal. Within a strip, each run of tiles
with tissue becomes a block, or several of equal length where one would be too large. Two runs are joined where reading
the gap costs less than a second halo. No block is larger than one of ``block_rows`` x ``block_cols`` tiles, or longer,
but its shape may be another: the memory of a worker follows from its area. The sides of blocks are whole tiles, though
they may begin at any cell, because the first block of every shape costs a worker time and memory: a backend prepares
its kernels for each shape, which takes OpenVINO up to 0.3 s and 20 MB for GoogLeNet.
"""

import math
from collections.abc import Iterable, Iterator
from itertools import pairwise
from typing import Annotated, Literal, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, Field

from wsiflow.plan import geometry
from wsiflow.plan.geometry import Frame


class TilesParams(BaseModel, frozen=True, extra="forbid"):
    """How the tissue grid is cut."""

    tile_px: int = Field(ge=16, le=4096, description="Side of a tile, reading pixels.")
    halo_px: Annotated[int, Field(ge=0, le=4096)] | Literal["auto", "widest"] = Field(
        description="Context that is read around each block, reading pixels a side. auto: what the windows and the "
        "network need. widest: what they would need at the finest stride, so that all strides of a sweep read the same "
        "pixels."
    )
    block_rows: int = Field(ge=1, le=64, description="Tile rows of the largest block; see block_cols.")
    block_cols: Annotated[int, Field(ge=1, le=256)] | Literal["auto"] = Field(
        description="Tile columns of the largest block: no block reads more pixels than one of block_rows x block_cols "
        "tiles, or is longer, whatever its shape. auto: as many as memory_mb allows, with fewer rows where they have "
        "to be. One row and one column with a halo of 112 pixels are the reference's 448 px patches."
    )
    memory_mb: int = Field(ge=100, description="Memory that the activations of a worker's network may take, MB.")
    group_tiles: int = Field(
        ge=1, description="Most tissue tiles that a group should hold. One group is one array task."
    )


class BlockLimits(NamedTuple):
    """The sizes and limits by which a tissue grid is divided into blocks.

    Attributes:
        tile_px: Side of a tile, reading pixels.
        halo_px: Width of the context that is read on each side of a block, reading pixels.
        block_rows, block_cols: Tile rows and columns of the largest block; others may have other shapes.
    """

    tile_px: int
    halo_px: int
    block_rows: int
    block_cols: int

    @property
    def area_px(self) -> int:
        """How many pixels are read for the largest block, including its halo."""
        return self.side_px(self.block_rows) * self.side_px(self.block_cols)

    @property
    def widest_gap(self) -> int:
        """Number of tiles without tissue whose reading costs less than a second halo."""
        return max(0, (2 * self.halo_px - 1) // self.tile_px)

    def side_px(self, tiles: int) -> int:
        """Return the length in reading pixels of a row of tiles, including the halo on both sides."""
        return tiles * self.tile_px + 2 * self.halo_px

    def most_cols(self, rows: int) -> int:
        """Return how many columns a block of a number of rows may have; 0 where it has too many rows."""
        longest = max(self.block_rows, self.block_cols)
        by_area = (self.area_px // self.side_px(rows) - 2 * self.halo_px) // self.tile_px
        return 0 if rows > longest else max(0, min(by_area, longest))


class Crop(NamedTuple):
    """The heatmap cells that a block is read for, whole tiles a side, counted from the corner of its first tile."""

    first_col: int
    first_row: int
    cols: int
    rows: int


class Block(NamedTuple):
    """A rectangle of tiles that is read and predicted as one.

    Attributes:
        t_col, t_row: Column and row on the tile grid of its first (top left) tile.
        cols, rows: Size in tiles.
        tissue: Indices of the tiles with tissue, counted row by row within the block.
        crop: What of the rectangle is read, besides the halo; None for all of it.
        scored: The scored cells of each tile with tissue, bool (n, m, m) packed to bits; empty for all.
    """

    t_col: int
    t_row: int
    cols: int
    rows: int
    tissue: tuple[int, ...]
    crop: Crop | None = None
    scored: bytes = b""

    def corners(self) -> list[tuple[int, int]]:
        """Return the column and row within the block of each tissue tile, in the order of `tissue`."""
        return [(i % self.cols, i // self.cols) for i in self.tissue]

    def cells(self) -> list[tuple[int, int]]:
        """Return the column and row on the tile grid of each tissue tile, in the order of `tissue`."""
        return [(self.t_col + col, self.t_row + row) for col, row in self.corners()]


Rectangle = tuple[int, int, int, int]
"""First column, first row, number of columns and number of rows, in tiles."""


def blocks(tissue: NDArray[np.bool_], limits: BlockLimits, cells: NDArray[np.bool_] | None = None) -> list[Block]:
    """Return the blocks of a slide: each tissue tile is in exactly one, and each block is cropped to its scored cells.

    Args:
        tissue: bool (rows, cols), the tile grid.
        limits: Sizes of tiles and halo, and the size of the largest block.
        cells: bool (n, m, m), the scored cells of each tissue tile, row by row; None for all.
    """
    if not tissue.any():
        return []
    pieces = _pieces(tissue, limits)
    found = [
        (t_row + row, t_col + col, rows, cols)
        for t_col, t_row, piece in pieces
        for col, row, cols, rows in _rectangles(piece, limits)
    ]
    rectangles = [(t_col, t_row, cols, rows) for t_row, t_col, rows, cols in sorted(found)]
    # Blocks of single tiles are stored in one array, so that they are read whole.
    return blocks_at(tissue, rectangles, cells, crop=limits.block_rows * limits.block_cols > 1)


def blocks_at(
    tissue: NDArray[np.bool_], rectangles: Iterable[Rectangle], cells: NDArray[np.bool_] | None, *, crop: bool
) -> list[Block]:
    """Return the blocks that some rectangles are.

    Rectangles may overlap where a piece of tissue lies in the hollow of another one. A tile belongs to the first
    rectangle that holds it, and a rectangle of which nothing is left is no block.

    Args:
        tissue: bool (rows, cols), the tile grid.
        rectangles: First column, first row, number of columns and number of rows of each.
        cells: bool (n, m, m), the scored cells of each tissue tile, row by row; None for all.
        crop: Whether no more is read than the scored cells need.
    """
    left = tissue.copy()
    numbers = np.cumsum(tissue, dtype=np.int64).reshape(tissue.shape) - 1
    found = []
    for t_col, t_row, cols, rows in rectangles:
        inside = np.s_[t_row : t_row + rows, t_col : t_col + cols]
        own = left[inside].copy()
        left[inside] = False
        if not own.any():
            continue
        block = Block(t_col, t_row, cols, rows, tuple(np.flatnonzero(own).tolist()))
        if cells is not None:
            scored = cells[numbers[inside][own]]
            bits = b"" if scored.all() else np.packbits(scored).tobytes()
            block = block._replace(crop=_crop(block, scored) if crop else None, scored=bits)
        found.append(block)
    return found


def scored_cells(block: Block, m: int) -> NDArray[np.bool_]:
    """Return the scored cells of each tissue tile of a block, bool (n, m, m)."""
    shape = (len(block.tissue), m, m)
    if not block.scored:
        return np.ones(shape, np.bool_)
    bits = np.unpackbits(np.frombuffer(block.scored, np.uint8), count=math.prod(shape))
    return bits.astype(np.bool_).reshape(shape)


def crop_of(block: Block, m: int) -> Crop:
    """Return the heatmap cells that a block is read for."""
    return block.crop or Crop(0, 0, block.cols * m, block.rows * m)


def origin_px(frame: Frame, block: Block) -> tuple[int, int]:
    """Return the reading-plane x, y of a block's top-left pixel, halo included."""
    x, y = geometry.patch_origin_px(frame, block.t_col, block.t_row)
    crop = crop_of(block, frame.cells_per_tile)
    return x + crop.first_col * frame.stride_px, y + crop.first_row * frame.stride_px


def size_px(frame: Frame, block: Block) -> tuple[int, int]:
    """Return the rows and columns of a block with halo, reading pixels."""
    crop = crop_of(block, frame.cells_per_tile)
    return crop.rows * frame.stride_px + 2 * frame.halo_px, crop.cols * frame.stride_px + 2 * frame.halo_px


def _crop(block: Block, cells: NDArray[np.bool_]) -> Crop:
    """Return the smallest rectangle, whole tiles a side, of the scored cells, bool (n, m, m), of a block's tiles."""
    m = cells.shape[1]
    whole = np.zeros((block.rows * block.cols, m, m), np.bool_)
    whole[list(block.tissue)] = cells
    grid = whole.reshape(block.rows, block.cols, m, m)
    first_row, rows = _extent(grid.any(axis=(1, 3)).ravel(), m)
    first_col, cols = _extent(grid.any(axis=(0, 2)).ravel(), m)
    return Crop(first_col, first_row, cols, rows)


def _extent(scored: NDArray[np.bool_], m: int) -> tuple[int, int]:
    """Return the first cell and the number of cells, whole tiles of m cells, that hold the scored ones of an axis."""
    places = np.flatnonzero(scored)
    cells = -(-int(places[-1] - places[0] + 1) // m) * m
    return min(int(places[0]), len(scored) - cells), cells


def _pieces(tissue: NDArray[np.bool_], limits: BlockLimits) -> Iterator[tuple[int, int, NDArray[np.bool_]]]:
    """Yield the pieces of tissue that are too far apart to be joined: first column, first row, and tiles."""
    near = np.ones((limits.widest_gap + 1,) * 2, np.uint8)
    grown = cv2.dilate(tissue.astype(np.uint8), near, borderType=cv2.BORDER_CONSTANT, borderValue=0)
    count, labels, stats, _ = cv2.connectedComponentsWithStats(grown, connectivity=8)
    for label in range(1, count):
        left, top, cols, rows = stats[label, :4].tolist()
        inside = np.s_[top : top + rows, left : left + cols]
        yield left, top, tissue[inside] & (labels[inside] == label)


def _rectangles(tissue: NDArray[np.bool_], limits: BlockLimits) -> list[Rectangle]:
    """Return the blocks of a piece of tissue: strips of its rows, or of its columns where they cost less."""
    by_rows = _in_strips(tissue, limits)
    across = _in_strips(np.ascontiguousarray(tissue.T), limits)
    by_cols = [(row, col, rows, cols) for col, row, cols, rows in across]
    return min(by_rows, by_cols, key=lambda each: sum(_area_px(rectangle, limits) for rectangle in each))


def _in_strips(tissue: NDArray[np.bool_], limits: BlockLimits) -> list[Rectangle]:
    """Return the blocks of the strips of rows that cover all tissue with the least total area including halo."""
    costs, count = _strip_costs_px(tissue, limits), len(tissue)
    least, best = np.zeros(count + 1), np.ones(count, np.int64)
    for first in range(count - 1, -1, -1):
        rows = np.arange(1, min(len(costs), count - first) + 1)
        totals = costs[rows - 1, first] + least[first + rows]
        best[first] = rows[totals.argmin()]
        least[first] = totals.min()
    found, first = list[Rectangle](), 0
    while first < count:
        last = first + int(best[first])
        found += _of_strip(tissue, first, last, limits)
        first = last
    return found


def _strip_costs_px(tissue: NDArray[np.bool_], limits: BlockLimits) -> NDArray[np.float64]:
    """Return the pixels read for every strip that blocks may fill, by its number of rows minus 1 and its first row.

    Returns:
        float64 (most rows, rows); infinite for strips that would reach beyond the last row.
    """
    count, rows = len(tissue), np.arange(len(tissue), dtype=np.int64)[:, None]
    upwards = np.where(tissue, rows, count)[::-1]
    below = np.minimum.accumulate(upwards)[::-1]  # the next row with tissue, of each place
    above = np.maximum.accumulate(np.where(tissue, rows, -1))  # the last one
    occupied, costs = tissue, []
    for height in range(1, count + 1):
        if not limits.most_cols(height):
            break
        occupied = occupied if height == 1 else occupied[:-1] | tissue[height - 1 :]
        strips, begins, ends = _runs(occupied, limits.widest_gap)
        first = _over_runs(np.minimum, below[: count - height + 1], strips, begins, ends)
        last = _over_runs(np.maximum, above[height - 1 :], strips, begins, ends)
        blocks_each = -(-(ends - begins) // limits.most_cols(height))
        widths_px = (ends - begins) * limits.tile_px + blocks_each * 2 * limits.halo_px
        area_px = widths_px * ((last - first + 1) * limits.tile_px + 2 * limits.halo_px)
        each = np.bincount(strips, area_px, minlength=len(occupied))
        costs.append(np.append(each, np.full(height - 1, np.inf)))
    return np.array(costs)


def _runs(
    occupied: NDArray[np.bool_], widest_gap: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Return the row, the first and the last column, exclusive, of all runs along the rows of a grid.

    Runs are joined over gaps of at most ``widest_gap`` columns.
    """
    cols = occupied.shape[1]
    wide = np.pad(occupied, ((0, 0), (1, widest_gap + 1)))  # so that runs of two rows are not joined
    edges = np.flatnonzero(np.diff(wide.ravel().astype(np.int8))).reshape(-1, 2)
    apart = edges[1:, 0] - edges[:-1, 1] > widest_gap
    begins = edges[np.append(True, apart)[: len(edges)], 0]
    ends = edges[np.append(apart, True)[: len(edges)], 1]
    rows, firsts = np.divmod(begins, cols + widest_gap + 2)
    return rows, firsts, firsts + ends - begins


def _over_runs(
    ufunc: np.ufunc,
    values: NDArray[np.int64],
    rows: NDArray[np.int64],
    begins: NDArray[np.int64],
    ends: NDArray[np.int64],
) -> NDArray[np.int64]:
    """Return the minimum or maximum of the values, (rows, cols), of each run."""
    if not len(rows):
        return np.empty(0, np.int64)
    offsets = rows * values.shape[1]
    bounds = np.stack([offsets + begins, offsets + ends], axis=1).ravel()
    reduced: NDArray[np.int64] = ufunc.reduceat(np.append(values, 0), bounds)[::2]
    return reduced


def _of_strip(tissue: NDArray[np.bool_], first: int, last: int, limits: BlockLimits) -> Iterator[Rectangle]:
    """Yield the blocks of the strip of some rows, from left to right."""
    strip = tissue[first:last]
    _, begins, ends = _runs(np.asarray(strip.any(axis=0))[None], limits.widest_gap)
    for begin, end in zip(begins.tolist(), ends.tolist(), strict=True):
        pieces = -(-(end - begin) // limits.most_cols(last - first))
        edges = [begin + (end - begin) * i // pieces for i in range(pieces + 1)]
        for left, right in pairwise(edges):
            cols, rows = (np.flatnonzero(strip[:, left:right].any(axis=axis)) for axis in (0, 1))
            if len(cols):
                cropped = int(cols[-1] - cols[0]) + 1, int(rows[-1] - rows[0]) + 1
                yield left + int(cols[0]), first + int(rows[0]), *cropped


def _area_px(rectangle: Rectangle, limits: BlockLimits) -> int:
    """Return how many reading pixels are read for a rectangle of tiles, including its halo."""
    _, _, cols, rows = rectangle
    return limits.side_px(cols) * limits.side_px(rows)


def window_corners_px(frame: Frame, block: Block) -> NDArray[np.int64]:
    """Return the top-left x, y of every scored window of a block's tissue tiles, in the order of the scores.

    Args:
        frame: The slide's transform.
        block: The block.

    Returns:
        int64 (n, 2), reading pixels counted from the corner of the block's halo.
    """
    m = frame.cells_per_tile
    return tile_windows_px(frame, block)[scored_cells(block, m)]


def tile_windows_px(frame: Frame, block: Block) -> NDArray[np.int64]:
    """Return the top-left x, y of the windows of all cells of a block's tissue tiles, int64 (n, m, m, 2).

    They are counted from the corner of the block's halo, and windows that are not scored may lie outside.
    """
    m = frame.cells_per_tile
    crop = crop_of(block, m)
    first = frame.halo_px - np.array([crop.first_col, crop.first_row]) * frame.stride_px
    corners = np.array(block.corners(), dtype=np.int64) * frame.tile_px + first
    return np.asarray(corners[:, None] + geometry.window_offsets_px(frame)).reshape(-1, m, m, 2)


def groups(costs: NDArray[np.float64], *, limit: float) -> list[tuple[int, int]]:
    """Divide consecutive blocks into groups of nearly equal cost.

    The number of groups is the smallest for which the mean cost of a group is within the limit. Each boundary lies
    where the cumulative cost is nearest to its share, so no group is far from the mean, and none is empty.

    Args:
        costs: float64 (n,), the cost of each block in order, all above 0.
        limit: Upper limit of the mean cost of a group.

    Returns:
        Half-open ranges of block indices that together are ``[0, n)``.
    """
    if len(costs) == 0:
        return []
    running = np.cumsum(costs)
    count = min(len(costs), group_count(float(running[-1]), limit=limit))
    shares = running[-1] * np.arange(1, count) / count
    after = np.searchsorted(running, shares)
    nearer_before = (after > 0) & (shares - running[after - 1] < running[after] - shares)
    cuts = after + 1 - nearer_before
    # Neighbouring boundaries may be nearest to the same block, but every group must keep at least one block.
    order = np.arange(len(cuts))
    cuts = np.maximum.accumulate(np.maximum(cuts, 1) - order) + order
    cuts = np.minimum(cuts, len(costs) - len(cuts) + order)
    return list(pairwise([0, *cuts.tolist(), len(costs)]))


def group_count(total: float, *, limit: float) -> int:
    """Return the smallest number of groups for which the mean cost of a group is within the limit."""
    return math.ceil(total / limit)
