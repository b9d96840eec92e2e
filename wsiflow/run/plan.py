"""The plan of a run: an immutable file that names every slide and task, and every setting that can change a number.

It is made from the slides' overviews, before any patch is read; everything after it follows it. Nothing in it is a
time, a host or a count of workers, so the same input and settings give the same plan and the same keys anywhere.

The plan has a line for each slide; how a slide is cut lies beside it, see `wsiflow.plan.slide_plan`. A task is a place
in a stage: groups and parts are counted through all slides, in the order of the plan.

A run's folder holds ``plan.json``. When a slide that could not be read is fixed, the next plan is published beside it
as ``plan.2.json``; it must agree with the former one on every slide that was planned, so finished work stays valid.
"""

import json
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import ValidationError

from wsiflow.errors import InputError
from wsiflow.plan.geometry import Frame
from wsiflow.plan.slide_plan import SlidePlan, read_cut
from wsiflow.run.settings import PlanSettings
from wsiflow.system import faults, publish
from wsiflow.system.provenance import NUMERICS
from wsiflow.system.reread import cached_by_content


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
    """The plan of a run: its settings, the slides that are planned, and those that were rejected."""

    def __init__(self, settings: PlanSettings, slides: Sequence[SlidePlan], rejected: Sequence[Rejected]) -> None:
        """Hold the parts.

        Args:
            settings: Everything that can change a number, and what the tasks must know besides.
            slides: The slides planned.
            rejected: The slides that could not be.
        """
        self.settings = settings
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
        return max(1, self.settings.store.part_tiles // self.settings.group_tiles)

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
            "settings": self.settings.numbers(),
            "work": self.settings.work(),
            "slides": [slide._asdict() | {"frame": slide.frame._asdict()} for slide in self.slides],
            "rejected": [rejected._asdict() for rejected in self.rejected],
        }


def task_key(root: Path, plan: Plan, task: Task) -> str:
    """Return the key of a group's scores: slide content, blocks, model and every setting that can change a number."""
    slide = plan.slides[task.slide]
    blocks = read_cut(root, slide).group_ranges[task.group - 1]
    return publish.key_of(slide=slide.key, blocks=blocks, predict=plan.settings.of_scores, numerics=NUMERICS)


@cached_by_content(files=4)
def read_plan(path: Path) -> Plan:
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
    try:
        settings = PlanSettings.from_values(data["settings"], data["work"])
    except (KeyError, ValidationError) as error:
        cause = f"the plan's settings are not those of this version ({' '.join(str(error).split())})"
        remedy = "read it with the version that wrote it, or choose another out= folder"
        raise InputError(cause, remedy, path=path) from error
    slides = [SlidePlan(**item | {"frame": Frame(**item["frame"])}) for item in data["slides"]]
    return Plan(settings, slides, [Rejected(**item) for item in data["rejected"]])


def latest_plan(root: Path) -> Plan:
    """Return the plan of a run's folder.

    Raises:
        InputError: There is none.
    """
    files = publish.generations(root, "plan.json")
    if not files:
        raise InputError("it holds no plan", "name the out= folder of a run", path=root)
    return read_plan(files[-1])


def publish_plan(root: Path, plan: Plan) -> Path:
    """Publish the plan, or find it published already.

    Returns:
        The plan's file.

    Raises:
        InputError: The folder holds a plan with other settings or other content of a planned slide.
    """
    files = publish.generations(root, "plan.json")
    if files:
        _check_succession(files[-1], plan)
    return publish.publish_generation(root, "plan.json", _document(plan), {"kind": "plan"})


def _document(plan: Plan) -> bytes:
    """Return the plan as JSON, a line for each setting and slide."""
    parts = []
    for name, value in plan.as_dict().items():
        lines = value if isinstance(value, list) else [value]
        text = ",\n".join(json.dumps(line, sort_keys=True) for line in lines)
        parts.append(f'"{name}": ' + (f"[\n{text}\n]" if isinstance(value, list) else text))
    return ("{" + ",\n".join(parts) + "}\n").encode()


def _check_succession(path: Path, plan: Plan) -> None:
    """Refuse a plan that contradicts the one that the folder holds."""
    root, former = path.parent, read_plan(path)
    # As the file says it: what an earlier version wrote may have a form that this one would write otherwise.
    published = json.loads(path.read_text(encoding="utf-8"))["settings"]
    changed = sorted(_differences(published, json.loads(json.dumps(plan.settings.numbers()))))
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
