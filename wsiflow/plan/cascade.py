"""Where a fine pass looks, by the scores of a cheap first pass.

Input: the heatmap of the first pass and the transforms of both passes. Output: cells of the fine pass's heatmap. Both
heatmaps begin at the slide's corner (the centred convention), and may have other spacings, tiles and strides. A cell of
the fine heatmap belongs to the cell of the first heatmap that holds its centre.
"""

import math
from typing import Any, TypeVar

import cv2
import numpy as np
from numpy.typing import NDArray

from wsiflow.plan import geometry
from wsiflow.plan.geometry import Frame

_Value = TypeVar("_Value", bound=np.generic)


def looked_at(
    first: NDArray[np.float32], first_frame: Frame, frame: Frame, *, threshold: float, margin_um: float
) -> NDArray[np.bool_]:
    """Return the cells at which a fine pass looks.

    These are the cells within the margin of a cell of the first pass that scores at least the threshold, and the same
    around the highest first score of the slide, so that every slide has a score of the fine pass. Where the first pass
    has no score, the fine pass looks: nothing is known there.

    Args:
        first: float32 (rows, cols), heatmap of the first pass; NaN where there is no score.
        first_frame: The transform of the first pass.
        frame: The transform of the fine pass.
        threshold: Score of the first pass from which on a place is suspicious.
        margin_um: Width around suspicious cells, um, in each direction; rounded up to whole cells of the first pass.

    Returns:
        bool (rows, cols) of the fine pass's `Frame.h_shape`.
    """
    known = np.isfinite(first)
    suspicious = known & (np.nan_to_num(first, nan=-1.0) >= np.float32(threshold))
    if known.any():
        suspicious |= known & (first == np.nanmax(first))
    # A coarse cell of the fine pass may reach beyond the cell that holds its centre, by up to half its side.
    beyond_um = margin_um + frame.um_px * frame.stride_px / 2
    cells = math.ceil(round(beyond_um / (first_frame.um_px * first_frame.stride_px), 6))
    side = 2 * cells + 1
    near = cv2.dilate(suspicious.astype(np.uint8), np.ones((side, 1), np.uint8))
    near = cv2.dilate(near, np.ones((1, side), np.uint8))
    looked: NDArray[np.bool_] = (near > 0) | ~known
    return at_cells(looked, first_frame, frame, outside=True)


def first_scores(first: NDArray[np.float32], first_frame: Frame, frame: Frame) -> NDArray[np.float32]:
    """Return the first pass's score at each cell of the fine pass, float32 (rows, cols); NaN where there is none."""
    return at_cells(first, first_frame, frame, outside=np.nan)


def at_cells(values: NDArray[_Value], first_frame: Frame, frame: Frame, *, outside: Any) -> NDArray[_Value]:
    """Return the values of cells of the first pass, (rows, cols), at the cells of the fine pass.

    Args:
        values: A value for each cell of the first pass.
        first_frame: The transform of the first pass.
        frame: The transform of the fine pass.
        outside: The value of cells that lie outside the first pass's heatmap.

    Returns:
        An array of the fine pass's `Frame.h_shape` and of the type of the values.
    """
    shape = frame.h_shape
    diagonal = np.stack([np.arange(max(shape), dtype=np.float64)] * 2, axis=1)
    l0 = geometry.l0_from_h(frame, diagonal)
    # Centres that lie on an edge may be a millionth of a cell off, which must not decide.
    cols, rows = np.floor((l0 / (first_frame.stride_px * first_frame.l0_per_px)).round(6)).astype(np.int64).T
    rows, cols = rows[: shape[0]], cols[: shape[1]]
    inside_rows, inside_cols = rows < values.shape[0], cols < values.shape[1]
    found = np.full(shape, outside, values.dtype)
    found[np.ix_(inside_rows, inside_cols)] = values[np.ix_(rows[inside_rows], cols[inside_cols])]
    return found


def of_tiles(cells: NDArray[np.bool_], tiles: NDArray[np.bool_], frame: Frame) -> NDArray[np.bool_]:
    """Return the cells of the selected tiles, bool (n, m, m), row by row.

    Args:
        cells: bool (rows, cols), of `Frame.h_shape`.
        tiles: bool (rows, cols), the selected tiles; the grid may end where they do.
        frame: The slide's transform.
    """
    m = frame.cells_per_tile
    by_tile = cells.reshape(frame.t_rows, m, frame.t_cols, m).swapaxes(1, 2)
    return np.ascontiguousarray(by_tile[: tiles.shape[0], : tiles.shape[1]][tiles])


def on_map(cells: NDArray[np.bool_], tiles: NDArray[np.bool_], frame: Frame) -> NDArray[np.bool_]:
    """Return cells of the selected tiles, bool (n, m, m), on the heatmap, False elsewhere: the inverse of `of_tiles`.

    Cells whose place is not on the slide have no score, and are False.
    """
    m = frame.cells_per_tile
    by_tile = np.zeros((frame.t_rows, frame.t_cols, m, m), np.bool_)
    by_tile[: tiles.shape[0], : tiles.shape[1]][tiles] = cells
    rows, cols = geometry.cells_on_slide(frame)
    whole = np.ascontiguousarray(by_tile.swapaxes(1, 2)).reshape(frame.h_shape)
    whole[rows:], whole[:, cols:] = False, False
    return whole
