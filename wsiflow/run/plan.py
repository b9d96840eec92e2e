"""The plan of a run: an immutable file that names every slide and task, and every setting that can change a number.

The plan is made from the overviews of the slides before any patch is read, and all later stages follow it. It contains
no time, no host and no number of workers, so that the same input and settings give the same plan and the same keys on
every machine.

The plan has a line for each slide; the tiles and blocks of a slide are in a file of their own, see
`wsiflow.plan.slide_plan`. A task is identified by its index in its stage: groups and parts are numbered through all
slides in the order of the plan.

The run's folder contains ``plan.json``. When a slide that could not be read is fixed, the next plan is published beside
it as ``plan.2.json``. It must agree with the former plan on every slide that was planned, so that finished work stays
valid.
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
    """A slide that cannot be planned, with the message and the exit code of the reason."""

    slide_id: str
    reason: str
    exit_code: int


Unit = Literal["slide", "part", "group"]
"""What one task of a stage works on."""


class Task(NamedTuple):
    """What a task works on: the index of a slide, and a group or part of it, counted from 1; 0: the whole slide."""

    slide: int
    group: int


class Plan:
    """The plan of a run: its settings, the slides that are planned, and those that were rejected."""

    def __init__(self, settings: PlanSettings, slides: Sequence[SlidePlan], rejected: Sequence[Rejected]) -> None:
        """Store the parts of the plan.

        Args:
            settings: Every setting that can change a number, and the other settings that tasks need.
            slides: The planned slides.
            rejected: The slides that cannot be planned.
        """
        self.settings = settings
        self.slides, self.rejected = tuple(slides), tuple(rejected)

    @cached_property
    def hash(self) -> str:
        """The SHA-256 that identifies the plan."""
        return publish.key_of(**self.as_dict())

    @cached_property
    def _ends(self) -> dict[Unit, list[int]]:
        """For groups and parts, the number of them in each slide and all slides before it."""
        slides = range(len(self.slides))
        counts: dict[Unit, list[int]] = {
            "group": [slide.n_groups for slide in self.slides],
            "part": [self.n_parts(index) for index in slides],
        }
        return {unit: list(accumulate(each)) for unit, each in counts.items()}

    @property
    def part_groups(self) -> int:
        """The number of groups of a slide that one task of ``extract`` reads."""
        return max(1, self.settings.store.part_tiles // self.settings.group_tiles)

    def count(self, unit: Unit) -> int:
        """Return the number of tasks of a stage whose tasks work on such a unit."""
        return self._ends[unit][-1] if self.slides and unit in self._ends else len(self.slides)

    @property
    def n_groups(self) -> int:
        """The number of groups of all slides."""
        return self.count("group")

    def task(self, unit: Unit, index: int) -> Task:
        """Return what the task with an index in its stage works on."""
        ends = self._ends.get(unit)
        if ends is None:
            return Task(index, 0)
        slide = bisect_right(ends, index)
        return Task(slide, index + 1 - (ends[slide - 1] if slide else 0))

    def tasks_of(self, unit: Unit, slide: int) -> range:
        """Return the indices of the tasks of one slide."""
        ends = self._ends.get(unit)
        return range(slide, slide + 1) if ends is None else range(ends[slide - 1] if slide else 0, ends[slide])

    def n_parts(self, slide: int) -> int:
        """Return the number of parts in which the patches of a slide are stored."""
        return -(-self.slides[slide].n_groups // self.part_groups)

    def part_of(self, group: int) -> int:
        """Return the part, counted from 1, that contains the patches of a group, counted from 1."""
        return (group - 1) // self.part_groups + 1

    def part(self, slide: int, part: int) -> range:
        """Return the groups, counted from 1, in a part of the patches of a slide."""
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
    """Return the key of the scores of a group, from slide content, blocks, model and all settings of scores."""
    slide = plan.slides[task.slide]
    blocks = read_cut(root, slide).group_ranges[task.group - 1]
    return publish.key_of(slide=slide.key, blocks=blocks, predict=plan.settings.of_scores, numerics=NUMERICS)


@cached_by_content(files=4)
def read_plan(path: Path) -> Plan:
    """Read a plan.

    Raises:
        InputError: The file is missing, or is not a plan of this version.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise faults.unreadable(error, "the plan", "start the run again", path=path) from error
    except ValueError as error:
        raise InputError(f"the plan cannot be read ({error})", "start the run again", path=path) from error
    if data.get("numerics") != NUMERICS:
        cause = f"the plan has numerics version {data.get('numerics')}, this version of wsiflow has {NUMERICS}"
        raise InputError(cause, "choose another out= folder", path=path)
    try:
        settings = PlanSettings.from_values(data["settings"], data["work"])
    except (KeyError, TypeError, ValidationError) as error:
        cause = f"the plan's settings are not those of this version ({_first_problem(error)})"
        remedy = "read it with the version that wrote it, or choose another out= folder"
        raise InputError(cause, remedy, path=path) from error
    slides = [SlidePlan(**item | {"frame": Frame(**item["frame"])}) for item in data["slides"]]
    return Plan(settings, slides, [Rejected(**item) for item in data["rejected"]])


