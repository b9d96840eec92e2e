"""What the viewer serves of a run: its slides as JSON, tiles of their pixels as JPEG and of their heatmaps as PNG.

A slide that is gone, or was replaced by one of another size, is shown by the overview that its run has kept.

Conventions: a tile has ``TILE_PX`` pixels a side and is counted by column and row; level n of a slide's pyramid is
reduced by 2 to the power of the number of levels behind it, so that the last level is level 0 of the slide.
"""

import io
import math
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from wsiflow.errors import InputError, WsiflowError
from wsiflow.heatmap.files import open_preview
from wsiflow.heatmap.overlay import thumbnail
from wsiflow.plan.outline import png_bytes
from wsiflow.plan.slide_plan import SlidePlan
from wsiflow.run.plan import latest_plan
from wsiflow.run.results import shown
from wsiflow.run.results.status import OWN_TABLE
from wsiflow.run.stages import overviews
from wsiflow.slides import pyramid
from wsiflow.slides.slide import Slide, open_slide
from wsiflow.system import tables

TILE_PX = 512
_QUALITY = 85
_SMALL_PX = 104  # twice as many as the list shows, for fine screens
_MOST_TILES = 1024  # kept in memory: about 60 MB
_MOST_OPEN = 8  # slides, each with what its reader keeps in memory
_STORED = 1.5  # up to this reduction of a stored level a tile is read from the slide, else from an overview as fine
_MOST_REDUCED = 8  # beyond this reduction a slide is too slow to read: the overview is shown, however coarse
_SCORES = ("evaluation", "evaluation-PARTIAL")


class ServedRun:
    """A run as the viewer shows it. It may be used from several threads at a time.

    Attributes:
        root: The run's folder.
        described: Its slides; they are numbered in this order.
        missing: Why each slide that cannot be opened is shown by its overview, by slide id.
    """

    def __init__(self, root: Path) -> None:
        """Read what is known of a run's slides, and look which of them are there.

        Raises:
            InputError: The folder holds no run with a plan.
        """
        self.root, plan = root, latest_plan(root)
        folder = next((root / name for name in _SCORES if (root / name / "cases.csv").is_file()), None)
        scored = list(tables.read(folder / "cases.csv", *OWN_TABLE).rows()) if folder else []
        rows = shown.slide_rows(root, plan, {row["slide_id"]: row for row in scored})
        self._planned = {planned.slide_id: planned for planned in plan.slides}
        found = shown.read_findings(folder) if folder else {}
        self.described = shown.describe(root, self._planned, rows, found)
        self._open = _OpenSlides()
        self.missing = {
            planned.slide_id: f"{planned.path} is not there"
            for planned in plan.slides
            if not Path(planned.path).exists()
        }
        self._tile = lru_cache(_MOST_TILES)(self._read_tile)

    def warm_up(self) -> None:
        """Open the slide that is shown first, and read a tile of it: what a process loads once is loaded then."""
        if self.described.slides and "tiles" in self.slide(0):
            self.tile(0, 0, 0, 0)

    def slide(self, number: int) -> dict[str, Any]:
        """Return what is drawn of a slide, see `wsiflow.run.results.shown`."""
        entry = self.described.slides[number]
        planned = self._planned.get(entry["id"])
        if planned is None:
            return entry
        more: dict[str, Any] = {}
        preview = self._preview(planned)
        if preview.is_file():
            with open_preview(preview) as opened:
                levels = [{"rows": rows, "cols": cols, "scale": 2**n} for n, (rows, cols) in enumerate(opened.shapes)]
            more["heat"] = shown.cells_of(planned) | {"levels": levels, "tile": pyramid.TILE_PX}
        if reason := self._fault(planned):
            return entry | more | self._overview(planned, reason)
        return entry | more | {"tiles": {"size": TILE_PX, "levels": n_levels(planned)}}

    def small(self, number: int) -> bytes:
        """Return the small picture of a slide for the list, as a JPEG.

        Raises:
            InputError: There is no such slide.
            OSError: The run has no picture of it.
        """
        path = self.root / overviews.picture_of(self._numbered(number).slide_id)
        return thumbnail(path.read_bytes(), side_px=_SMALL_PX)

    def tile(self, number: int, level: int, col: int, row: int) -> bytes:
        """Return a tile of a slide as a JPEG.

        Raises:
            InputError: There is no such tile, or it cannot be read.
        """
        return self._tile(number, level, col, row)

    def heat_tile(self, number: int, level: int, col: int, row: int) -> bytes:
        """Return a tile of a slide's heatmap as an 8-bit PNG: 0 for no score, else 1 + 254 times the score.

        Raises:
            InputError: There is no such tile, or it cannot be read.
        """
        with open_preview(self._preview(self._numbered(number))) as opened:
            if not 0 <= level < len(opened.shapes):
                raise _absent(level, col, row)
            rows, cols = opened.shapes[level]
            if not (0 <= row * pyramid.TILE_PX < rows and 0 <= col * pyramid.TILE_PX < cols):
                raise _absent(level, col, row)
            return png_bytes(Image.fromarray(opened.tile(level, row, col)))

    def close(self) -> None:
        """Close the slides."""
        self._open.close()

    def _numbered(self, number: int) -> SlidePlan:
        slides = self.described.slides
        planned = self._planned.get(slides[number]["id"]) if number < len(slides) else None
        if planned is None:
            raise InputError(f"there is no slide {number}", "open the link again")
        return planned

    def _preview(self, planned: SlidePlan) -> Path:
        return self.root / f"heatmaps/{planned.slide_id}.preview.tif"

    def _fault(self, planned: SlidePlan) -> str:
        """Return why a slide cannot be shown itself; empty where it can."""
        try:
            with self._borrowed(planned):
                return ""
        except WsiflowError as error:
            self.missing.setdefault(planned.slide_id, str(error))
            return self.missing[planned.slide_id]

    def _overview(self, planned: SlidePlan, reason: str) -> dict[str, Any]:
        path = self.root / overviews.picture_of(planned.slide_id)
        remark = f"{reason}: the overview of the run is shown"
        if not path.is_file():
            return {
                "width": 0,
                "remark": f"{reason}, and the run has no overview of it: the same wsiflow run draws one",
            }
        return {"picture": shown.placed(path.read_bytes(), planned), "remark": remark}

    def _borrowed(self, planned: SlidePlan) -> Any:
        return self._open.borrowed(planned.slide_id, lambda: _opened(planned))

    def _read_tile(self, number: int, level: int, col: int, row: int) -> bytes:
        planned = self._numbered(number)
        behind = n_levels(planned) - 1 - level
        downsample = 2.0**behind
        sides = [math.ceil(side / downsample) for side in (planned.frame.l0_width_px, planned.frame.l0_height_px)]
        corner = (col * TILE_PX, row * TILE_PX)
        size = tuple(min(TILE_PX, side - begin) for side, begin in zip(sides, corner, strict=True))
        if behind < 0 or min(size) <= 0 or level < 0:
            raise _absent(level, col, row)
        with self._borrowed(planned) as opened:
            pixels = self._pixels(opened, planned, corner, (size[0], size[1]), downsample)
        return overviews.as_jpeg(pixels, _QUALITY)

    def _pixels(
        self, opened: Slide, planned: SlidePlan, corner: tuple[int, int], size: tuple[int, int], downsample: float
    ) -> NDArray[np.uint8]:
        """Return a rectangle of a slide reduced by ``downsample``, uint8 (rows, cols, 3)."""
        times = downsample / opened.facts.level_downsamples[opened.facts.level_for(downsample)]
        path = self.root / overviews.picture_of(planned.slide_id)
        overview = _read_picture(path) if times > _STORED and path.is_file() else None
        is_as_fine = overview is not None and overview.width * downsample >= planned.frame.l0_width_px
        if overview is not None and (is_as_fine or times > _MOST_REDUCED):
            scale = planned.frame.l0_width_px / overview.width / downsample
            left, top = (begin / scale for begin in corner)
            right = min(overview.width, (corner[0] + size[0]) / scale)
            bottom = min(overview.height, (corner[1] + size[1]) / scale)
            return np.array(overview.resize(size, Image.Resampling.BICUBIC, (left, top, right, bottom)))
        return opened.read_scaled(*corner, size, l0_per_px=downsample).rgb


