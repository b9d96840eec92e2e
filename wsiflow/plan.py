"""The plan: an immutable file that names every slide, block and group with its key.

It is made from the slides' overviews, before any patch is read; everything after it follows it. Nothing in it is a
time, a host or a count of workers, so the same input and settings give the same plan and the same keys anywhere.

A run's folder holds ``plan.json``. When a slide that could not be read is mended, the next plan is published beside it
as ``plan.2.json``; it must agree with the former one on every slide that was planned, so finished work stays valid.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from wsiflow import publish, tiles
from wsiflow.errors import InputError
from wsiflow.geometry import Frame

#: Raised whenever a change of code changes the numbers that come out for the same settings.
NUMERICS = 2

Runs = tuple[tuple[int, int, int], ...]


class SlidePlan(NamedTuple):
    """What is planned for one slide.

    Attributes:
        slide_id, path, sha256, um_px_l0: The slide, its content and its level-0 spacing.
        label: 1 tumour, 0 normal, None unknown.
        annotation_path, mask_path: Truth, empty where there is none.
        overview_downsample: Level-0 pixels per pixel of the tissue mask.
        frame: The transform stored with every array of this slide.
        tile_runs: Tissue tiles as runs along rows: row, first column, length.
        group_ranges: Half-open ranges of blocks, one per group.
        key: What identifies the slide's pixels and their cutting.
    """

    slide_id: str
    path: str
    sha256: str
    um_px_l0: float
    label: int | None
    annotation_path: str
    mask_path: str
    overview_downsample: float
    frame: Frame
    tile_runs: Runs
    group_ranges: tuple[tuple[int, int], ...]
    key: str

    @property
    def n_tiles(self) -> int:
        """Tissue tiles."""
        return sum(length for _, _, length in self.tile_runs)

    def blocks(self) -> list[tiles.Block]:
        """Return the slide's blocks in order; groups are ranges of this list."""
        return blocks(self.tile_runs, self.frame)

    def group(self, k: int) -> list[tiles.Block]:
        """Return the blocks of group ``k``, counted from 1."""
        lo, hi = self.group_ranges[k - 1]
        return self.blocks()[lo:hi]


@lru_cache(maxsize=8)
def blocks(runs: Runs, frame: Frame) -> list[tiles.Block]:
    """Return the blocks of a slide whose tissue tiles are these runs."""
    cut = tiles.Cut(frame.tile_px, frame.halo_px, frame.block_rows, frame.block_cols)
    return tiles.blocks(tissue_grid(runs), cut)


class Rejected(NamedTuple):
    """A slide that cannot be planned, and why."""

    slide_id: str
    reason: str
    exit_code: int


class Task(NamedTuple):
    """One array task: a group of a slide."""

    slide: int
    group: int


class Plan:
    """A run's plan: settings that change numbers, how the work is done, slides, rejected slides."""

    def __init__(
        self,
        settings: Mapping[str, Any],
        work: Mapping[str, Any],
        slides: Sequence[SlidePlan],
        rejected: Sequence[Rejected],
    ) -> None:
        """Hold the parts.

        Args:
            settings: Everything that can change a number; the same for every plan of a folder.
            work: What the tasks must know besides: the store, where the model lies.
            slides: The slides planned.
            rejected: The slides that could not be.
        """
        self.settings, self.work = dict(settings), dict(work)
        self.slides, self.rejected = tuple(slides), tuple(rejected)

    @cached_property
    def hash(self) -> str:
        """The plan's identity."""
        return publish.key_of(**self.as_dict())

    @cached_property
    def tasks(self) -> tuple[Task, ...]:
        """Every array task; its place in this tuple is the task's index."""
        return tuple(Task(i, k) for i, slide in enumerate(self.slides) for k in range(1, len(slide.group_ranges) + 1))

    def as_dict(self) -> dict[str, Any]:
        """Return the plan as plain JSON values."""
        return {
            "numerics": NUMERICS,
            "settings": self.settings,
            "work": self.work,
            "slides": [slide._asdict() | {"frame": slide.frame._asdict()} for slide in self.slides],
            "rejected": [rejected._asdict() for rejected in self.rejected],
        }


