"""Heatmaps are assembled by the coordinates of tiles, not by their order."""

import numpy as np
import pytest

from wsiflow.errors import InputError, IntegrityError
from wsiflow.heatmap import assembly
from wsiflow.model.choice import Choice, reason_scores_differ
from wsiflow.plan.geometry import Frame, window_offsets_px

FRAME = Frame("centred", 896, 672, 1.0, 0.243, 224, 224, 56, 112, 1, 1, 1, 0, 3, 3)
CELLS = np.array([[2, 1], [1, 0], [3, 2]])
PROB = np.arange(48, dtype=np.float32).reshape(3, 4, 4) / 48


def test_order_of_tiles_does_not_matter() -> None:
    """Any permutation of the tiles gives the same map."""
    forwards = assembly.assemble(FRAME, CELLS, PROB)
    backwards = assembly.assemble(FRAME, CELLS[::-1], PROB[::-1])
    assert np.array_equal(forwards, backwards, equal_nan=True)


def test_scores_lie_at_their_tile_and_the_rest_is_nan() -> None:
    """The map starts at the first tile of the frame, and cells without a tile are NaN."""
    heat = assembly.assemble(FRAME, CELLS, PROB)
    assert heat.shape == (12, 12)
    assert np.array_equal(heat[4:8, 4:8], PROB[0])
    assert np.array_equal(heat[0:4, 0:4], PROB[1])
    assert np.isnan(heat[0:4, 4:]).all()
    assert np.isfinite(heat).sum() == PROB.size


def test_no_tile_gives_a_map_of_nan_and_score_zero() -> None:
    """A slide without tissue has a valid, empty map and counts as a negative."""
    heat = assembly.assemble(FRAME, np.empty((0, 2), int), np.empty((0, 4, 4), np.float32))
    assert np.isnan(heat).all()
    assert assembly.slide_score(heat) == 0.0


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        (np.array([[2, 1], [2, 1], [3, 2]]), "twice"),
        (np.array([[0, 1], [1, 0], [3, 2]]), "outside"),
        (CELLS[:2], "shape"),
    ],
)
def test_tiles_that_cannot_be_placed_are_refused(cells: np.ndarray, message: str) -> None:
    """A duplicate, an unknown and a missing tile raise an error."""
    with pytest.raises(IntegrityError, match=message):
        assembly.assemble(FRAME, cells, PROB)


def corners(frame: Frame) -> np.ndarray:
    """Return int64 (rows, cols, 2), the corners of the windows of every cell of a map."""
    m = frame.cells_per_tile
    own = window_offsets_px(frame).reshape(m, m, 2)
    tiles = np.stack(np.meshgrid(np.arange(frame.t_cols), np.arange(frame.t_rows)), axis=-1) * frame.tile_px
    return (tiles[:, None, :, None] + own[None, :, None]).reshape(*frame.h_shape, 2)


@pytest.mark.parametrize("convention", ["centred", "reference"])
@pytest.mark.parametrize("window_px", [224, 101])
def test_a_coarse_map_is_taken_from_cells_with_the_same_windows(convention: str, window_px: int) -> None:
    """For every pair of strides all windows are the same, or the map is refused and none could be."""
    frame = FRAME._replace(convention=convention, window_px=window_px)
    strides, exact = [s for s in range(1, 225) if 224 % s == 0], 0
    for fine in (frame._replace(stride_px=s) for s in strides[2:]):
        seen = corners(fine).astype(np.float32)
        for coarse in (frame._replace(stride_px=s) for s in strides if s > fine.stride_px):
            expected = corners(coarse)
            try:
                found = np.stack([assembly.subsample(seen[..., axis], fine, coarse) for axis in (0, 1)], axis=-1)
            except InputError:
                assert not set(map(tuple, expected.reshape(-1, 2))) <= set(map(tuple, seen.reshape(-1, 2).astype(int)))
            else:
                exact += 1
                assert np.array_equal(found, expected)
    assert exact >= 4


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"stride_px": 112}, "even multiple"),
        ({"stride_px": 32}, "not a multiple"),
        ({"window_px": 299, "stride_px": 224}, "window_px"),
        ({"um_px": 0.5}, "um_px"),
        ({"t_cols": 4}, "t_cols"),
    ],
)
def test_maps_without_common_windows_are_refused(change: dict, reason: str) -> None:
    """The message says why."""
    with pytest.raises(InputError, match=reason):
        assembly.subsample(np.zeros(FRAME.h_shape, np.float32), FRAME, FRAME._replace(**change))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, ""),
        ({"stride_px": 112}, ""),
        ({"precision": "bf16"}, "precision"),
        ({"engine": "dense"}, "engine"),
        ({"exact": False}, "pads"),
        ({"batch": 8}, "batches"),
    ],
)
def test_scores_are_alike_only_if_computed_alike(change: dict, reason: str) -> None:
    """Another engine, precision or batch, or a network that pads, may change the score of a window."""
    one = Choice("window", "openvino", "fp32", 32, 16, "", 0, exact=True, halo_px=104, block_rows=7, block_cols=12)
    assert (
        (reason in reason_scores_differ(one, one._replace(**change)))
        if reason
        else reason_scores_differ(one, one._replace(**change)) == ""
    )


@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_a_dense_map_of_less_than_fp32_is_of_its_stride_alone(precision: str) -> None:
    """In lower precision a dense network rounds differently at each stride."""
    one = Choice("dense", "openvino", precision, 32, 16, "", 0, exact=True, halo_px=104, block_rows=7, block_cols=12)
    assert precision in reason_scores_differ(one, one)
