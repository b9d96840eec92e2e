"""Blocks and groups: no tile is lost or repeated, and costs are balanced."""

import csv
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from flows.compose import compose_config
from wsiflow.plan import blocks
from wsiflow.plan.blocks import Block, BlockLimits
from wsiflow.plan.geometry import Frame
from wsiflow.plan.slide_plan import make_cut, tile_runs, tissue_grid
from wsiflow.plan.tissue import select_tiles, tile_coverage, tissue_mask

grids = hnp.arrays(bool, hnp.array_shapes(min_dims=2, max_dims=2, max_side=12))


cuts = st.builds(
    BlockLimits,
    st.just(224),
    st.sampled_from([0, 104, 200, 296]),
    block_rows=st.integers(1, 5),
    block_cols=st.integers(1, 6),
)


def area_px(found: list[blocks.Block], cut: BlockLimits) -> int:
    margin = 2 * cut.halo_px
    return sum((b.cols * cut.tile_px + margin) * (b.rows * cut.tile_px + margin) for b in found)


LIMITS = BlockLimits(224, 104, 3, 3)
FRAME = Frame("centred", 4000, 4000, 1.0, 0.25, 224, 224, 56, 104, 3, 3, 0, 0, 12, 12)


@given(tissue=grids, cut=cuts)
def test_every_tissue_tile_is_in_exactly_one_block(tissue: np.ndarray, cut: BlockLimits) -> None:
    """Blocks partition the tissue, read no more than the largest one may, and begin and end with tissue."""
    found = blocks.blocks(tissue, cut)
    cells = [cell for block in found for cell in block.cells()]
    assert sorted(cells) == sorted((int(c), int(r)) for r, c in np.argwhere(tissue))
    for block in found:
        assert area_px([block], cut) <= area_px([Block(0, 0, cut.block_cols, cut.block_rows, ())], cut)
        inside = tissue[block.t_row : block.t_row + block.rows, block.t_col : block.t_col + block.cols]
        assert inside.shape == (block.rows, block.cols)
        assert inside[0].any()
        assert inside[-1].any()
        assert inside[:, 0].any()
        assert inside[:, -1].any()


@given(tissue=grids, seed=st.integers(0, 99), share=st.floats(0, 1))
def test_blocks_read_what_their_windows_need_and_no_more(tissue: np.ndarray, seed: int, share: float) -> None:
    """Each scored cell is in one block, whose windows lie inside its pixels; with a tile less they would not."""
    scored = np.random.default_rng(seed).random((int(tissue.sum()), 4, 4)) < share
    cut = make_cut(tissue, FRAME, group_tiles=4, scored=scored)
    windows = []
    for block in cut.blocks:
        rows, cols = blocks.size_px(FRAME, block)
        own = blocks.window_corners_px(FRAME, block)
        assert (own.min(axis=0) >= 20).all()  # a halo of 104 px, of which the windows of the first cells reach 84
        assert (own.max(axis=0) + 224 <= (cols - 20, rows - 20)).all()
        assert (np.ptp(own, axis=0) + 56 > (cols - 208 - 224, rows - 208 - 224)).all()
        assert (rows - 208) % 224 == (cols - 208) % 224 == 0
        assert rows * cols <= area_px([Block(0, 0, 3, 3, ())], LIMITS)
        windows += [tuple(each) for each in (own + blocks.origin_px(FRAME, block)).tolist()]
    places = [(row, col) for row, col in np.argwhere(tissue).tolist()]
    expected = [
        (224 * places[n][1] + 56 * col - 84, 224 * places[n][0] + 56 * row - 84)
        for n, row, col in np.argwhere(scored).tolist()
    ]
    assert sorted(windows) == sorted(expected)


def test_each_tile_is_in_one_block_also_in_the_hollow_of_another_piece() -> None:
    """A piece of tissue that a ring of tissue surrounds is no part of the block that holds the ring."""
    rng = np.random.default_rng(0)
    ring = np.zeros((7, 7), bool)
    ring[1:6, 1:6] = True
    ring[2:5, 2:5] = False
    ring[3, 3] = True
    for tissue in (ring, *(rng.random((20, 20)) < share for share in (0.1, 0.3, 0.5))):
        found = [cell for block in blocks.blocks(tissue, BlockLimits(224, 104, 9, 8)) for cell in block.cells()]
        assert sorted(found) == sorted((col, row) for row, col in np.argwhere(tissue).tolist())


def test_tall_tissue_is_cut_into_columns() -> None:
    """Tissue that lies on its side is cut as if it stood, into blocks of the same shape."""
    tissue = np.random.default_rng(0).random((5, 30)) < 0.9
    limits = BlockLimits(224, 104, 7, 4)
    wide, tall = blocks.blocks(tissue, limits), blocks.blocks(tissue.T, limits)
    assert area_px(wide, limits) == area_px(tall, limits)


def test_strips_begin_where_it_costs_least() -> None:
    """Two bands of three rows with an empty row between them give two strips of three, not of five and two."""
    tissue = np.zeros((7, 10), bool)
    tissue[:3], tissue[4:] = True, True
    found = blocks.blocks(tissue, BlockLimits(224, 104, 5, 100))
    assert [(b.t_row, b.rows, b.cols) for b in found] == [(0, 3, 10), (4, 3, 10)]