def _first_problem(error: Exception) -> str:
    """Return the first setting that is wrong, and why, without the advice that pydantic adds for programmers."""
    if not isinstance(error, ValidationError):
        return f"{type(error).__name__}: {error}"
    problem = error.errors()[0]
    return f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}"


def latest_plan(root: Path) -> Plan:
    """Return the newest plan of a run's folder.

    Raises:
        InputError: The folder holds no plan.
    """
    files = publish.generations(root, "plan.json")
    if not files:
        raise InputError("it holds no plan", "name the out= folder of a run", path=root)
    return read_plan(files[-1])


def publish_plan(root: Path, plan: Plan) -> Path:
    """Publish a plan, unless the folder holds the same one already.

    Returns:
        The file of the plan.

    Raises:
        InputError: The folder holds a plan with other settings, or with other content of a planned slide.
    """
    files = publish.generations(root, "plan.json")
    if files:
        _check_succession(files[-1], plan)
    return publish.publish_generation(root, "plan.json", _document(plan), {"kind": "plan"})


def _document(plan: Plan) -> bytes:
    """Return the plan as JSON, with a line for each part and slide."""
    parts = []
    for name, value in plan.as_dict().items():
        lines = value if isinstance(value, list) else [value]
        text = ",\n".join(json.dumps(line, sort_keys=True) for line in lines)
        parts.append(f'"{name}": ' + (f"[\n{text}\n]" if isinstance(value, list) else text))
    return ("{" + ",\n".join(parts) + "}\n").encode()


def _check_succession(path: Path, plan: Plan) -> None:
    """Refuse a plan that contradicts the published plan of the folder.

    Raises:
        InputError: Settings or slides differ.
    """
    root, former = path.parent, read_plan(path)
    # The file is compared as it is: an earlier version may have written the same settings in another form.
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
    """Return the cause and the remedy where the slides of a folder are not those of a new plan."""
    planned = {slide.slide_id for slide in former.slides}
    requested = [slide.slide_id for slide in plan.slides] + [slide.slide_id for slide in plan.rejected]
    if not planned & set(requested):
        slides = f"{_some(sorted(planned))}, now asked for {_some(requested)}"
        cause = f"the folder belongs to a run over other slides: {slides}"
        return cause, "give this run another out= folder"
    changed = "; ".join(f"{slide_id}{reasons.get(slide_id, '')}" for slide_id in gone[:5])
    cause = f"{len(gone)} slides planned in this folder have changed or are gone: {changed}"
    return cause, "restore them, or choose another out= folder"


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _differences(old: Any, new: Any, prefix: str = "") -> Iterator[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        for name in sorted(old.keys() | new.keys()):
            yield from _differences(old.get(name), new.get(name), f"{prefix}.{name}" if prefix else name)
    elif old != new:
        yield f"{prefix} ({old} there, {new} now)"
