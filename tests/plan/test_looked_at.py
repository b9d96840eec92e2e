"""Where a fine pass looks after a first pass at another spacing."""

import numpy as np
import pytest

from wsiflow.plan import cascade
from wsiflow.plan.geometry import Frame

# Cells of 28 um from a first pass at 1 um per pixel, and of 4 um from a fine pass at 0.25.
FIRST = Frame("centred", 7168, 3584, 4.0, 1.0, 224, 224, 28, 112, 1, 1, 0, 0, 8, 4)
FINE = Frame("centred", 7168, 3584, 1.0, 0.25, 224, 224, 16, 112, 1, 1, 0, 0, 32, 16)


def first_map(*cells: tuple[int, int]) -> np.ndarray:
    heat = np.full(FIRST.h_shape, 0.01, np.float32)
    for cell in cells:
        heat[cell] = 0.5
    return heat


@pytest.mark.parametrize(
    ("margin_um", "around"),
    [(0, 1), (26, 1), (26.01, 2), (54, 2), (100, 4)],
    ids=["a fine cell may reach over", "exactly a cell", "a little more", "exactly two", "the usual margin"],
)
def test_a_margin_is_whole_cells_of_the_first_pass(margin_um: float, around: int) -> None:
    """A suspicious cell of 7 x 7 fine ones is looked at with as many cells around it as the margin touches."""
    looked = cascade.looked_at(first_map((10, 20)), FIRST, FINE, threshold=0.5, margin_um=margin_um)
    expected = np.zeros(FINE.h_shape, np.bool_)
    expected[7 * (10 - around) : 7 * (11 + around), 7 * (20 - around) : 7 * (21 + around)] = True
    np.testing.assert_array_equal(looked, expected)


def test_every_slide_is_looked_at_and_so_is_what_is_not_known() -> None:
    """Where no score reaches the threshold, the highest one is looked at; a place without a score always is."""
    heat = first_map((3, 3))
    heat[20:22, 40:42] = np.nan
    looked = cascade.looked_at(heat, FIRST, FINE, threshold=0.9, margin_um=0)
    assert looked[7 * 20 : 7 * 22, 7 * 40 : 7 * 42].all()
    assert looked[7 * 2 : 7 * 5, 7 * 2 : 7 * 5].all()
    assert looked.sum() == 49 * (4 + 9)
    assert cascade.looked_at(np.full(FIRST.h_shape, np.nan, np.float32), FIRST, FINE, threshold=0, margin_um=0).all()


def test_a_fine_cell_has_the_first_score_of_the_cell_that_holds_its_centre() -> None:
    """Maps of unequal spacings, whose cells are no multiples of each other; outside the first map nothing is known."""
    odd = FINE._replace(l0_per_px=1.13, um_px=0.2825, t_cols=30, t_rows=15)
    heat = np.arange(np.prod(FIRST.h_shape), dtype=np.float32).reshape(FIRST.h_shape)
    found = cascade.first_scores(heat, FIRST, odd)
    rows, cols = np.indices(odd.h_shape)
    at = [np.floor((each + 0.5) * 16 * 1.13 / (28 * 4)).astype(int) for each in (rows, cols)]
    inside = (at[0] < heat.shape[0]) & (at[1] < heat.shape[1])
    assert 0 < (~inside).sum() < inside.sum()
    np.testing.assert_array_equal(found[inside], heat[at[0][inside], at[1][inside]])
    assert np.isnan(found[~inside]).all()


def test_cells_of_tiles_and_cells_of_the_map_are_the_same() -> None:
    """What is taken from the map for the selected tiles lies there again, and elsewhere nothing."""
    rng = np.random.default_rng(0)
    tiles = rng.random((16, 32)) < 0.3
    cells = rng.random(FINE.h_shape) < 0.5
    taken = cascade.of_tiles(cells, tiles, FINE)
    assert taken.shape == (tiles.sum(), 14, 14)
    on_tiles = tiles.repeat(14, axis=0).repeat(14, axis=1)
    np.testing.assert_array_equal(cascade.on_map(taken, tiles, FINE), cells & on_tiles)
