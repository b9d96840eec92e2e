"""The plan: an immutable file that names every slide, block and group with its key.

It is made from the slides' overviews, before any patch is read; everything after it follows it. Nothing in it is a
time, a host or a count of workers, so the same input and settings give the same plan and the same keys anywhere.

The plan has a line for each slide. A slide's tissue, blocks and groups lie beside it in ``cuts/<slide>.json``, whose
content the slide's key names: a worker reads those of the slides it works on, and a plan of a million groups stays
small. A task is a place in a stage: groups and parts are counted through all slides, in the order of the plan.

A run's folder holds ``plan.json``. When a slide that could not be read is mended, the next plan is published beside it
as ``plan.2.json``; it must agree with the former one on every slide that was planned, so finished work stays valid.
"""

import json
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property, lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from wsiflow.errors import InputError, IntegrityError
from wsiflow.plan.blocks import Block, BlockLimits, groups
from wsiflow.plan.blocks import block as block_at
from wsiflow.plan.blocks import blocks as blocks_of
from wsiflow.plan.geometry import Frame
from wsiflow.system import faults, publish
from wsiflow.system.reread import cached_by_content

#: Raised whenever a change of code changes the numbers that come out for the same settings.
NUMERICS = 3

Runs = tuple[tuple[int, int, int], ...]


class SlidePlan(NamedTuple):
    """What is planned for one slide.

    Attributes:
        slide_id, path, sha256, um_px_l0: The slide, its content and its level-0 spacing.
        label: 1 tumour, 0 normal, None unknown.
        annotation_path, mask_path: Truth, empty where there is none.
        overview_downsample: Level-0 pixels per pixel of the tissue mask.
        frame: The transform stored with every array of this slide.
        n_tiles, n_blocks, n_groups: How much there is to do: tissue tiles, and the blocks and groups they are cut into.
        key: What identifies the slide's pixels and their cutting, see `slide_key`.
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
    n_tiles: int
    n_blocks: int
    n_groups: int
    key: str


class SlideCut(NamedTuple):
    """A slide's tissue, cut.

    Attributes:
        tile_runs: Tissue tiles as runs along rows: row, first column, length.
        blocks: The blocks, in order.
        group_ranges: Half-open ranges of blocks, one per group.
    """

    tile_runs: Runs
    blocks: tuple[Block, ...]
    group_ranges: tuple[tuple[int, int], ...]

    def group(self, k: int) -> Sequence[Block]:
        """Return the blocks of group ``k``, counted from 1."""
        lo, hi = self.group_ranges[k - 1]
        return self.blocks[lo:hi]

    def as_dict(self) -> dict[str, Any]:
        """Return the cut as plain JSON values: which of a block's tiles hold tissue follows from the runs."""
        return {
            "tile_runs": self.tile_runs,
            "blocks": [block[:4] for block in self.blocks],
            "group_ranges": self.group_ranges,
        }


def make_cut(tissue: NDArray[np.bool_], frame: Frame, *, group_tiles: int) -> SlideCut:
    """Cut a slide's tissue into blocks and groups balanced by cost: a block counts for its tissue tiles.

    Args:
        tissue: bool (rows, cols), the tile grid.
        frame: The slide's transform, with the sizes of blocks.
        group_tiles: Tissue tiles that a group should not exceed on average.
    """
    runs = tile_runs(tissue)
    cut = BlockLimits(frame.tile_px, frame.halo_px, frame.block_rows, frame.block_cols)
    blocks = blocks_of(tissue_grid(runs), cut)
    costs = np.array([len(block.tissue) for block in blocks], dtype=np.float64)
    return SlideCut(runs, tuple(blocks), tuple(groups(costs, limit=group_tiles)))


def slide_key(sha256: str, frame: Frame, cut: SlideCut) -> str:
    """Return what identifies a slide's pixels and their cutting."""
    return publish.key_of(sha256=sha256, frame=frame._asdict(), **cut.as_dict())


