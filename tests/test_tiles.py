"""Blocks and groups: nothing lost, nothing twice, costs balanced."""

import csv
from pathlib import Path

import numpy as np
import pytest
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


@pytest.mark.parametrize(
    ("kind", "limit", "tasks"), [("normal", 200, 149724), ("tumor", 180, 142492), ("test", 160, 147934)]
)
def test_o5_array_tasks_of_the_old_scheme(shared_data: Path, kind: str, limit: int, tasks: int) -> None:
    """O-5: all tiles of a class in fixed chunks stay just under the site's 150,000 array tasks."""
    with (shared_data / "camelyon16/tables/patch_counts_dldp.csv").open() as stream:
        total = sum(int(row["n_tiles_224"]) for row in csv.DictReader(stream) if row["slide"].startswith(kind))
    assert tiles.group_count(total, limit=limit) == tasks < 150_000


def test_the_largest_slide_is_cut_in_little_memory() -> None:
    """A slide of 100,000 tissue tiles gives 250 equal groups."""
    ranges = tiles.groups(np.ones(100_000), limit=400)
    assert {hi - lo for lo, hi in ranges} == {400}


def test_no_tissue_gives_no_block_and_no_group() -> None:
    """An empty slide is a valid slide."""
    assert tiles.blocks(np.zeros((4, 4), bool), block_tiles=2) == []
    assert tiles.groups(np.empty(0), limit=4) == []
