"""Draw the windows of a slide whose scores a certificate recomputes: those that decide, and some of all others.

Input: the heatmap of a slide, its blocks, the cells at which detections peak, and the annotated regions. Output: cells
of the heatmap with the number of windows that each stands for.

Every scored cell belongs to the first kind that fits. ``detection``: a detection's highest cell; all are drawn.
``lesion``: inside an annotated region; a quarter of the windows, and one at least in each region. ``threshold``: within
`NEAR` of the threshold of detections; an eighth. ``rest``: every other cell. The last three are drawn from random
blocks, up to eight of a kind, a few windows from each, because it is blocks that are read. Cells outside the slide are
of no kind: they have no score.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from wsiflow.model.certificate import Weighing, draw_indices
from wsiflow.plan.blocks import Block, scored_cells
from wsiflow.plan.geometry import Frame
from wsiflow.system import publish

KINDS = ("detection", "lesion", "threshold", "rest")
NEAR = 0.1
"""Distance of a score from the threshold of detections within which a small deviation may change the decision."""

_LEAST_OF_REGION = 4  # cells that are drawn of each annotated region that is passed over
_BLOCKS = 8  # from which windows of a kind are drawn at random

Cells = NDArray[np.int64]
"""int64 (n, 2), row and column of cells of a heatmap."""


class Scored(NamedTuple):
    """What is known of a slide before windows are drawn.

    Attributes:
        frame: The slide's transform.
        blocks: The slide's blocks.
        heat: float32 (rows, cols), the published scores; NaN where there is none.
        threshold: A cell counts for detections when its score is higher than this.
        peaks: int64 (n, 2), row and column of the highest cell of each detection, by falling confidence.
        regions: int32 (rows, cols), number of the annotated region that each cell lies in, 0 for none; None where it is
            not known what is tumour.
    """

    frame: Frame
    blocks: Sequence[Block]
    heat: NDArray[np.float32]
    threshold: float
    peaks: Cells
    regions: NDArray[np.int32] | None


class Drawn(NamedTuple):
    """The windows that were drawn, in the order of the blocks and of the windows in each.

    Attributes:
        block: int64 (n,), number of the block that each window lies in.
        window: int64 (n,), its number in the block, in the order of the scores.
        cells: int64 (n, 2), row and column of its cell.
        kind: int64 (n,), its kind, an index of `KINDS`.
        region: int64 (n,), number of the annotated region for which it was drawn; 0 for none.
        detection: int64 (n,), index of the detection that peaks there; -1 for none.
        weighing: How the windows were drawn.
    """

    block: NDArray[np.int64]
    window: NDArray[np.int64]
    cells: Cells
    kind: NDArray[np.int64]
    region: NDArray[np.int64]
    detection: NDArray[np.int64]
    weighing: Weighing


class _Part(NamedTuple):
    """Cells that were drawn from one part: their weights, and the unit of each."""

    cells: Cells
    weight: NDArray[np.float64]
    unit: NDArray[np.int64]
    kind: int
    region: int = 0


class _Wish(NamedTuple):
    """What is to be drawn: the kind, about how many windows, from how many blocks, and in which annotated region."""

    kind: int
    n: int
    blocks: int
    region: int = 0


def draw(slide: Scored, *, seed: str, count: int) -> Drawn:
    """Draw about ``count`` windows; more where there are many detections, or more annotated regions than a quarter.

    Args:
        slide: The slide.
        seed: Key of the slide.
        count: Number of windows.
    """
    grid = _grid(slide)
    peaks = slide.peaks
    free = np.isfinite(slide.heat)
    free[tuple(peaks.T)] = False
    parts = [_Part(peaks, np.ones(len(peaks)), np.arange(len(peaks)), KINDS.index("detection"))]
    if slide.regions is not None:
        parts += _of_regions(slide.regions, grid, free, seed, count // 4)
        free &= slide.regions == 0
    near = free & (np.abs(slide.heat - np.float32(slide.threshold)) <= NEAR)
    parts += _of_blocks(grid, near, seed, _Wish(KINDS.index("threshold"), max(1, count // 8), _BLOCKS))
    left = max(1, count // 8, count - sum(len(part.cells) for part in parts))
    parts += _of_blocks(grid, free & ~near, seed, _Wish(KINDS.index("rest"), left, _BLOCKS))
    return _ordered(grid, parts, len(peaks))


class Passed(NamedTuple):
    """The cells that were drawn from those that a first pass passes over.

    Attributes:
        cells: int64 (n, 2), row and column of each cell.
        region: int64 (n,), number of the annotated region for which it was drawn; 0 for none.
        weighing: How the cells were drawn; each is a unit of its own.
    """

    cells: Cells
    region: NDArray[np.int64]
    weighing: Weighing


def draw_passed_over(
    passed: NDArray[np.bool_],
    first: NDArray[np.float32],
    regions: NDArray[np.int32] | None,
    *,
    seed: str,
    count: int,
) -> Passed:
    """Draw about ``count`` of the cells that a first pass passes over; more where many annotated regions have some.

    A quarter is drawn inside annotated regions, and at least four cells of each. Of the others as many are drawn from
    the tenth with the highest first scores, where a fine pass finds most, as from the other nine tenths.

    Args:
        passed: bool (rows, cols), the cells that are passed over.
        first: float32 (rows, cols), their scores of the first pass.
        regions: int32 (rows, cols), number of the annotated region that each cell lies in, 0 for none; None where it is
            not known what is tumour.
        seed: Key of the slide.
        count: Number of cells.
    """
    kind, parts = len(KINDS), list[_Part]()
    inside = np.zeros(passed.shape, np.int32) if regions is None else np.where(passed, regions, 0)
    present = np.unique(inside[inside > 0]).tolist()
    for number in present:
        each = max(_LEAST_OF_REGION, count // 4 // len(present))
        parts.append(_drawn(np.argwhere(inside == number), seed, each)._replace(kind=kind, region=number))
    others = np.argwhere(passed & (inside == 0))
    order = np.argsort(-first[tuple(others.T)], kind="stable")
    highest = len(others) // 10
    left = max(2, count - sum(len(part.cells) for part in parts))
    for cells in (others[np.sort(order[:highest])], others[np.sort(order[highest:])]):
        parts.append(_drawn(cells, publish.key_of(slide=seed, among=len(cells)), left // 2))
    parts = [part._replace(unit=np.arange(len(part.cells))) for part in parts if len(part.cells)]
    sizes = [len(part.cells) for part in parts]
    return Passed(
        np.concatenate([np.empty((0, 2), np.int64), *(part.cells for part in parts)]),
        np.repeat(np.array([part.region for part in parts], np.int64), sizes),
        Weighing(
            np.concatenate([np.empty(0), *(part.weight for part in parts)]),
            np.repeat(np.arange(len(parts)), sizes),
            np.concatenate([np.empty(0, np.int64), *(part.unit for part in parts)]),
        ),
    )


def _drawn(cells: Cells, seed: str, count: int) -> _Part:
    """Draw some of the cells of a part; each stands for as many."""
    drawn = cells[draw_indices(seed, among=len(cells), count=count)]
    return _Part(drawn, np.full(len(drawn), len(cells) / max(1, len(drawn))), np.arange(len(drawn)), len(KINDS))


class _Grid(NamedTuple):
    """Where the windows of a slide are: -1 in cells that are not scored.

    Attributes:
        block: int64 (rows, cols), number of the block that each cell lies in.
        window: int64 (rows, cols), number of its window in the block, in the order of the scores.
    """

    block: NDArray[np.int64]
    window: NDArray[np.int64]

    def at(self, cells: Cells) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the block and the window of cells."""
        places = tuple(cells.T)
        return self.block[places], self.window[places]


