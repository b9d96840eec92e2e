"""From blocks of pixels to the scores of their tissue tiles: the network run over whole blocks, or window by window.

Input: blocks with halo, uint8 (rows, cols, 3). Output: float32 (n, m, m), the map of every tissue tile. How it is done
is a `Choice`; what runs the network is an engine of `wsiflow.model.engines.engine`.
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
from wsiflow.model.classifier import Classifier, not_finite
from wsiflow.model.dense import network
from wsiflow.model.dense.facts import DenseFacts, SplitPoint
from wsiflow.model.dense.network import densify, window_crops
from wsiflow.model.engines import openvino
from wsiflow.model.engines.cache import cache_folder, cached
from wsiflow.model.engines.engine import prepare, scores_from_pixels
from wsiflow.model.engines.spec import Backend, Engine, EngineSpec, Network, Precision, code_sha256
from wsiflow.plan import geometry
from wsiflow.plan.blocks import Block, window_corners_px
from wsiflow.plan.geometry import Frame
from wsiflow.system.publish import key_of
from wsiflow.system.usage import Timer, untimed

Blocks = Iterable[tuple[Block, NDArray[np.uint8]]]
_Tile = tuple[
    NDArray[np.uint8], NDArray[np.int64]
]  # a block's pixels, and (m, m, 2), x and y of a tile's windows there
_REFINED_BATCHES = 8  # the last batch of some windows is filled up: an eighth at most is computed for nothing
_CALIBRATION_PX = 448  # two tiles a side: enough to see what there is, little enough for quantisation to take seconds


class TileScores(NamedTuple):
    """Scores of tiles.

    Attributes:
        prob: float32 (n, m, m).
        windows: How many of them were computed; fewer than there are where tiles were not looked at closely.
    """

    prob: NDArray[np.float32]
    windows: int


class WindowScorer:
    """The sliding window: every window goes through the classifier on its own, as in the reference system.

    It is the measure the dense engine is compared with: right for any network, and slow, since neighbouring windows
    share their pixels.
    """

    def __init__(self, engine: Engine, choice: Choice, *, window_px: int) -> None:
        """Take an engine for uint8 (choice.batch, window_px, window_px, 3)."""
        self._engine, self._window_px, self._choice = engine, window_px, choice

    def score(self, frame: Frame, blocks: Blocks, timed: Timer) -> TileScores:
        """Return the scores of the blocks' tissue tiles in order.

        Raises:
            InputError: A probability is not finite.
        """
        if self._choice.refine:
            parts = [self._refined(frame, held, timed) for held in self._held(frame, blocks)]
            return TileScores(np.concatenate([part.prob for part in parts]), sum(part.windows for part in parts))
        m = frame.cells_per_tile
        every = np.ones((m, m), np.bool_)
        found = self.run(self._cut((tile for each in blocks for tile in _tiles(frame, *each)), every), timed)
        return TileScores(found.reshape(-1, m, m), found.size)

    def run(self, windows: Iterable[NDArray[np.uint8]], timed: Timer) -> NDArray[np.float32]:
        """Return float32 (n,), the score of each window, uint8 (window_px, window_px, 3)."""
        return in_batches(self._engine, windows, self._choice.batch, timed)

    def _cut(self, tiles: Iterable[_Tile], cells: NDArray[np.bool_]) -> Iterator[NDArray[np.uint8]]:
        """Yield the windows of some cells, bool (m, m), of every tile."""
        side = self._window_px
        for pixels, corners in tiles:
            for x, y in corners[cells].tolist():
                yield pixels[y : y + side, x : x + side]

    def _held(self, frame: Frame, blocks: Blocks) -> Iterator[list[_Tile]]:
        """Yield tiles of so many blocks together that their coarse windows fill batches."""
        enough = _REFINED_BATCHES * self._choice.batch * self._choice.refine_from_px**2 / frame.tile_px**2
        held: list[_Tile] = []
        for block, pixels in blocks:
            held.extend(_tiles(frame, block, pixels))
            if len(held) >= enough:
                yield held
                held = []
        if held:
            yield held

    def _refined(self, frame: Frame, tiles: Sequence[_Tile], timed: Timer) -> TileScores:
        """Score a coarse grid of each tile, and the rest of it where one of these scores is high enough.

        A coarse score is that of a window of the fine grid, the nearest to the middle of the cells it stands for.
        """
        m, step = frame.cells_per_tile, self._choice.refine_from_px // frame.stride_px
        coarse = np.zeros((m, m), np.bool_)
        coarse[step // 2 :: step, step // 2 :: step] = True
        first = self.run(self._cut(tiles, coarse), timed).reshape(-1, m // step, m // step)
        prob = first.repeat(step, axis=1).repeat(step, axis=2)
        closer = np.flatnonzero(first.max(axis=(1, 2)) >= self._choice.refine).tolist()
        rest = self.run(self._cut((tiles[i] for i in closer), ~coarse), timed)
        fine = prob[closer]
        fine[:, ~coarse] = rest.reshape(len(closer), int((~coarse).sum()))
        prob[closer] = fine
        return TileScores(prob, first.size + rest.size)


def _tiles(frame: Frame, block: Block, pixels: NDArray[np.uint8]) -> Iterator[_Tile]:
    """Yield a block's pixels with the windows of each of its tissue tiles."""
    m = frame.cells_per_tile
    for corners in window_corners_px(frame, block).reshape(-1, m, m, 2):
        yield pixels, corners


