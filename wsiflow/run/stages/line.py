"""The line: its stages in order, and how many tasks of each a run has done. Each stage has a file of its own."""

import os
from collections.abc import Iterable
from pathlib import Path

from wsiflow.run import first_pass
from wsiflow.run.costs import Costs, StageCost
from wsiflow.run.plan import Plan
from wsiflow.run.stages import certify, detect, extract, predict, stain, stitch
from wsiflow.run.stages.stage import Stage
from wsiflow.system import publish

#: The stages after the plan, in order, by name.
STAGES: dict[str, Stage] = {
    stage.name: stage
    for stage in (
        stain.STAGE,
        extract.EXTRACT,
        extract.INDEX,
        predict.STAGE,
        certify.STAGE,
        stitch.STAGE,
        detect.STAGE,
    )
}

#: Names of the stages whose tasks need the network.
LOADING = frozenset(stage.name for stage in STAGES.values() if stage.loads_network)

#: Names of the steps by which receipts divide their seconds.
STEPS = tuple(dict.fromkeys(step for stage in STAGES.values() for step in stage.steps))

# Costs of GoogLeNet at stride 16 in fp32 on one Zen 4 core. A tile of extract and of predict, and a certificate, were
# measured (docs/performance.md). The rest is a cautious assumption: start and load are at the upper end of what was
# measured (docs/scaling.md, X3b), and the fixed cost of a task is what the demo's slides take.
ROUGH = Costs(
    start_s=4.0,
    load_s=3.0,
    spread=0.2,
    stages={"ingest": StageCost(2.0, 0.0), **{stage.name: stage.cost for stage in STAGES.values()}},
)


def stages_of(root: Path) -> list[Stage]:
    """Return the stages that slides go through in a folder, in order: a first pass has few of them."""
    return [STAGES[name] for name in (first_pass.STAGES if first_pass.is_first_pass(root) else STAGES)]


def names_of(stage: Stage, plan: Plan, slide: int, index: int) -> list[str]:
    """Return the names of all files that a task of a slide publishes."""
    return [stage.product_of(plan, index), *stage.beside_of(plan, slide)]


class Census:
    """The number of tasks of each stage whose file and receipt exist.

    Only names are read, and each folder is listed once, however many tasks there are. A stage that was complete for a
    slide is not counted again for that slide.

    Attributes:
        planned: Number of tasks by stage and slide; stages that the plan does not ask for, or that a first
            pass does not go through, are left out.
        missing: Number of tasks that were not published at the last count, by stage and slide; slides of which nothing
            is missing are left out.
    """

    def __init__(self, root: Path, plan: Plan) -> None:
        """Count the planned tasks; no folder is read yet."""
        self._root, self._plan = root, plan
        tasks = {stage.name: _tasks_by_slide(plan, stage) for stage in stages_of(root)}
        self.planned = {name: each for name, each in tasks.items() if each}
        self.missing = dict(self.planned)

    def count(self) -> dict[str, tuple[int, int]]:
        """Read the folders, and return by stage how many tasks are published and how many are planned."""
        listing = _Listing(self._root)
        for name, slides in self.missing.items():
            if not listing.names(_top_folder(self._plan, STAGES[name])):
                self.missing[name] = self.planned[name]  # no slide has reached this stage
                continue
            counts = {slide: _count_missing(listing, self._plan, STAGES[name], slide) for slide in slides}
            self.missing[name] = {slide: count for slide, count in counts.items() if count}
        totals = {name: sum(each.values()) for name, each in self.planned.items()}
        return {name: (total - sum(self.missing[name].values()), total) for name, total in totals.items()}


def _tasks_by_slide(plan: Plan, stage: Stage) -> dict[int, int]:
    slides = (slide for slide in range(len(plan.slides)) if stage.is_due(plan, slide))
    if stage.serves_scores:  # of a slide without tissue there may be no pixels to store
        slides = (slide for slide in slides if plan.slides[slide].n_tiles)
    counts = {slide: len(stage.tasks_of(plan, slide)) for slide in slides}
    return {slide: count for slide, count in counts.items() if count}


def _top_folder(plan: Plan, stage: Stage) -> str:
    """Return the folder of the files that a stage publishes for all slides."""
    return stage.product_of(plan, 0).partition("/")[0]


def _count_missing(listing: "_Listing", plan: Plan, stage: Stage, slide: int) -> int:
    tasks = stage.tasks_of(plan, slide)
    if len(tasks) > 1 and not listing.names(stage.product_of(plan, tasks[0]).rpartition("/")[0]):
        return len(tasks)  # the slide has no folder of this stage
    return sum(not all(map(listing.has, names_of(stage, plan, slide, task))) for task in tasks)


def ingested(root: Path, slides: Iterable[str]) -> int:
    """Return the number of slides that are ingested."""
    listing = _Listing(root)
    return sum(listing.has(f"tissue/{slide}.json") for slide in slides)


class _Listing:
    """The names in the folders of a run; each folder is read once, when it is first needed."""

    def __init__(self, root: Path) -> None:
        self._root, self._names = root, dict[str, frozenset[str]]()

    def has(self, name: str) -> bool:
        """Tell whether a name has both a receipt and a file."""
        folder, _, last = name.rpartition("/")
        return f"{last}.json" in self.names(f"{publish.RECEIPTS}/{folder}") and last in self.names(folder)

    def names(self, folder: str) -> frozenset[str]:
        """Return the names in a folder, which is given relative to the run's folder."""
        if folder not in self._names:
            parent, _, name = folder.rpartition("/")
            is_absent = parent and name not in self.names(parent)
            self._names[folder] = frozenset() if is_absent else self._read(folder)
        return self._names[folder]

    def _read(self, folder: str) -> frozenset[str]:
        try:
            with os.scandir(f"{self._root}/{folder}") as entries:
                return frozenset(entry.name for entry in entries)
        except (FileNotFoundError, NotADirectoryError):
            return frozenset()
