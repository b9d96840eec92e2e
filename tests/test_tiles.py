"""Blocks and groups: nothing lost, nothing twice, costs balanced."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from wsiflow import plan, tiles

grids = hnp.arrays(bool, hnp.array_shapes(min_dims=2, max_dims=2, max_side=12))


@given(tissue=grids, block_tiles=st.integers(1, 5))
def test_every_tissue_tile_is_in_exactly_one_block(tissue: np.ndarray, block_tiles: int) -> None:
    """Blocks partition the tissue."""
    cells = [
        cell
        for block in tiles.blocks(tissue, block_tiles=block_tiles)
        for cell in tiles.block_tile_cells(block, block_tiles=block_tiles)
    ]
    assert sorted(cells) == sorted((int(c), int(r)) for r, c in np.argwhere(tissue))


@given(tissue=grids)
def test_tissue_survives_being_written_as_runs(tissue: np.ndarray) -> None:
    """Runs describe the grid exactly."""
    again = plan.tissue_grid(plan.tile_runs(tissue))
    assert np.array_equal(np.argwhere(again), np.argwhere(tissue))


@given(costs=st.lists(st.integers(1, 16), max_size=60), limit=st.integers(1, 50))
def test_groups_cover_all_blocks_in_order(costs: list[int], limit: int) -> None:
    """Ranges join up, none is empty, and none is further from the mean than the largest block."""
    ranges = tiles.groups(np.array(costs, dtype=float), limit=limit)
    assert [lo for lo, _ in ranges] == [0, *(hi for _, hi in ranges)][: len(ranges)]
    assert (ranges[-1][1] if ranges else 0) == len(costs)
    sums = [sum(costs[lo:hi]) for lo, hi in ranges]
    assert all(sums)
    if len(ranges) < len(costs):
        assert all(abs(s - np.mean(sums)) <= max(costs) for s in sums)


def test_groups_are_balanced_rather_than_filled() -> None:
    """401 equal blocks at a limit of 400 give two halves, not 400 and a lone one."""
    assert tiles.groups(np.ones(401), limit=400) == [(0, 201), (201, 401)] or tiles.groups(np.ones(401), limit=400) == [
        (0, 200),
        (200, 401),
    ]


def test_no_tissue_gives_no_block_and_no_group() -> None:
    """An empty slide is a valid slide."""
    assert tiles.blocks(np.zeros((4, 4), bool), block_tiles=2) == []
    assert tiles.groups(np.empty(0), limit=4) == []