def pixels_key(planned: SlidePlan, cut: SlideCut) -> str:
    """Return what identifies the pixels of a slide's blocks, whatever windows are cut from them."""
    return publish.key_of(sha256=planned.sha256, frame=planned.frame.pixel_settings(), **cut.as_dict())


def cut_name(slide_id: str) -> str:
    """Return the name of the file with a slide's cut, relative to the run's folder."""
    return f"cuts/{slide_id}.json"


@lru_cache(maxsize=8)
def read_cut(root: Path, planned: SlidePlan) -> SlideCut:
    """Read how a slide is cut.

    Raises:
        IntegrityError: It is not what was planned.
    """
    path = root / cut_name(planned.slide_id)
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        runs = tuple((row, first, length) for row, first, length in data["tile_runs"])
        ranges = tuple((lo, hi) for lo, hi in data["group_ranges"])
        grid = tissue_grid(runs)
        blocks = tuple(block_at(grid, *numbers) for numbers in data["blocks"])
    except (OSError, ValueError, TypeError, KeyError) as error:
        if isinstance(error, OSError) and not isinstance(error, FileNotFoundError):
            raise faults.fault(error, path=path) from error
        cause = f"the slide's tiles cannot be read ({error})"
        raise IntegrityError(cause, "choose another out= folder", slide=planned.slide_id, path=path) from error
    cut = SlideCut(runs, blocks, ranges)
    if slide_key(planned.sha256, planned.frame, cut) != planned.key:
        cause = "the slide's tiles are not those that were planned"
        raise IntegrityError(cause, "choose another out= folder", slide=planned.slide_id, path=path)
    return cut


class Rejected(NamedTuple):
    """A slide that cannot be planned, and why."""

    slide_id: str
    reason: str
    exit_code: int


Unit = Literal["slide", "part", "group"]
"""What one task of a stage works on."""


