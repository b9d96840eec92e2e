"""Scorers: from the pixels of blocks to the scores of their tissue tiles, over whole blocks or window by window.

Input: blocks with halo, uint8 (rows, cols, 3). Output: float32 (n, m, m), the scores of every tissue tile. A `Choice`
says how they are computed, and an engine of `wsiflow.model.engines.engine` runs the network. Where a run maps further
classes, arrays of scores have one more axis, the last, see `wsiflow.model.outputs`, until a group's tiles are complete.
"""

import hashlib
import importlib.metadata
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray
from torch import nn

from wsiflow.errors import InputError, WsiflowError
from wsiflow.model.choice import Choice
from wsiflow.model.classifier import Classifier, not_finite, resized
from wsiflow.model.dense import network
from wsiflow.model.dense.facts import DenseFacts, SplitPoint
from wsiflow.model.dense.network import densify, window_crops
from wsiflow.model.engines import openvino
from wsiflow.model.engines.cache import cache_folder, cached
from wsiflow.model.engines.engine import prepare, scores_from_pixels
from wsiflow.model.engines.spec import Backend, Engine, EngineSpec, Network, Precision, code_sha256
from wsiflow.plan import geometry
from wsiflow.plan.blocks import Block, crop_of, scored_cells, tile_windows_px, window_corners_px
from wsiflow.plan.geometry import Frame
from wsiflow.system.publish import key_of
from wsiflow.system.usage import Timer, untimed

Blocks = Iterable[tuple[Block, NDArray[np.uint8]]]
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

    def __init__(self, engine: Engine, choice: Choice, classifier: Classifier) -> None:
        """Build the scorer from an engine for uint8 (choice.batch, input_px, input_px, 3)."""
        self._engine, self._choice, self._classifier = engine, choice, classifier

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
                fitted = resized(self._classifier, window[None])[0]
            yield fitted

    def _windows(
        self, tiles: Iterable[_Tile], cells: NDArray[np.bool_], yielded: list[NDArray[np.bool_]]
    ) -> Iterator[NDArray[np.uint8]]:
        """Yield the scored windows of every tile whose cells are selected by a mask, bool (m, m).

        A mask of the cells whose windows were yielded, bool (m, m), is appended to ``yielded`` for each tile.
        """
        side = self._classifier.window_px
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


def make_scorer(
    classifier: Classifier, choice: Choice, *, threads: int, quantised: bytes | None = None
) -> WindowScorer | DenseScorer:
    """Return the scorer for a choice.

    Args:
        classifier: The classifier.
        choice: How scores are computed.
        threads: Number of threads with which the network runs.
        quantised: The calibrated network if the precision is int8, otherwise None.

    Raises:
        InputError: The network or the backend does not support the choice.
        EnvironmentFault: A package is missing, or this CPU does not support the precision.
    """
    spec = EngineSpec(cast("Backend", choice.backend), cast("Precision", choice.precision))

    def prepared(network: Network) -> Engine:
        return prepare(network, spec, threads=threads, cache=cache_folder(), quantised=quantised)

    if choice.engine == "window":
        return WindowScorer(prepared(_window_network(classifier, choice)), choice, classifier)
    if not choice.share_until:
        engine = prepared(_dense_network(classifier, choice))
        return DenseScorer(lambda pixels, timed: _timed_run(engine, pixels[None], timed)[0], choice)
    dense = densify(
        classifier,
        choice.stride_px,
        context_px=choice.context_px,
        share_until=choice.share_until,
        local=choice.local,
    )
    if choice.precision == "int8" or dense.stem is None or dense.tail is None or dense.crops is None:
        cause = "int8 is not supported for a network of which windows share only a part"
        raise InputError(cause, "set inference.precision=fp32 or bf16, or dense.share_until=''")
    crops, stem_module, tail_module = dense.crops, dense.stem, dense.tail
    pixels = _pixel_network(classifier, lambda: stem_module, choice, "stem")
    stem = prepared(pixels)
    like = window_crops(stem(pixels.example), crops)[0, 0, :1]
    example = np.repeat(like, choice.batch, axis=0)
    tail = prepared(Network(lambda: tail_module, _key(classifier, choice, "tail"), example, fixed=True))

    def run_map(pixels: NDArray[np.uint8], timed: Timer) -> NDArray[np.float32]:
        windows = window_crops(_timed_run(stem, pixels[None], timed), crops)[0]
        rows, cols = windows.shape[:2]
        each = (windows[row, col] for row in range(rows) for col in range(cols))
        scores = in_batches(tail, each, choice.batch, timed)
        return scores.reshape(rows, cols, *scores.shape[1:])

    return DenseScorer(run_map, choice)


