"""Division of tissue tiles into blocks, which are read and predicted as one, and groups, the units of array tasks.

Input: a boolean grid of tissue tiles. Output: blocks (rectangles of tiles that follow the tissue) in row-major order of
their strips, and groups (runs of consecutive blocks whose costs are as equal as the order allows).

Every block is read with a halo, so its cost is its area including the halo. The grid is cut into strips of at most
``block_rows`` rows such that the sum of these areas is minimal. Within a strip, each run of columns with tissue becomes
a block that is only as high as its own tissue. Two runs are joined where reading the gap costs less than a second halo.
"""

import math
from collections.abc import Iterator
from itertools import pairwise
from typing import Annotated, Literal, NamedTuple

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
    block_rows: int = Field(ge=1, le=64, description="Most tile rows of a block.")
    block_cols: Annotated[int, Field(ge=1, le=256)] | Literal["auto"] = Field(
        description="Most tile columns of a block. auto: as many as memory_mb allows, with fewer rows where they have "
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
        block_rows: Maximum number of tile rows of a block.
        block_cols: Maximum number of tile columns of a block.
    """

    tile_px: int
    halo_px: int
    block_rows: int
    block_cols: int


class Block(NamedTuple):
    """A rectangle of tiles that is read and predicted as one.

    Attributes:
        t_col, t_row: Column and row on the tile grid of its first (top left) tile.
        cols, rows: Size in tiles.
        tissue: Indices of the tiles with tissue, counted row by row within the block.
    """

    t_col: int
    t_row: int
    cols: int
    rows: int
    tissue: tuple[int, ...]

    def corners(self) -> list[tuple[int, int]]:
        """Return the column and row within the block of each tissue tile, in the order of `tissue`."""
        return [(i % self.cols, i // self.cols) for i in self.tissue]

    def cells(self) -> list[tuple[int, int]]:
        """Return the column and row on the tile grid of each tissue tile, in the order of `tissue`."""
        return [(self.t_col + col, self.t_row + row) for col, row in self.corners()]


def blocks(tissue: NDArray[np.bool_], limits: BlockLimits) -> list[Block]:
    """Return the blocks of a slide: each tissue tile is in exactly one, and each block is cropped to its tissue.

    Args:
        tissue: bool (rows, cols), the tile grid.
        limits: Sizes of tiles and halo, and the maximum size of a block.
    """
    return [
        block(tissue, col, row, cols, rows)
        for first, last in _strips(tissue, limits)
        for col, row, cols, rows in _rectangles(tissue, first, last, limits)
    ]


def block(tissue: NDArray[np.bool_], t_col: int, t_row: int, cols: int, rows: int) -> Block:
    """Return the block with this first tile and this size in tiles; ``tissue`` is the tile grid, bool (rows, cols)."""
    inside = tissue[t_row : t_row + rows, t_col : t_col + cols]
    return Block(t_col, t_row, cols, rows, tuple(np.flatnonzero(inside).tolist()))


def _strips(tissue: NDArray[np.bool_], limits: BlockLimits) -> list[tuple[int, int]]:
    """Return the half-open ranges of rows that cover all tissue with the least total area of blocks including halo."""
    count = len(tissue)
    least, best_last = np.zeros(count + 1), np.arange(1, count + 1)
    for first in range(count - 1, -1, -1):
        least[first] = least[first + 1]
        if not tissue[first].any():
            continue
        costs = {
            last: least[last]
            + sum(_area_px(rectangle, limits) for rectangle in _rectangles(tissue, first, last, limits))
            for last in range(first + 1, min(first + limits.block_rows, count) + 1)
        }
        best_last[first] = min(costs, key=lambda last: (costs[last], last))
        least[first] = costs[best_last[first]]
    strips, first = [], 0
    while first < count:
        if tissue[first].any():
            strips.append((first, int(best_last[first])))
        first = int(best_last[first])
    return strips


def _area_px(rectangle: tuple[int, int, int, int], limits: BlockLimits) -> int:
    """Return how many reading pixels are read for a rectangle of tiles, including its halo."""
    _, _, cols, rows = rectangle
    return (cols * limits.tile_px + 2 * limits.halo_px) * (rows * limits.tile_px + 2 * limits.halo_px)


def _rectangles(
    tissue: NDArray[np.bool_], first: int, last: int, limits: BlockLimits
) -> Iterator[tuple[int, int, int, int]]:
    """Yield the blocks of one strip from left to right: first column, first row, number of columns, number of rows."""
    strip = tissue[first:last]
    for begin, end in _joined_runs(
        np.asarray(strip.any(axis=0)), widest_gap=(2 * limits.halo_px - 1) // limits.tile_px
    ):
        pieces = -(-(end - begin) // limits.block_cols)
        edges = [begin + (end - begin) * i // pieces for i in range(pieces + 1)]
        for left, right in pairwise(edges):
            cols, rows = (np.flatnonzero(strip[:, left:right].any(axis=axis)) for axis in (0, 1))
            if len(cols):
                yield (
                    left + int(cols[0]),
                    first + int(rows[0]),
                    int(cols[-1] - cols[0]) + 1,
                    int(rows[-1] - rows[0]) + 1,
                )


def _joined_runs(columns: NDArray[np.bool_], *, widest_gap: int) -> list[tuple[int, int]]:
    """Return half-open ranges of columns with tissue; ranges are joined over gaps of at most ``widest_gap`` columns."""
    edges = np.flatnonzero(np.diff(np.pad(columns.astype(np.int8), 1))).reshape(-1, 2)
    if not len(edges):
        return []
    apart = np.flatnonzero(edges[1:, 0] - edges[:-1, 1] > widest_gap)
    begins, ends = edges[np.r_[0, apart + 1], 0], edges[np.r_[apart, len(edges) - 1], 1]
    return list(zip(begins.tolist(), ends.tolist(), strict=True))


def window_corners_px(frame: Frame, block: Block) -> NDArray[np.int64]:
    """Return the top-left x, y of every window of a block's tissue tiles, in the order of the scores.

    Args:
        frame: The slide's transform.
        block: The block.

    Returns:
        int64 (n, 2), reading pixels counted from the corner of the block's halo.
    """
    corners = np.array(block.corners(), dtype=np.int64) * frame.tile_px + frame.halo_px
    return (corners[:, None] + geometry.window_offsets_px(frame)).reshape(-1, 2)


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