def test_a_gap_is_read_where_a_second_halo_would_cost_more() -> None:
    """With a halo of 200 px a gap of one tile (224 px) costs less than two halos (400 px), two tiles do not."""
    one, two = np.array([[1, 1, 0, 1]], bool), np.array([[1, 1, 0, 0, 1]], bool)
    assert len(blocks.blocks(one, BlockLimits(224, 200, 1, 100))) == 1
    assert len(blocks.blocks(two, BlockLimits(224, 200, 1, 100))) == 2
    assert len(blocks.blocks(one, BlockLimits(224, 104, 1, 100))) == 2


def test_single_tiles_are_the_reference_patches() -> None:
    """With one row and one column, each tissue tile is a block, in row-major order."""
    tissue = np.array([[0, 1, 1], [1, 0, 1]], bool)
    found = blocks.blocks(tissue, BlockLimits(224, 112, 1, 1))
    assert [(b.t_col, b.t_row, b.cols, b.rows, b.tissue) for b in found] == [
        (1, 0, 1, 1, (0,)),
        (2, 0, 1, 1, (0,)),
        (0, 1, 1, 1, (0,)),
        (2, 1, 1, 1, (0,)),
    ]


def test_strips_of_real_tissue_hold_less_than_twice_its_pixels(shared_data: Path) -> None:
    """On every fourth of the 156 real overviews, blocks with a wide halo have at most 1.9 times the tissue."""
    params = compose_config([]).tissue
    read_px, tissue_px = dict.fromkeys((104, 200), 0), 0
    for path in sorted((shared_data / "camelyon16/thumbnails_128").glob("*.jpg"))[::4]:
        mask = tissue_mask(cv2.imread(str(path))[..., ::-1], params)
        rows, cols = (-(-side * 128 // 224) for side in mask.shape)
        grid = select_tiles(tile_coverage(mask, downsample=128, tile_l0_px=224, grid=(rows, cols)), params)
        tissue_px += int(grid.sum()) * 224**2
        for halo in read_px:
            cut = BlockLimits(224, halo, 7, 12)
            read_px[halo] += area_px(blocks.blocks(grid, cut), cut)
    assert read_px[200] / tissue_px < 1.9
    assert read_px[104] / tissue_px < 1.55


@given(tissue=grids)
def test_tissue_survives_being_written_as_runs(tissue: np.ndarray) -> None:
    """Run-length encoding describes the grid exactly."""
    again = tissue_grid(tile_runs(tissue))
    assert np.array_equal(np.argwhere(again), np.argwhere(tissue))


@given(costs=st.lists(st.integers(1, 16), max_size=60), limit=st.integers(1, 50))
def test_groups_cover_all_blocks_in_order(costs: list[int], limit: int) -> None:
    """Ranges are contiguous, none is empty, and none differs from the mean by more than the largest block."""
    ranges = blocks.groups(np.array(costs, dtype=float), limit=limit)
    assert [lo for lo, _ in ranges] == [0, *(hi for _, hi in ranges)][: len(ranges)]
    assert (ranges[-1][1] if ranges else 0) == len(costs)
    sums = [sum(costs[lo:hi]) for lo, hi in ranges]
    assert all(sums)
    if len(ranges) < len(costs):
        assert all(abs(s - np.mean(sums)) <= max(costs) for s in sums)


def test_groups_are_balanced_rather_than_filled() -> None:
    """401 equal blocks with a limit of 400 give two halves, not a group of 400 and one of 1."""
    assert blocks.groups(np.ones(401), limit=400) == [(0, 201), (201, 401)] or blocks.groups(
        np.ones(401), limit=400
    ) == [
        (0, 200),
        (200, 401),
    ]


@pytest.mark.parametrize(
    ("kind", "limit", "tasks"), [("normal", 200, 149724), ("tumor", 180, 142492), ("test", 160, 147934)]
)
def test_o5_array_tasks_of_the_old_scheme(shared_data: Path, kind: str, limit: int, tasks: int) -> None:
    """O-5: fixed chunks of all tiles of a class stay just below the site's limit of 150,000 array tasks."""
    with (shared_data / "camelyon16/tables/patch_counts_dldp.csv").open() as stream:
        total = sum(int(row["n_tiles_224"]) for row in csv.DictReader(stream) if row["slide"].startswith(kind))
    assert blocks.group_count(total, limit=limit) == tasks < 150_000


def test_the_largest_slide_is_cut_in_little_memory() -> None:
    """A slide with 100,000 tissue tiles gives 250 equal groups."""
    ranges = blocks.groups(np.ones(100_000), limit=400)
    assert {hi - lo for lo, hi in ranges} == {400}


def test_no_tissue_gives_no_block_and_no_group() -> None:
    """An empty slide is valid."""
    assert blocks.blocks(np.zeros((4, 4), bool), BlockLimits(224, 112, 2, 2)) == []
    assert blocks.groups(np.empty(0), limit=4) == []
