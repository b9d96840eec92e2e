"""The pixels of a planned slide as the network sees them: read from the slide or the store, with normalised colours.

Prediction, its certificate and the calibration all get the pixels of blocks here, so that they see the same ones.
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
from wsiflow.plan.blocks import Block, origin_px, size_px
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
    """Open a planned slide, and check before and after the body that it has the content that was planned.

    Every stage opens planned slides with this function, and publishes nothing of them before the body has ended.

    Raises:
        InputError: The content of the slide has changed, or the slide cannot be opened.
        SlideModified: The slide was written while it was read.
    """
    path = Path(planned.path)
    with content.unmodified(path, planned.slide_id):
        ingest.check_unchanged(root, planned.slide_id, path)
        with slide.open_slide(path, slide_id=planned.slide_id) as opened:
            yield opened


def block_coord(frame: Frame, blocks: Sequence[Block]) -> NDArray[np.int64]:
    """Return int64 (n, 5): column and row of the first tile, level-0 x and y of the first pixel, level-0 width."""
    rows = []
    for block in blocks:
        x, y = origin_px(frame, block)
        width = round(size_px(frame, block)[1] * frame.l0_per_px)
        rows.append((block.t_col, block.t_row, round(x * frame.l0_per_px), round(y * frame.l0_per_px), width))
    return np.array(rows, dtype=np.int64).reshape(-1, 5)


def read_slide(opened: slide.Slide, frame: Frame, blocks: Sequence[Block]) -> Iterator[store.Pixels]:
    """Yield the pixels of blocks with halo, which are read from a slide one after another."""
    for block in blocks:
        rows, cols = size_px(frame, block)
        region = opened.read_scaled(*origin_px(frame, block), (cols, rows), l0_per_px=frame.l0_per_px)
        yield region.rgb, region.transparent


def timed_reads(parts: Iterator[_AnyPixels], timed: Timer) -> Iterator[_AnyPixels]:
    """Yield blocks, and count the seconds until each of them is there as the step ``read``."""
    while True:
        with timed("read"):
            part = next(parts, None)
        if part is None:
            return
        yield part


class Colours:
    """The normalisation of the colours of a slide's blocks.

    Attributes:
        params: The settings.
        failures: Level-0 x and y of each block whose colours could not be normalised, and the reason.
    """

    def __init__(self, root: Path, plan: Plan, planned: SlidePlan) -> None:
        """Read the stain fit of the slide, where the settings ask for one.

        Raises:
            IntegrityError: The fit is missing.
        """
        self.params = plan.settings.stain
        self.failures: list[tuple[int, int, str]] = []
        self._fit = None
        if fits_slides(self.params):
            path = root / fit_name(planned)
            if not path.exists():
                raise IntegrityError("the slide's colours were not measured", "run again", path=path)
            record = json.loads(path.read_text(encoding="utf-8"))
            self._fit = read_fit(record["fit"]) if record["fit"] else None

    def normalised(self, frame: Frame, block: Block, pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Return a block in the colours of the template, uint8 (rows, cols, 3).

        Where this fails and the policy allows it, the block is returned unchanged, and the failure is recorded.

        Raises:
            InputError: The colours cannot be normalised, and the policy is to fail.
        """
        outcome = transfer.normalise_block(pixels, self._fit, self.params)
        if outcome.failure and self.params.per_patch:  # the failure of a whole slide is recorded by the stage ``stain``
            x, y = (round(tile * frame.tile_px * frame.l0_per_px) for tile in (block.t_col, block.t_row))
            self.failures.append((x, y, outcome.failure))
        return outcome.rgb


def fits_slides(params: StainParams) -> bool:
    """Tell whether colours are fitted once for a slide."""
    return params.method != "none" and not params.per_patch