class DenseScorer:
    """The network once over a block: every window of it at once."""

    def __init__(self, run_map: Callable[[NDArray[np.uint8], Timer], NDArray[np.float32]], choice: Choice) -> None:
        """Take what turns a region, uint8 (rows, cols, 3), into its map."""
        self._run_map, self._choice = run_map, choice

    def score(self, frame: Frame, blocks: Blocks, timed: Timer) -> TileScores:
        """Return the scores of the blocks' tissue tiles in order.

        Raises:
            InputError: A probability is not finite.
        """
        m, found = frame.cells_per_tile, []
        for block, pixels in blocks:
            scores = self.run(region(frame, block, pixels, self._choice.context_px), timed)
            tiles = scores.reshape(block.rows, m, block.cols, m).swapaxes(1, 2)
            found.append(tiles.reshape(-1, m, m)[list(block.tissue)])
        prob = np.concatenate(found)
        return TileScores(prob, prob.size)

    def run(self, pixels: NDArray[np.uint8], timed: Timer) -> NDArray[np.float32]:
        """Return the map of a region, float32 (rows, cols); its first window lies ``context_px`` inside the region."""
        scores = self._run_map(pixels, timed)
        bad = np.argwhere(~np.isfinite(scores))
        if bad.size:
            raise not_finite(f"the window in row {bad[0][0]}, column {bad[0][1]} of a block's map")
        return scores


def region(frame: Frame, block: Block, pixels: NDArray[np.uint8], context_px: int) -> NDArray[np.uint8]:
    """Return the part of a block's pixels that its windows and their context cover."""
    before, _ = geometry.window_reach_px(frame.window_px, frame.stride_px, frame.convention)
    first = frame.halo_px - before - context_px
    rows, cols = (
        (tiles * frame.cells_per_tile - 1) * frame.stride_px + frame.window_px + 2 * context_px
        for tiles in (block.rows, block.cols)
    )
    return pixels[first : first + rows, first : first + cols]


def in_batches(engine: Engine, items: Iterable[NDArray[Any]], batch: int, timed: Timer) -> NDArray[np.float32]:
    """Run equal arrays through an engine in batches of one shape, the last one filled up with zeros.

    A score so never depends on how many others there are. One batch is in memory at a time.

    Raises:
        InputError: A score is not finite.
    """
    found, held = [np.empty(0, np.float32)], 0
    inputs: NDArray[Any] = np.empty(0)
    for item in items:
        if not inputs.size:
            inputs = np.zeros((batch, *item.shape), item.dtype)
        inputs[held] = item
        held += 1
        if held == batch:
            found.append(_run(engine, inputs, held, timed))
            held = 0
    if held:
        inputs[held:] = 0
        found.append(_run(engine, inputs, held, timed))
    return np.concatenate(found)


def _run(engine: Engine, inputs: NDArray[Any], held: int, timed: Timer) -> NDArray[np.float32]:
    with timed("infer"):
        scores = np.array(engine(inputs)[:held])  # a copy: an engine may use its output again
    if not np.isfinite(scores).all():
        raise not_finite(f"window {np.flatnonzero(~np.isfinite(scores))[0]} of a batch")
    return scores