def engine_to_time(classifier: Classifier, choice: Choice, *, threads: int) -> Engine:
    """Return an engine that runs one region, or one batch of equal windows, to measure the time of a choice.

    The engine takes uint8 (rows, cols, 3): a region, or the window with which a batch is filled.
    """
    scorer = make_scorer(classifier, choice, threads=threads)
    if isinstance(scorer, DenseScorer):
        return lambda pixels: scorer.run(pixels, untimed)
    return lambda pixels: scorer.run([pixels] * choice.batch, untimed)


def quantise(classifier: Classifier, choice: Choice, samples: Sequence[NDArray[np.uint8]]) -> bytes:
    """Return the network in int8, calibrated on uint8 (n, rows, cols, 3): regions, or windows of ``window_px``."""
    network = _window_network if choice.engine == "window" else _dense_network
    fitted = (resized(classifier, sample) for sample in samples)  # dense networks do not resize
    return openvino.quantise(network(classifier, choice), fitted, cache=cache_folder())


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


def _window_network(classifier: Classifier, choice: Choice) -> Network:
    side = classifier.input_px
    example = np.zeros((choice.batch, side, side, 3), np.uint8)
    return Network(lambda: scores_from_pixels(classifier), _key(classifier, choice, "window"), example, fixed=True)


def _dense_network(classifier: Classifier, choice: Choice) -> Network:
    def whole() -> nn.Module:
        module = densify(classifier, choice.stride_px, context_px=choice.context_px, local=choice.local).module
        if module is None:
            raise WsiflowError("a network that is not split has no module", "please report this", stage="predict")
        return module

    return _pixel_network(classifier, whole, choice, "dense")


def _pixel_network(classifier: Classifier, body: Callable[[], nn.Module], choice: Choice, part: str) -> Network:
    """Return a network over regions of any size; its example is large enough for four windows."""
    side = classifier.window_px + 2 * choice.context_px + choice.stride_px
    example = np.zeros((1, side, side, 3), np.uint8)
    return Network(lambda: scores_from_pixels(classifier, body()), _key(classifier, choice, part), example, fixed=False)


def describe(classifier: Classifier, stride: int, *, local: bool = False) -> DenseFacts:
    """Return the properties of a classifier that is run over regions.

    See `wsiflow.model.dense.network.describe`, which takes seconds; its result is cached like converted graphs.

    Raises:
        InputError: The network cannot run over whole regions.
    """
    versions = {"torch": importlib.metadata.version("torch")}
    key = key_of(facts=_identity(classifier), stride=stride, local=local, code=code_sha256(), versions=versions)

    def described() -> bytes:
        return json.dumps(network.describe(classifier, stride, local=local)._asdict()).encode()

    facts: dict[str, Any] = json.loads(cached(cache_folder(), key, described))
    facts |= {"overhang_px": tuple(facts["overhang_px"]), "cuts": tuple(SplitPoint(*cut) for cut in facts["cuts"])}
    return DenseFacts(**facts)


def _identity(classifier: Classifier) -> str:
    """Return a text that identifies a network: hashes of its weights and its structure."""
    return f"{classifier.identity} {hashlib.sha256(repr(classifier.module).encode()).hexdigest()}"


def _key(classifier: Classifier, choice: Choice, part: str) -> str:
    """Return a text that identifies a converted network: the network, its part, and the settings of the conversion."""
    also = " local" if choice.local else ""
    also += f" maps {classifier.outputs.maps}" if classifier.outputs.maps else ""
    return f"{_identity(classifier)} {part} {choice.stride_px} {choice.context_px} {choice.share_until}{also}"


def _timed_run(engine: Engine, inputs: NDArray[Any], timed: Timer) -> NDArray[np.float32]:
    with timed("infer"):
        return engine(inputs)