@contextlib.contextmanager
def planned_blocks(
    root: Path,
    plan: Plan,
    planned: SlidePlan,
    indices: Sequence[int],
    timed: Timer = untimed,
    colours: Colours | None = None,
) -> Iterator[Iterator[tuple[Block, NDArray[np.uint8]]]]:
    """Open the slide or the store, and give the body an iterator over blocks as the network sees them.

    Args:
        root: The run's folder.
        plan: The plan.
        planned: The slide.
        indices: Indices of blocks of the slide, in rising order.
        timed: Counts the seconds of the steps ``read`` and ``stain``.
        colours: The normalisation of the slide, for a caller that reads its failures.

    Yields:
        An iterator over blocks with their normalised pixels, uint8 (rows, cols, 3).

    Raises:
        InputError: The slide has changed or cannot be read, or its colours cannot be normalised.
        SlideModified: The slide was written while it was read.
        IntegrityError: The store is damaged, or the stain fit is missing.
    """
    if not indices:
        yield iter(())
        return
    cut, colours = read_cut(root, planned), colours or Colours(root, plan, planned)
    blocks = [cut.blocks[index] for index in indices]
    with contextlib.ExitStack() as held:
        parts = _stored(root, plan, planned, indices)
        if plan.settings.store.kind == "none":
            with timed("read"):
                opened = held.enter_context(open_planned(root, planned))
            parts = (pixels for pixels, _ in read_slide(opened, planned.frame, blocks))
        yield _normalised(planned.frame, zip(blocks, timed_reads(parts, timed), strict=True), timed, colours)


def windows_at(root: Path, plan: Plan, planned: SlidePlan, cells: NDArray[np.int64]) -> Iterator[NDArray[np.uint8]]:
    """Yield the windows of cells of a slide's heatmap, uint8 (window, window, 3), wherever its blocks lie.

    They are read from the slide one by one, in the colours that the network sees; colours are fitted for slides.

    Args:
        root: The run's folder.
        plan: The plan.
        planned: The slide, in the centred convention.
        cells: int64 (n, 2), row and column of cells.

    Raises:
        InputError: The slide has changed or cannot be read.
        SlideModified: The slide was written while it was read.
        IntegrityError: The stain fit is missing.
    """
    if not len(cells):
        return
    frame, colours = planned.frame, Colours(root, plan, planned)
    before, _ = geometry.window_reach_px(frame.window_px, frame.stride_px, frame.convention)
    corners = cells[:, ::-1] * frame.stride_px - before
    with open_planned(root, planned) as opened:
        for x, y in corners.tolist():
            region = opened.read_scaled(x, y, (frame.window_px, frame.window_px), l0_per_px=frame.l0_per_px)
            block = Block(x // frame.tile_px, y // frame.tile_px, 1, 1, (0,))
            yield colours.normalised(frame, block, region.rgb)


def _normalised(
    frame: Frame, parts: Iterable[tuple[Block, NDArray[np.uint8]]], timed: Timer, colours: Colours
) -> Iterator[tuple[Block, NDArray[np.uint8]]]:
    """Yield blocks with normalised colours, and count the seconds as the step ``stain``."""
    for block, pixels in parts:
        with timed("stain"):
            normal = colours.normalised(frame, block, pixels)
        yield block, normal


def _stored(root: Path, plan: Plan, planned: SlidePlan, indices: Sequence[int]) -> Iterator[NDArray[np.uint8]]:
    """Yield the pixels of blocks from the store.

    Raises:
        IntegrityError: The store is damaged, or holds other blocks than planned.
    """
    cut = read_cut(root, planned)
    for k, (lo, hi) in enumerate(cut.group_ranges, 1):
        inside = [index - lo for index in indices if lo <= index < hi]
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
    """Return the name of a part of the patches of a slide, relative to the run's folder."""
    return f"patches/{planned.slide_id}/p{part}.h5"


def fit_key(root: Path, planned: SlidePlan, params: StainParams) -> str:
    """Return the key of the stain fit of a slide, from the pixels that are sampled and the settings of the fit."""
    pixels = (planned.sha256, planned.frame.tile_px, planned.frame.l0_per_px, read_cut(root, planned).tile_runs)
    return publish.key_of(seen=pixels, stain=params.model_dump(exclude={"target"}))


def fit_name(planned: SlidePlan) -> str:
    """Return the name of the stain fit of a slide, relative to the run's folder."""
    return f"stain/{planned.slide_id}.json"