def tile_runs(tissue: NDArray[np.bool_]) -> Runs:
    """Return a tissue grid as runs along its rows: row, first column, length."""
    runs = []
    for row in np.flatnonzero(tissue.any(axis=1)):
        edges = np.flatnonzero(np.diff(np.pad(tissue[row].astype(np.int8), 1)))
        runs += [(int(row), int(first), int(end - first)) for first, end in edges.reshape(-1, 2)]
    return tuple(runs)


def tissue_grid(runs: Runs) -> NDArray[np.bool_]:
    """Return the tissue grid, bool (rows, cols), as far as there is tissue; the inverse of `tile_runs`."""
    rows = max((row for row, _, _ in runs), default=-1) + 1
    cols = max((first + length for _, first, length in runs), default=0)
    grid = np.zeros((rows, cols), dtype=bool)
    for row, first, length in runs:
        grid[row, first : first + length] = True
    return grid


def group_ranges(cut: Sequence[tiles.Block], *, group_tiles: int) -> tuple[tuple[int, int], ...]:
    """Return groups of blocks balanced by cost: a block counts for its tissue tiles."""
    costs = np.array([len(block.tissue) for block in cut], dtype=np.float64)
    return tuple(tiles.groups(costs, limit=group_tiles))


def task_key(plan: Plan, task: Task) -> str:
    """Return the key of a group's scores: slide content, blocks, model and every setting that can change a number."""
    slide = plan.slides[task.slide]
    return publish.key_of(
        slide=slide.key, blocks=slide.group_ranges[task.group - 1], predict=plan.settings["predict"], numerics=NUMERICS
    )


@lru_cache(maxsize=4)
def read(path: Path) -> Plan:
    """Read a plan.

    Raises:
        InputError: It is missing or is not a plan of this version.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"the plan cannot be read ({error})", "start the run again", path=path) from error
    if data.get("numerics") != NUMERICS:
        cause = f"the plan was made by a version with other numbers ({data.get('numerics')}, this one is {NUMERICS})"
        raise InputError(cause, "choose another out= folder", path=path)
    slides = [
        SlidePlan(
            **{
                **item,
                "frame": Frame(**item["frame"]),
                "tile_runs": tuple(tuple(run) for run in item["tile_runs"]),
                "group_ranges": tuple(tuple(pair) for pair in item["group_ranges"]),
            }
        )
        for item in data["slides"]
    ]
    return Plan(data["settings"], data["work"], slides, [Rejected(**item) for item in data["rejected"]])


def publish_plan(root: Path, plan: Plan) -> Path:
    """Publish the plan, or find it published already.

    Returns:
        The plan's file.

    Raises:
        InputError: The folder holds a plan with other settings or other content of a planned slide.
    """
    files = publish.generations(root, "plan.json")
    if files:
        _check_succession(root, read(files[-1]), plan)
    data = json.dumps(plan.as_dict(), indent=1, sort_keys=True).encode()
    return publish.publish_generation(root, "plan.json", data, {"kind": "plan"})


def _check_succession(root: Path, former: Plan, plan: Plan) -> None:
    changed = sorted(_differences(former.settings, plan.settings))
    if changed:
        cause = f"the folder holds a run with other settings: {', '.join(changed)}"
        raise InputError(cause, "choose another out= folder", path=root)
    now = {slide.slide_id: slide.key for slide in plan.slides}
    reasons = {slide.slide_id: f": {slide.reason}" for slide in plan.rejected}
    gone = [slide.slide_id for slide in former.slides if now.get(slide.slide_id) != slide.key]
    if gone:
        told = "; ".join(f"{slide_id}{reasons.get(slide_id, '')}" for slide_id in gone[:5])
        cause = f"{len(gone)} slides planned in this folder have changed or are gone: {told}"
        raise InputError(cause, "restore them, or choose another out= folder", path=root)


def _differences(old: Any, new: Any, prefix: str = "") -> Iterator[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        for name in sorted(old.keys() | new.keys()):
            yield from _differences(old.get(name), new.get(name), f"{prefix}.{name}" if prefix else name)
    elif old != new:
        yield f"{prefix} ({old} there, {new} now)"