def n_levels(planned: SlidePlan) -> int:
    """Return how many levels the viewer's pyramid of a slide has: the first fits in a tile."""
    side = max(planned.frame.l0_width_px, planned.frame.l0_height_px)
    return 1 + max(0, math.ceil(math.log2(side / TILE_PX)))


def _opened(planned: SlidePlan) -> Slide:
    """Open a planned slide.

    Raises:
        InputError: It is not there, cannot be opened, or has another size than the one that was planned.
    """
    opened = open_slide(Path(planned.path), slide_id=planned.slide_id)
    size, expected = opened.facts.l0_size_px, (planned.frame.l0_width_px, planned.frame.l0_height_px)
    if size != expected:
        opened.close()
        cause = f"it has {size[0]} x {size[1]} px, and {expected[0]} x {expected[1]} were planned"
        raise InputError(cause, "restore the slide of the run", slide=planned.slide_id, path=planned.path)
    return opened


def _absent(level: int, col: int, row: int) -> InputError:
    return InputError(f"there is no tile {level}/{col}_{row}", "open the link again")


@lru_cache(4)
def _read_picture(path: Path) -> Image.Image:
    return Image.open(io.BytesIO(path.read_bytes())).convert("RGB")


class _OpenSlides:
    """Slides that stay open between tiles; each is used by one thread at a time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._idle: list[tuple[str, Slide]] = []  # the least recently used first

    @contextmanager
    def borrowed(self, slide_id: str, opening: Callable[[], Slide]) -> Iterator[Slide]:
        """Give a slide to a thread, opened where none is idle; it is closed if the body raises."""
        with self._lock:
            place = next((i for i, (name, _) in enumerate(self._idle) if name == slide_id), None)
            slide = self._idle.pop(place)[1] if place is not None else None
        slide = slide or opening()
        try:
            yield slide
        except BaseException:
            slide.close()
            raise
        with self._lock:
            self._idle.append((slide_id, slide))
            old = [self._idle.pop(0)[1] for _ in range(len(self._idle) - _MOST_OPEN)]
        for each in old:
            each.close()

    def close(self) -> None:
        """Close the idle slides."""
        with self._lock:
            idle, self._idle = self._idle, []
        for _, slide in idle:
            slide.close()


def index_of(runs: Mapping[str, ServedRun]) -> dict[str, Any]:
    """Return the runs and their slides by the names of the runs, as the page lists them."""
    return {"full": True, "runs": [{"name": name, "slides": run.described.entries} for name, run in runs.items()]}
