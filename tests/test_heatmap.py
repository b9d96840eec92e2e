"""Placement by coordinates, never by order."""

import numpy as np
import pytest

from wsiflow import heatmap
from wsiflow.errors import IntegrityError
from wsiflow.geometry import Frame

FRAME = Frame("centred", 896, 672, 1.0, 0.243, 224, 224, 56, 112, 1, 1, 1, 0, 3, 3)
CELLS = np.array([[2, 1], [1, 0], [3, 2]])
PROB = np.arange(48, dtype=np.float32).reshape(3, 4, 4) / 48


def test_order_of_tiles_does_not_matter() -> None:
    """Any permutation of the tiles gives the same map."""
    forwards = heatmap.assemble(FRAME, CELLS, PROB)
    backwards = heatmap.assemble(FRAME, CELLS[::-1], PROB[::-1])
    assert np.array_equal(forwards, backwards, equal_nan=True)


def test_scores_lie_at_their_tile_and_the_rest_is_nan() -> None:
    """The map starts at the frame's first tile; cells without a tile are NaN, not zero."""
    heat = heatmap.assemble(FRAME, CELLS, PROB)
    assert heat.shape == (12, 12)
    assert np.array_equal(heat[4:8, 4:8], PROB[0])
    assert np.array_equal(heat[0:4, 0:4], PROB[1])
    assert np.isnan(heat[0:4, 4:]).all()
    assert np.isfinite(heat).sum() == PROB.size


def test_no_tile_gives_a_map_of_nan_and_score_zero() -> None:
    """A slide without tissue has a valid, empty map and counts as a negative."""
    heat = heatmap.assemble(FRAME, np.empty((0, 2), int), np.empty((0, 4, 4), np.float32))
    assert np.isnan(heat).all()
    assert heatmap.slide_score(heat) == 0.0


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        (np.array([[2, 1], [2, 1], [3, 2]]), "twice"),
        (np.array([[0, 1], [1, 0], [3, 2]]), "outside"),
        (CELLS[:2], "shape"),
    ],
)
def test_tiles_that_cannot_be_placed_are_refused(cells: np.ndarray, message: str) -> None:
    """A duplicate, a foreign or a missing tile is never papered over."""
    with pytest.raises(IntegrityError, match=message):
        heatmap.assemble(FRAME, cells, PROB)