def _grid(slide: Scored) -> _Grid:
    m = slide.frame.cells_per_tile
    grid = _Grid(np.full(slide.heat.shape, -1), np.full(slide.heat.shape, -1))
    for number, block in enumerate(slide.blocks):
        scored = scored_cells(block, m)
        windows = np.cumsum(scored).reshape(scored.shape) - 1
        for (col, row), own, order in zip(block.cells(), scored, windows, strict=True):
            top, left = (row - slide.frame.t_row0) * m, (col - slide.frame.t_col0) * m
            place = slice(top, top + m), slice(left, left + m)
            grid.block[place] = np.where(own, number, -1)
            grid.window[place] = np.where(own, order, -1)
    return grid


def _of_regions(regions: NDArray[np.int32], grid: _Grid, free: NDArray[np.bool_], seed: str, count: int) -> list[_Part]:
    """Draw cells from each annotated region."""
    inside = np.where(free, regions, 0)
    present = np.unique(inside[inside > 0]).tolist()
    each, most_blocks = (max(1, limit // max(1, len(present))) for limit in (count, _BLOCKS))
    kind = KINDS.index("lesion")
    wishes = [_Wish(kind, each, most_blocks, number) for number in present]
    return [part for wish in wishes for part in _of_blocks(grid, inside == wish.region, seed, wish)]


def _of_blocks(grid: _Grid, mask: NDArray[np.bool_], seed: str, wish: _Wish) -> list[_Part]:
    """Draw cells of a mask from random blocks, equally many from each.

    Where that is all blocks that have such cells, each block is a part. Elsewhere a block is a unit, and the weights
    are those of a ratio estimate: together the drawn cells stand for all cells of the mask.
    """
    every = np.argwhere(mask)
    owner, _ = grid.at(every)
    having = np.unique(owner).tolist()
    key = publish.key_of(slide=seed, kind=KINDS[wish.kind], region=wish.region)
    most = min(wish.blocks, wish.n)
    chosen = [having[i] for i in draw_indices(key, among=len(having), count=most).tolist()]
    each = -(-wish.n // max(1, len(chosen)))
    parts = []
    for number in chosen:
        cells = every[owner == number]
        in_block = publish.key_of(slide=key, block=number)
        drawn = cells[draw_indices(in_block, among=len(cells), count=each)]
        weight = np.full(len(drawn), len(cells) / len(drawn))
        parts.append(_Part(drawn, weight, np.arange(len(drawn)), wish.kind, wish.region))
    if len(chosen) == len(having):
        return parts
    scale = len(every) / int(np.isin(owner, chosen).sum())
    cells, weight = np.concatenate([part.cells for part in parts]), np.concatenate([part.weight for part in parts])
    units = np.repeat(chosen, [len(part.cells) for part in parts])
    return [_Part(cells, weight * scale, units, wish.kind, wish.region)]


def _ordered(grid: _Grid, parts: Sequence[_Part], n_peaks: int) -> Drawn:
    """Return the drawn cells of all parts, of which the first are those of detections, in the order of their blocks."""
    sizes = [len(part.cells) for part in parts]
    cells = np.concatenate([np.empty((0, 2), np.int64), *(part.cells for part in parts)])
    block, window = grid.at(cells)
    order = np.lexsort((window, block))
    detection = np.full(len(cells), -1)
    detection[:n_peaks] = np.arange(n_peaks)
    kind, region = (np.repeat([part[place] for part in parts], sizes) for place in (3, 4))
    weighing = Weighing(
        np.concatenate([part.weight for part in parts])[order],
        np.repeat(np.arange(len(parts)), sizes)[order],
        np.concatenate([part.unit for part in parts])[order].astype(np.int64),
    )
    return Drawn(block[order], window[order], cells[order], kind[order], region[order], detection[order], weighing)
