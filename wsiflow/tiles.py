"""From tissue tiles to blocks and groups: what is read together, and what one array task does.

Input: a boolean grid of tissue tiles. Output: blocks (squares of tiles, aligned to the grid, that hold tissue) in
row-major order and groups (runs of consecutive blocks whose costs are as equal as the order allows).
"""

import math
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, Field


class TilesParams(BaseModel, frozen=True, extra="forbid"):
    """How the tissue grid is cut.

    Attributes:
        tile_px: Side of a tile in reading pixels.
        halo_px: Context read around each block, reading pixels a side.
        block_tiles: Tiles per side of a block; 1 with a halo of 112 px is the reference's 448 px patch.
        group_tiles: Tissue tiles a group should hold at most: one group is one array task.
    """

    tile_px: int = Field(ge=16, le=4096)
    halo_px: int = Field(ge=0, le=4096)
    block_tiles: int = Field(ge=1, le=64)
    group_tiles: int = Field(ge=1)


class Block(NamedTuple):
    """A square of tiles read and predicted as one.

    Attributes:
        t_col, t_row: Its first tile.
        tissue: Indices, row by row within the block, of the tiles that hold tissue.
    """

    t_col: int
    t_row: int
    tissue: tuple[int, ...]


def blocks(tissue: NDArray[np.bool_], *, block_tiles: int) -> list[Block]:
    """Return the blocks that hold tissue, in row-major order; every tissue tile is in exactly one.

    Args:
        tissue: bool (rows, cols), the tile grid.
        block_tiles: Tiles per side of a block; blocks may pass the grid's far sides.
    """
    found = []
    for t_row in range(0, tissue.shape[0], block_tiles):
        for t_col in range(0, tissue.shape[1], block_tiles):
            cut = tissue[t_row : t_row + block_tiles, t_col : t_col + block_tiles]
            inside = tuple(int(r * block_tiles + c) for r, c in np.argwhere(cut))
            if inside:
                found.append(Block(t_col, t_row, inside))
    return found


def block_tile_cells(block: Block, *, block_tiles: int) -> list[tuple[int, int]]:
    """Return column and row of each tissue tile of a block, in the order of its indices."""
    return [(block.t_col + i % block_tiles, block.t_row + i // block_tiles) for i in block.tissue]


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
