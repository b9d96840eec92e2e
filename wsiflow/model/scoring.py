"""Scorers: from the pixels of blocks to the scores of their tissue tiles, over whole blocks or window by window.

Input: blocks with halo, uint8 (rows, cols, 3). Output: float32 (n, m, m), the scores of every tissue tile. A `Choice`
says how they are computed, and an engine, which is given, runs the network. Where a run maps further classes, arrays of
scores have one more axis, the last, see `wsiflow.model.outputs`, until a group's tiles are complete.

Nothing here imports PyTorch: `wsiflow.model.scorer` prepares scorers with it, and `wsiflow.model.prepared` without.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from wsiflow.errors import InputError
from wsiflow.model.choice import Choice
from wsiflow.model.engines.spec import Engine
from wsiflow.plan import geometry
from wsiflow.plan.blocks import Block, crop_of, scored_cells, tile_windows_px, window_corners_px
from wsiflow.plan.geometry import Frame
from wsiflow.system.usage import Timer

Blocks = Iterable[tuple[Block, NDArray[np.uint8]]]
Fit = Callable[[NDArray[np.uint8]], NDArray[np.uint8]]
"""A function from windows, uint8 (n, side, side, 3), to the same windows with the side of a network's input."""

_REFINED_BATCHES = 8  # the last batch of some windows is filled up: an eighth at most is computed for nothing
_CALIBRATION_PX = 448  # two tiles a side: enough to see what there is, little enough for quantisation to take seconds


class _Tile(NamedTuple):
    """A tile to score: its block's pixels, x and y of its windows there, (m, m, 2), and which are scored, (m, m)."""

    pixels: NDArray[np.uint8]
    corners: NDArray[np.int64]
    scored: NDArray[np.bool_]


class TileScores(NamedTuple):
    """The scores of tiles.

    Attributes:
        prob: float32 (n, m, m), the scores of each tile's windows; NaN in cells that are not scored.
        maps: float32 (k, n, m, m), the probabilities of each of the k further classes.
        windows: Number of windows whose scores were computed; less than there are scores if some tiles were only
            scored coarsely.
    """

    prob: NDArray[np.float32]
    maps: NDArray[np.float32]
    windows: int


