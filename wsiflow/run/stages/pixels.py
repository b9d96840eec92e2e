"""From a planned slide to the pixels the network sees: read from the slide or the store, colours normalised.

Everything that needs a block's pixels (prediction, its certificate, calibration) gets them here, so all of them see the
same.
"""

import contextlib
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from wsiflow.errors import IntegrityError
from wsiflow.plan import geometry
from wsiflow.plan.blocks import Block
from wsiflow.plan.geometry import Frame
from wsiflow.plan.slide_plan import SlidePlan, read_cut
from wsiflow.run import store
from wsiflow.run.plan import Plan
from wsiflow.run.stages import ingest
from wsiflow.slides import content, slide
from wsiflow.slides.stain import transfer
from wsiflow.slides.stain.params import StainParams, read_fit
from wsiflow.system import publish
from wsiflow.system.usage import Timer, untimed

_AnyPixels = TypeVar("_AnyPixels")


@contextlib.contextmanager
def open_planned(root: Path, planned: SlidePlan) -> Iterator[slide.Slide]:
    """Open a planned slide, unless it is no longer the one that was planned, and see that it stays so to the end.

    Whoever reads a planned slide does it in here, and publishes nothing before this has ended.

    Raises:
        InputError: Its content has changed, or it cannot be opened.
        SlideModified: It was written while it was read.
    """
    path = Path(planned.path)
    with content.unmodified(path, planned.slide_id):
        ingest.check_unchanged(root, planned.slide_id, path)
        with slide.open_slide(path, slide_id=planned.slide_id) as opened:
            yield opened


def block_size_px(frame: Frame, block: Block) -> tuple[int, int]:
    """Return rows and columns of a block with halo, reading pixels."""
    return frame.block_px(block.rows), frame.block_px(block.cols)


def block_coord(frame: Frame, blocks: Sequence[Block]) -> NDArray[np.int64]:
    """Return int64 (n, 5): first tile's column and row, level-0 x and y of the first pixel, width in level-0 px."""
    rows = []
    for block in blocks:
        x, y = geometry.patch_origin_px(frame, block.t_col, block.t_row)
        width = round(frame.block_px(block.cols) * frame.l0_per_px)
        rows.append((block.t_col, block.t_row, round(x * frame.l0_per_px), round(y * frame.l0_per_px), width))
    return np.array(rows, dtype=np.int64).reshape(-1, 5)


def read_slide(opened: slide.Slide, frame: Frame, blocks: Sequence[Block]) -> Iterator[store.Pixels]:
    """Read blocks with their halo from a slide, one at a time."""
    for block in blocks:
        origin = geometry.patch_origin_px(frame, block.t_col, block.t_row)
        rows, cols = block_size_px(frame, block)
        region = opened.read_scaled(*origin, (cols, rows), l0_per_px=frame.l0_per_px)
        yield region.rgb, region.transparent


def timed_reads(parts: Iterator[_AnyPixels], timed: Timer) -> Iterator[_AnyPixels]:
    """Count the seconds that blocks take to be read as those of ``read``, whatever happens between them."""
    while True:
        with timed("read"):
            part = next(parts, None)
        if part is None:
            return
        yield part