class Task(NamedTuple):
    """What a task works on: a slide's group or part, counted from 1; 0: the whole slide."""

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
    def _ends(self) -> dict[Unit, list[int]]:
        """Of the units of which a slide has several, how many there are up to and with each slide."""
        slides = range(len(self.slides))
        counts: dict[Unit, list[int]] = {
            "group": [slide.n_groups for slide in self.slides],
            "part": [self.n_parts(index) for index in slides],
        }
        return {unit: list(accumulate(each)) for unit, each in counts.items()}

    @property
    def part_groups(self) -> int:
        """Groups of a slide that one task of ``extract`` reads."""
        sizes = self.settings["cut"]["tiles"]
        return max(1, int(sizes["part_tiles"]) // int(sizes["group_tiles"]))

    def count(self, unit: Unit) -> int:
        """Return how many tasks a stage of such a unit has."""
        return self._ends[unit][-1] if self.slides and unit in self._ends else len(self.slides)

    @property
    def n_groups(self) -> int:
        """Array tasks: the groups of all slides."""
        return self.count("group")

    def task(self, unit: Unit, index: int) -> Task:
        """Return what a task works on, by its place among those of its stage."""
        ends = self._ends.get(unit)
        if ends is None:
            return Task(index, 0)
        slide = bisect_right(ends, index)
        return Task(slide, index + 1 - (ends[slide - 1] if slide else 0))

    def tasks_of(self, unit: Unit, slide: int) -> range:
        """Return the places of the tasks for one slide."""
        ends = self._ends.get(unit)
        return range(slide, slide + 1) if ends is None else range(ends[slide - 1] if slide else 0, ends[slide])

    def n_parts(self, slide: int) -> int:
        """Return in how many parts a slide's patches are stored."""
        return -(-self.slides[slide].n_groups // self.part_groups)

    def part_of(self, group: int) -> int:
        """Return the part, counted from 1, of its slide's patches that holds a group, counted from 1."""
        return (group - 1) // self.part_groups + 1

    def part(self, slide: int, part: int) -> range:
        """Return the groups, counted from 1, that a part of a slide's patches holds."""
        first = (part - 1) * self.part_groups
        return range(first + 1, min(first + self.part_groups, self.slides[slide].n_groups) + 1)

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


def task_key(root: Path, plan: Plan, task: Task) -> str:
    """Return the key of a group's scores: slide content, blocks, model and every setting that can change a number."""
    slide = plan.slides[task.slide]
    blocks = read_cut(root, slide).group_ranges[task.group - 1]
    return publish.key_of(slide=slide.key, blocks=blocks, predict=plan.settings["predict"], numerics=NUMERICS)


@cached_by_content(files=4)
def read(path: Path) -> Plan:
    """Read a plan.

    Raises:
        InputError: It is missing or is not a plan of this version.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise faults.unreadable(error, "the plan", "start the run again", path=path) from error
    except ValueError as error:
        raise InputError(f"the plan cannot be read ({error})", "start the run again", path=path) from error
    if data.get("numerics") != NUMERICS:
        cause = f"the plan was made by a version with other numbers ({data.get('numerics')}, this one is {NUMERICS})"
        raise InputError(cause, "choose another out= folder", path=path)
    slides = [SlidePlan(**item | {"frame": Frame(**item["frame"])}) for item in data["slides"]]
    return Plan(data["settings"], data["work"], slides, [Rejected(**item) for item in data["rejected"]])


def latest(root: Path) -> Plan:
    """Return the plan of a run's folder.

    Raises:
        InputError: There is none.
    """
    files = publish.generations(root, "plan.json")
    if not files:
        raise InputError("it holds no plan", "name the out= folder of a run", path=root)
    return read(files[-1])


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
    return publish.publish_generation(root, "plan.json", _document(plan), {"kind": "plan"})


def _document(plan: Plan) -> bytes:
    """Return the plan as JSON, a line for each setting and slide."""
    parts = []
    for name, value in plan.as_dict().items():
        lines = value if isinstance(value, list) else [value]
        text = ",\n".join(json.dumps(line, sort_keys=True) for line in lines)
        parts.append(f'"{name}": ' + (f"[\n{text}\n]" if isinstance(value, list) else text))
    return ("{" + ",\n".join(parts) + "}\n").encode()


def _check_succession(root: Path, former: Plan, plan: Plan) -> None:
    settings = json.loads(json.dumps(plan.settings))  # as the former ones were read: without tuples
    changed = sorted(_differences(former.settings, settings))
    if changed:
        cause = f"the folder holds a run with other settings: {', '.join(changed)}"
        raise InputError(cause, "choose another out= folder", path=root)
    now = {slide.slide_id: slide.key for slide in plan.slides}
    reasons = {slide.slide_id: f": {slide.reason}" for slide in plan.rejected}
    gone = [slide.slide_id for slide in former.slides if now.get(slide.slide_id) != slide.key]
    if gone:
        raise InputError(*_why_not(former, plan, gone, reasons), path=root)


def _why_not(former: Plan, plan: Plan, gone: Sequence[str], reasons: Mapping[str, str]) -> tuple[str, str]:
    """Return cause and remedy where a folder's slides are not those that are asked for."""
    there = {slide.slide_id for slide in former.slides}
    asked = [slide.slide_id for slide in plan.slides] + [slide.slide_id for slide in plan.rejected]
    if not there & set(asked):
        cause = f"the folder belongs to a run over other slides: {_some(sorted(there))}, now asked for {_some(asked)}"
        return cause, "give this run another out= folder"
    told = "; ".join(f"{slide_id}{reasons.get(slide_id, '')}" for slide_id in gone[:5])
    cause = f"{len(gone)} slides planned in this folder have changed or are gone: {told}"
    return cause, "restore them, or choose another out= folder"


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _differences(old: Any, new: Any, prefix: str = "") -> Iterator[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        for name in sorted(old.keys() | new.keys()):
            yield from _differences(old.get(name), new.get(name), f"{prefix}.{name}" if prefix else name)
    elif old != new:
        yield f"{prefix} ({old} there, {new} now)"