class WindowScorer:
    """The window engine: the classifier is run on every window alone, as in the reference system.

    The dense engine is compared with it. It is correct for any network, but slow, since windows overlap.
    """

    def __init__(self, engine: Engine, choice: Choice, window_px: int, fit: Fit) -> None:
        """Build the scorer.

        Args:
            engine: The engine, for uint8 (choice.batch, side, side, 3).
            choice: How scores are computed.
            window_px: Side of a window, px.
            fit: Function that gives windows the side that the engine takes.
        """
        self._engine, self._choice, self._window_px, self._fit = engine, choice, window_px, fit

    def score(self, frame: Frame, blocks: Blocks, timed: Timer) -> TileScores:
        """Return the scores of the blocks' tissue tiles in order.

        Raises:
            InputError: A probability is not finite.
        """
        if self._choice.refine:
            parts = [self._refined(frame, tiles, timed) for tiles in self._tile_chunks(frame, blocks)]
            return _tile_scores(np.concatenate([scores for scores, _ in parts]), sum(windows for _, windows in parts))
        every = np.ones((frame.cells_per_tile,) * 2, np.bool_)
        scored: list[NDArray[np.bool_]] = []
        tiles = (tile for each in blocks for tile in _tiles(frame, *each))
        scores = self.run(self._windows(tiles, every, scored), timed)
        return _tile_scores(_placed(scores, np.stack(scored)), len(scores))

    def run(self, windows: Iterable[NDArray[np.uint8]], timed: Timer) -> NDArray[np.float32]:
        """Return the scores of each window, float32 (n,) or (n, 1 + k); windows are uint8 (window_px, window_px, 3)."""
        return in_batches(self._engine, self._fitted(windows, timed), self._choice.batch, timed)

    def _fitted(self, windows: Iterable[NDArray[np.uint8]], timed: Timer) -> Iterator[NDArray[np.uint8]]:
        """Yield windows with the side that the network takes; one is resized at a time, as large ones need memory."""
        for window in windows:
            with timed("infer"):
                fitted = self._fit(window[None])[0]
            yield fitted

    def _windows(
        self, tiles: Iterable[_Tile], cells: NDArray[np.bool_], yielded: list[NDArray[np.bool_]]
    ) -> Iterator[NDArray[np.uint8]]:
        """Yield the scored windows of every tile whose cells are selected by a mask, bool (m, m).

        A mask of the cells whose windows were yielded, bool (m, m), is appended to ``yielded`` for each tile.
        """
        side = self._window_px
        for pixels, corners, scored in tiles:
            yielded.append(cells & scored)
            for x, y in corners[yielded[-1]].tolist():
                yield pixels[y : y + side, x : x + side]

    def _tile_chunks(self, frame: Frame, blocks: Blocks) -> Iterator[list[_Tile]]:
        """Yield the tiles of several blocks together, enough for their coarse windows to fill `_REFINED_BATCHES`."""
        enough = _REFINED_BATCHES * self._choice.batch * self._choice.refine_from_px**2 / frame.tile_px**2
        chunk: list[_Tile] = []
        for block, pixels in blocks:
            chunk.extend(_tiles(frame, block, pixels))
            if len(chunk) >= enough:
                yield chunk
                chunk = []
        if chunk:
            yield chunk

    def _refined(self, frame: Frame, tiles: Sequence[_Tile], timed: Timer) -> tuple[NDArray[np.float32], int]:
        """Return scores of a coarse grid for each tile, and all scores for tiles with a coarse score of ``refine``.

        A coarse score is that of a window of the fine grid: the one nearest to the centre of the cells that it fills.
        Further classes decide nothing here: they are computed for the same windows.

        Returns:
            float32 (n, m, m) or (n, m, m, 1 + k), and the number of windows that were computed.
        """
        m, step = frame.cells_per_tile, self._choice.refine_from_px // frame.stride_px
        coarse = np.zeros((m, m), np.bool_)
        coarse[step // 2 :: step, step // 2 :: step] = True
        yielded: list[NDArray[np.bool_]] = []
        first = self.run(self._windows(tiles, coarse, yielded), timed)
        grid = _placed(first, np.stack(yielded)[:, step // 2 :: step, step // 2 :: step])
        scores = grid.repeat(step, axis=1).repeat(step, axis=2)  # squares are scored as a whole or not at all
        highest = np.nan_to_num(positive(grid, axes=3), nan=-1.0).max(axis=(1, 2))
        refined, yielded = np.flatnonzero(highest >= self._choice.refine).tolist(), []
        rest = self.run(self._windows((tiles[i] for i in refined), ~coarse, yielded), timed)
        if len(rest):
            fine = scores[refined]
            fine[np.stack(yielded)] = rest
            scores[refined] = fine
        return scores, len(first) + len(rest)


def _placed(scores: NDArray[np.float32], cells: NDArray[np.bool_]) -> NDArray[np.float32]:
    """Return scores, (k, ...), in those cells, bool (n, m, m), that are True, and NaN in the others."""
    placed = np.full((*cells.shape, *scores.shape[1:]), np.nan, np.float32)
    placed[cells] = scores
    return placed


def positive(scores: NDArray[np.float32], *, axes: int) -> NDArray[np.float32]:
    """Return the positive scores, which have a number of axes, without those of further classes."""
    return scores if scores.ndim == axes else scores[..., 0]


def _tile_scores(scores: NDArray[np.float32], windows: int) -> TileScores:
    """Return the scores of tiles, float32 (n, m, m) or (n, m, m, 1 + k), with each class in an array of its own."""
    classes = np.moveaxis(scores[..., None] if scores.ndim == 3 else scores, -1, 0)
    return TileScores(np.ascontiguousarray(classes[0]), np.ascontiguousarray(classes[1:]), windows)


def _tiles(frame: Frame, block: Block, pixels: NDArray[np.uint8]) -> Iterator[_Tile]:
    """Yield the tissue tiles of a block."""
    scored = scored_cells(block, frame.cells_per_tile)
    for corners, own in zip(tile_windows_px(frame, block), scored, strict=True):
        yield _Tile(pixels, corners, own)


class DenseScorer:
    """The dense engine: the network is run once over a block, which gives the scores of all its windows."""

    def __init__(self, run_map: Callable[[NDArray[np.uint8], Timer], NDArray[np.float32]], choice: Choice) -> None:
        """Build the scorer.

        Args:
            run_map: Function from a region, uint8 (rows, cols, 3), to its map, float32 (rows, cols) or (rows, cols,
                1 + k).
            choice: How scores are computed.
        """
        self._run_map, self._choice = run_map, choice

    def score(self, frame: Frame, blocks: Blocks, timed: Timer) -> TileScores:
        """Return the scores of the blocks' tissue tiles in order.

        Raises:
            InputError: A probability is not finite.
        """
        m, parts, windows = frame.cells_per_tile, [], 0
        for block, pixels in blocks:
            scores = self.run(region(frame, block, pixels, self._choice.context_px), timed)
            crop, scored = crop_of(block, m), scored_cells(block, m)
            whole = np.full((block.rows * m, block.cols * m, *scores.shape[2:]), np.nan, np.float32)
            whole[crop.first_row :, crop.first_col :][: crop.rows, : crop.cols] = scores
            tiles = whole.reshape(block.rows, m, block.cols, m, *scores.shape[2:]).swapaxes(1, 2)
            parts.append(tiles.reshape(-1, m, m, *scores.shape[2:])[list(block.tissue)])
            parts[-1][~scored] = np.nan
            windows += int(scored.sum())
        return _tile_scores(np.concatenate(parts), windows)

    def run(self, pixels: NDArray[np.uint8], timed: Timer) -> NDArray[np.float32]:
        """Return the map of a region, float32 (rows, cols) or (rows, cols, 1 + k).

        Its first window is ``context_px`` inside the region.

        Raises:
            InputError: A probability is not finite.
        """
        scores = self._run_map(pixels, timed)
        bad = np.argwhere(~np.isfinite(scores))
        if bad.size:
            raise not_finite(f"the window in row {bad[0][0]}, column {bad[0][1]} of a block's map")
        return scores


def region(frame: Frame, block: Block, pixels: NDArray[np.uint8], context_px: int) -> NDArray[np.uint8]:
    """Return the part of a block's pixels, uint8 (rows, cols, 3), that its windows and their context cover."""
    before, _ = geometry.window_reach_px(frame.window_px, frame.stride_px, frame.convention)
    first, crop = frame.halo_px - before - context_px, crop_of(block, frame.cells_per_tile)
    rows, cols = ((cells - 1) * frame.stride_px + frame.window_px + 2 * context_px for cells in (crop.rows, crop.cols))
    return pixels[first : first + rows, first : first + cols]


def in_batches(engine: Engine, items: Iterable[NDArray[Any]], batch: int, timed: Timer) -> NDArray[np.float32]:
    """Return the scores of arrays of one shape, run in batches; the last batch is filled with zeros.

    All batches have the same shape, so a score does not depend on the number of others. One batch is in memory at a
    time.

    Args:
        engine: The engine.
        items: Arrays of equal shape and dtype.
        batch: Number of arrays per call of the engine.
        timed: Timer of the step ``infer``.

    Returns:
        float32 (n,) or (n, 1 + k), as the engine gives them; (0,) where there are no arrays.

    Raises:
        InputError: A score is not finite.
    """
    scores: list[NDArray[np.float32]] = []
    filled = 0
    inputs: NDArray[Any] = np.empty(0)
    for item in items:
        if not inputs.size:
            inputs = np.zeros((batch, *item.shape), item.dtype)
        inputs[filled] = item
        filled += 1
        if filled == batch:
            scores.append(_run(engine, inputs, filled, timed))
            filled = 0
    if filled:
        inputs[filled:] = 0
        scores.append(_run(engine, inputs, filled, timed))
    return np.concatenate(scores) if scores else np.empty(0, np.float32)


def _run(engine: Engine, inputs: NDArray[Any], filled: int, timed: Timer) -> NDArray[np.float32]:
    with timed("infer"):
        scores = np.array(engine(inputs)[:filled])  # a copy, because an engine may reuse its output
    if not np.isfinite(scores).all():
        raise not_finite(f"window {np.argwhere(~np.isfinite(scores))[0][0]} of a batch")
    return scores


def not_finite(window: str) -> InputError:
    """Return the error of a window whose probability is NaN or infinite."""
    return InputError(
        f"the model returns no finite probability for {window}",
        "its weights overflow on this input: use another model, or correct mean and std in its card",
        stage="predict",
    )


def calibration_sample(frame: Frame, block: Block, pixels: NDArray[np.uint8], choice: Choice) -> NDArray[np.uint8]:
    """Return a sample of the network's input from a block, for its calibration: uint8 (n, rows, cols, 3).

    For the dense engine this is a region of at most about 900 px a side from the middle of the block, and for the
    window engine a batch of windows that are spread over the block.
    """
    if choice.engine == "dense":
        inside = region(frame, block, pixels, choice.context_px)
        side = min(*inside.shape[:2], frame.window_px + 2 * choice.context_px + _CALIBRATION_PX)
        first = [(extent - side) // 2 for extent in inside.shape[:2]]
        return inside[None, first[0] : first[0] + side, first[1] : first[1] + side]
    corners = window_corners_px(frame, block)
    chosen = corners[np.linspace(0, len(corners) - 1, choice.batch).astype(int)].tolist()
    side = frame.window_px
    return np.stack([pixels[y : y + side, x : x + side] for x, y in chosen])


def timed_run(engine: Engine, inputs: NDArray[Any], timed: Timer) -> NDArray[np.float32]:
    """Return what an engine returns; its seconds are those of the step ``infer``."""
    with timed("infer"):
        return engine(inputs)
