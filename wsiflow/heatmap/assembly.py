"""Assemble the scores of tiles to one heatmap per slide, by the stored coordinates of the tiles.

A heatmap is float32 (rows, cols) with one cell per stride. NaN means "no score here", that is, no tissue. A score is a
probability in [0, 1]; the caller has refused any other value.
"""

import numpy as np
from numpy.typing import NDArray

from wsiflow.errors import IntegrityError
from wsiflow.plan.geometry import Frame, cells_on_slide, h_from_t, subsampling


def assemble(frame: Frame, t_cells: NDArray[np.int64], prob: NDArray[np.float32]) -> NDArray[np.float32]:
    """Assemble a heatmap: place the scores of every tile at its column and row.

    Args:
        frame: The slide's transform.
        t_cells: int64 (n, 2), column and row of each tile in the tile grid.
        prob: float32 (n, m, m), scores of the tiles, m cells a side.

    Returns:
        float32 (rows, cols) of `Frame.h_shape`; NaN in cells that are not scored and in cells outside the slide.

    Raises:
        IntegrityError: A tile occurs twice or lies outside the map, or the shapes do not agree.
    """
    m = frame.cells_per_tile
    if prob.shape != (len(t_cells), m, m):
        cause = f"the scores have shape {prob.shape}, and {len(t_cells)} tiles of {m} x {m} cells are expected"
        raise IntegrityError(cause, "run again in another out= folder", stage="stitch")
    if len(np.unique(t_cells, axis=0)) != len(t_cells):
        raise IntegrityError("a tile was predicted twice", "run again in another out= folder", stage="stitch")
    tiles = np.full((frame.t_rows, frame.t_cols, m, m), np.nan, dtype=np.float32)
    for (t_col, t_row), scores in zip(t_cells.tolist(), prob, strict=True):
        h_row, h_col = h_from_t(frame, t_col, t_row)
        if not (0 <= h_row < frame.h_shape[0] and 0 <= h_col < frame.h_shape[1]):
            cause = f"tile (column {t_col}, row {t_row}) lies outside the map"
            raise IntegrityError(cause, "run again in another out= folder", stage="stitch")
        tiles[h_row // m, h_col // m] = scores
    heat = np.ascontiguousarray(tiles.transpose(0, 2, 1, 3)).reshape(frame.h_shape)
    rows, cols = cells_on_slide(frame)
    heat[rows:], heat[:, cols:] = np.nan, np.nan
    return heat


def subsample(heat: NDArray[np.float32], fine: Frame, coarse: Frame) -> NDArray[np.float32]:
    """Return the heatmap of a coarser stride: the cells of a finer map that have the same windows.

    The scores equal those of a run at the coarser stride where a window's score does not depend on its neighbours, see
    `wsiflow.model.choice.reason_scores_differ`.

    Args:
        heat: float32 (rows, cols), a map of the fine frame's `Frame.h_shape`.
        fine: Transform of this map.
        coarse: Transform of the map to return.

    Returns:
        float32 (rows, cols) of the coarse frame's `Frame.h_shape`.

    Raises:
        InputError: The maps have no windows in common; the message says why.
    """
    step, first = subsampling(fine, coarse)
    return np.ascontiguousarray(heat[first::step, first::step])


def slide_score(heat: NDArray[np.float32]) -> float:
    """Return the slide's score: the highest probability on its heatmap; 0.0 for a map without tissue."""
    return float(np.nanmax(heat)) if np.isfinite(heat).any() else 0.0