class Colours:
    """How the colours of a slide's blocks are normalised, and which blocks could not be."""

    def __init__(self, root: Path, plan: Plan, planned: SlidePlan) -> None:
        """Read the slide's fit, where the run has one.

        Raises:
            IntegrityError: It should have one and has not.
        """
        self.params = plan.settings.stain
        self.failures: list[tuple[int, int, str]] = []
        self._fit = None
        if fits_slides(self.params):
            path = root / fit_name(planned)
            if not path.exists():
                raise IntegrityError("the slide's colours were not measured", "run again", path=path)
            found = json.loads(path.read_text(encoding="utf-8"))
            self._fit = read_fit(found["fit"]) if found["fit"] else None

    def normalised(self, frame: Frame, block: Block, pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Return a block in the colours of the template; by policy unchanged where that fails, which is noted.

        Raises:
            InputError: It fails and the policy is to stop.
        """
        outcome = transfer.normalise_block(pixels, self._fit, self.params)
        if outcome.failure and self.params.per_patch:  # a slide without a fit is noted once, with its fit
            x, y = (round(tile * frame.tile_px * frame.l0_per_px) for tile in (block.t_col, block.t_row))
            self.failures.append((x, y, outcome.failure))
        return outcome.rgb


def fits_slides(params: StainParams) -> bool:
    """Tell whether colours are fitted once per slide."""
    return params.method != "none" and not params.per_patch


@contextlib.contextmanager
def planned_blocks(
    root: Path,
    plan: Plan,
    planned: SlidePlan,
    wanted: Sequence[int],
    timed: Timer = untimed,
    colours: Colours | None = None,
) -> Iterator[Iterator[tuple[Block, NDArray[np.uint8]]]]:
    """Open what holds the pixels of a planned slide, as long as the body reads blocks of it.

    Args:
        root: The run's folder.
        plan: The plan.
        planned: The slide.
        wanted: Indices of blocks among the slide's, rising.
        timed: Counts the seconds of the steps ``read`` and ``stain``.
        colours: The slide's colours, for a caller that wants to know what failed.

    Yields:
        An iterator over each block and what the network is to see of it, uint8 (rows, cols, 3).

    Raises:
        InputError: The slide has changed, changes or cannot be read, or its colours cannot be normalised.
        IntegrityError: The store is damaged.
    """
    if not wanted:
        yield iter(())
        return
    cut, colours = read_cut(root, planned), colours or Colours(root, plan, planned)
    blocks = [cut.blocks[index] for index in wanted]
    with contextlib.ExitStack() as held:
        parts = _stored(root, plan, planned, wanted)
        if plan.settings.store.kind == "none":
            with timed("read"):
                opened = held.enter_context(open_planned(root, planned))
            parts = (pixels for pixels, _ in read_slide(opened, planned.frame, blocks))
        yield _normalised(planned.frame, zip(blocks, timed_reads(parts, timed), strict=True), timed, colours)


def _normalised(
    frame: Frame, parts: Iterable[tuple[Block, NDArray[np.uint8]]], timed: Timer, colours: Colours
) -> Iterator[tuple[Block, NDArray[np.uint8]]]:
    """Yield blocks with their colours normalised."""
    for block, pixels in parts:
        with timed("stain"):
            normal = colours.normalised(frame, block, pixels)
        yield block, normal


def _stored(root: Path, plan: Plan, planned: SlidePlan, wanted: Sequence[int]) -> Iterator[NDArray[np.uint8]]:
    """Yield the pixels of blocks as they were stored."""
    cut = read_cut(root, planned)
    for k, (lo, hi) in enumerate(cut.group_ranges, 1):
        inside = [index - lo for index in wanted if lo <= index < hi]
        if not inside:
            continue
        path = root / part_name(planned, plan.part_of(k))
        with store.open_patches(path) as file:
            group = store.patch_group(file, k)
            if not np.array_equal(group.coord, block_coord(planned.frame, cut.group(k))):
                raise IntegrityError(f"group t{k} holds other blocks than planned", "delete it, run again", path=path)
            for index in inside:
                yield group.block(index)


def part_name(planned: SlidePlan, part: int) -> str:
    """Return the name of a part of a slide's patches, relative to the run's folder."""
    return f"patches/{planned.slide_id}/p{part}.h5"


def fit_key(root: Path, planned: SlidePlan, params: StainParams) -> str:
    """Return what identifies a slide's stain fit: the pixels that are looked at, and how."""
    seen = (planned.sha256, planned.frame.tile_px, planned.frame.l0_per_px, read_cut(root, planned).tile_runs)
    return publish.key_of(seen=seen, stain=params.model_dump(exclude={"target"}))


def fit_name(planned: SlidePlan) -> str:
    """Return the name of a slide's stain fit, relative to the run's folder."""
    return f"stain/{planned.slide_id}.json"