def make_scorer(
    classifier: Classifier, choice: Choice, *, threads: int, quantised: bytes | None = None
) -> WindowScorer | DenseScorer:
    """Return what computes scores as chosen.

    Args:
        classifier: The classifier.
        choice: How.
        threads: Threads of the network.
        quantised: The calibrated network where the precision is int8.

    Raises:
        InputError: The network cannot do what is chosen.
        EnvironmentFault: This machine cannot.
    """
    spec = EngineSpec(cast("Backend", choice.backend), cast("Precision", choice.precision))

    def prepared(network: Network) -> Engine:
        return prepare(network, spec, threads=threads, cache=cache_folder(), quantised=quantised)

    if choice.engine == "window":
        return WindowScorer(prepared(_window_network(classifier, choice)), choice, window_px=classifier.window_px)
    if not choice.share_until:
        engine = prepared(_dense_network(classifier, choice))
        return DenseScorer(lambda pixels, timed: _timed_run(engine, pixels[None], timed)[0], choice)
    made = densify(classifier, choice.stride_px, context_px=choice.context_px, share_until=choice.share_until)
    if choice.precision == "int8" or made.stem is None or made.tail is None or made.crops is None:
        cause = "a network that windows share only in part is not run in int8"
        raise InputError(cause, "set inference.precision=fp32 or bf16, or dense.share_until=''")
    crops, stem_module, tail_module = made.crops, made.stem, made.tail
    pixels = _pixel_network(classifier, lambda: stem_module, choice, "stem")
    stem = prepared(pixels)
    like = window_crops(stem(pixels.example), crops)[0, 0, :1]
    example = np.repeat(like, choice.batch, axis=0)
    tail = prepared(Network(lambda: tail_module, _key(classifier, choice, "tail"), example, fixed=True))

    def run_map(pixels: NDArray[np.uint8], timed: Timer) -> NDArray[np.float32]:
        windows = window_crops(_timed_run(stem, pixels[None], timed), crops)[0]
        rows, cols = windows.shape[:2]
        each = (windows[row, col] for row in range(rows) for col in range(cols))
        return in_batches(tail, each, choice.batch, timed).reshape(rows, cols)

    return DenseScorer(run_map, choice)


def engine_to_time(classifier: Classifier, choice: Choice, *, threads: int) -> Engine:
    """Return what runs one region or one batch of equal windows as chosen, for measuring how long it takes.

    The engine takes uint8 (rows, cols, 3): a region, or the window a batch is filled with.
    """
    made = make_scorer(classifier, choice, threads=threads)
    if isinstance(made, DenseScorer):
        return lambda pixels: made.run(pixels, untimed)
    return lambda pixels: made.run([pixels] * choice.batch, untimed)


def quantise(classifier: Classifier, choice: Choice, samples: Sequence[NDArray[np.uint8]]) -> bytes:
    """Return the network in int8, calibrated on regions or windows, uint8 (n, rows, cols, 3), such as it will see."""
    network = _window_network if choice.engine == "window" else _dense_network
    return openvino.quantise(network(classifier, choice), samples, cache=cache_folder())


def calibration_sample(frame: Frame, block: Block, pixels: NDArray[np.uint8], choice: Choice) -> NDArray[np.uint8]:
    """Return what the network sees of a block, to calibrate it on: uint8 (n, rows, cols, 3).

    A region of at most some 900 px from the block's middle; or a batch of its windows, from all over it.
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
    side = classifier.window_px
    example = np.zeros((choice.batch, side, side, 3), np.uint8)
    return Network(lambda: scores_from_pixels(classifier), _key(classifier, choice, "window"), example, fixed=True)


def _dense_network(classifier: Classifier, choice: Choice) -> Network:
    def whole() -> nn.Module:
        module = densify(classifier, choice.stride_px, context_px=choice.context_px).module
        if module is None:
            raise WsiflowError("a network that is not cut has no module", "please report this", stage="predict")
        return module

    return _pixel_network(classifier, whole, choice, "dense")


def _pixel_network(classifier: Classifier, body: Callable[[], nn.Module], choice: Choice, part: str) -> Network:
    """Return a network over regions of any size; the example is large enough for four windows."""
    side = classifier.window_px + 2 * choice.context_px + choice.stride_px
    example = np.zeros((1, side, side, 3), np.uint8)
    return Network(lambda: scores_from_pixels(classifier, body()), _key(classifier, choice, part), example, fixed=False)


def describe(classifier: Classifier, stride: int) -> DenseFacts:
    """Return what running a classifier over regions means; it takes seconds, so it is kept like converted graphs.

    See `wsiflow.model.dense.network.describe`.

    Raises:
        InputError: The network cannot run over whole regions.
    """
    versions = {"torch": importlib.metadata.version("torch")}
    key = key_of(facts=_identity(classifier), stride=stride, code=code_sha256(), versions=versions)
    found = cached(cache_folder(), key, lambda: json.dumps(network.describe(classifier, stride)._asdict()).encode())
    facts: dict[str, Any] = json.loads(found)
    facts |= {"overhang_px": tuple(facts["overhang_px"]), "cuts": tuple(SplitPoint(*cut) for cut in facts["cuts"])}
    return DenseFacts(**facts)


def _identity(classifier: Classifier) -> str:
    """Return what tells networks apart: weights and structure."""
    return f"{classifier.identity} {hashlib.sha256(repr(classifier.module).encode()).hexdigest()}"


def _key(classifier: Classifier, choice: Choice, part: str) -> str:
    """Return what tells converted networks apart: the network, and what is done with it."""
    return f"{_identity(classifier)} {part} {choice.stride_px} {choice.context_px} {choice.share_until}"


def _timed_run(engine: Engine, inputs: NDArray[Any], timed: Timer) -> NDArray[np.float32]:
    with timed("infer"):
        return engine(inputs)
