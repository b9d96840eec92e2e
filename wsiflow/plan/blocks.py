"""From tissue tiles to blocks and groups: what is read together, and what one array task does.

Input: a boolean grid of tissue tiles. Output: blocks (rectangles of tiles that follow the tissue) in row-major order of
their strips, and groups (runs of consecutive blocks whose costs are as equal as the order allows).

Every block is read with a halo, so its cost is its area with the halo. The grid is cut into strips of at most
``block_rows`` rows so that the sum of these areas is the least; within a strip, runs of tissue columns become blocks,
each only as high as its own tissue. Two runs are joined where the gap costs less than a second halo.
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
    """How the tissue grid is cut.

    Attributes:
        tile_px: Side of a tile in reading pixels.
        halo_px: Context read around each block, reading pixels a side; ``auto`` is what the windows and the network
            need, ``widest`` what they would need at the finest stride: the same pixels for all strides of a sweep.
        block_rows: Most tile rows of a block.
        block_cols: Most tile columns of a block; ``auto`` fits blocks to ``memory_mb``, with fewer rows where they have
            to be. One row and one column with a halo of 112 px are the reference's 448 px patches.
        memory_mb: What the activations of a worker's network may take, MB.
        group_tiles: Tissue tiles a group should hold at most: one group is one array task.
    """

    tile_px: int = Field(ge=16, le=4096)
    halo_px: Annotated[int, Field(ge=0, le=4096)] | Literal["auto", "widest"]
    block_rows: int = Field(ge=1, le=64)
    block_cols: Annotated[int, Field(ge=1, le=256)] | Literal["auto"]
    memory_mb: int = Field(ge=100)
    group_tiles: int = Field(ge=1)


class BlockLimits(NamedTuple):
    """What decides where blocks begin and end.

    Attributes:
        tile_px: Side of a tile, reading pixels.
        halo_px: Context around a block, reading pixels a side.
        block_rows: Most tile rows of a block.
        block_cols: Most tile columns of a block.
    """

    tile_px: int
    halo_px: int
    block_rows: int
    block_cols: int


class Block(NamedTuple):
    """A rectangle of tiles read and predicted as one.

    Attributes:
        t_col, t_row: Its first tile.
        cols, rows: Its size in tiles.
        tissue: Indices, row by row within the block, of the tiles that hold tissue.
    """

    t_col: int
    t_row: int
    cols: int
    rows: int
    tissue: tuple[int, ...]

    def corners(self) -> list[tuple[int, int]]:
        """Return column and row within the block of each tissue tile, in the order of its indices."""
        return [(i % self.cols, i // self.cols) for i in self.tissue]

    def cells(self) -> list[tuple[int, int]]:
        """Return column and row on the grid of each tissue tile, in the order of its indices."""
        return [(self.t_col + col, self.t_row + row) for col, row in self.corners()]


def blocks(tissue: NDArray[np.bool_], limits: BlockLimits) -> list[Block]:
    """Return the blocks that hold tissue; every tissue tile is in exactly one, and every block is as small as can be.

    Args:
        tissue: bool (rows, cols), the tile grid.
        limits: The tile and halo sizes, and the largest rows and columns of a block.
    """
    return [
        block(tissue, col, row, cols, rows)
        for first, last in _strips(tissue, limits)
        for col, row, cols, rows in _rectangles(tissue, first, last, limits)
    ]


def block(tissue: NDArray[np.bool_], t_col: int, t_row: int, cols: int, rows: int) -> Block:
    """Return the block of these tiles; ``tissue`` is bool (rows, cols), the tile grid."""
    inside = tissue[t_row : t_row + rows, t_col : t_col + cols]
    return Block(t_col, t_row, cols, rows, tuple(np.flatnonzero(inside).tolist()))


def _strips(tissue: NDArray[np.bool_], limits: BlockLimits) -> list[tuple[int, int]]:
    """Return ranges of rows that hold all tissue, for which the area of the blocks with halo is the least."""
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
    found, first = [], 0
    while first < count:
        if tissue[first].any():
            found.append((first, int(best_last[first])))
        first = int(best_last[first])
    return found


def _area_px(rectangle: tuple[int, int, int, int], limits: BlockLimits) -> int:
    """Return how many pixels are read for a rectangle of tiles."""
    _, _, cols, rows = rectangle
    return (cols * limits.tile_px + 2 * limits.halo_px) * (rows * limits.tile_px + 2 * limits.halo_px)


def _rectangles(
    tissue: NDArray[np.bool_], first: int, last: int, limits: BlockLimits
) -> Iterator[tuple[int, int, int, int]]:
    """Yield first column, first row, columns and rows of the blocks of one strip, left to right."""
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
    """Return half-open ranges of columns with tissue, over gaps that are not wider than said."""
    edges = np.flatnonzero(np.diff(np.pad(columns.astype(np.int8), 1))).reshape(-1, 2)
    if not len(edges):
        return []
    apart = np.flatnonzero(edges[1:, 0] - edges[:-1, 1] > widest_gap)
    begins, ends = edges[np.r_[0, apart + 1], 0], edges[np.r_[apart, len(edges) - 1], 1]
    return list(zip(begins.tolist(), ends.tolist(), strict=True))


def window_corners_px(frame: Frame, block: Block) -> NDArray[np.int64]:
    """Return int64 (n, 2), x and y in a block with halo of every window of its tissue tiles, in the order of scores."""
    corners = np.array(block.corners(), dtype=np.int64) * frame.tile_px + frame.halo_px
    return (corners[:, None] + geometry.window_offsets_px(frame)).reshape(-1, 2)


def groups(costs: NDArray[np.float64], *, limit: float) -> list[tuple[int, int]]:
    """Cut a run of blocks into groups of nearly equal cost.

    The number of groups is the smallest for which the mean cost keeps to the limit; each cut falls where the running
    cost comes nearest to its share, so that no group is far from the mean and none is empty.

    Args:
        costs: float64 (n,), cost of each block in order, all above 0.
        limit: Cost a group should not exceed on average.

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
    # Neighbouring shares may be nearest to the same block: every group keeps at least one.
    order = np.arange(len(cuts))
    cuts = np.maximum.accumulate(np.maximum(cuts, 1) - order) + order
    cuts = np.minimum(cuts, len(costs) - len(cuts) + order)
    return list(pairwise([0, *cuts.tolist(), len(costs)]))


def group_count(total: float, *, limit: float) -> int:
    """Return the smallest number of groups whose mean cost keeps to the limit."""
    return math.ceil(total / limit)
