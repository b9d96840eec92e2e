"""The line: its stages in order, each described in its own file, and what of them a run has done."""

import os
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path

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

#: Those whose tasks need the network.
LOADING = frozenset(stage.name for stage in STAGES.values() if stage.loads_network)

#: What the seconds of receipts are told apart by.
STEPS = tuple(dict.fromkeys(step for stage in STAGES.values() for step in stage.steps))

# Of GoogLeNet at stride 16 in fp32 on one Zen 4 core. Measured: a tile of extract and of predict, and a certificate
# (docs/performance.md). The rest is assumed, on the cautious side: start and load are at the upper end of what was seen
# (docs/scaling.md, X3b), and what a task costs besides its tiles is what the demo's slides take.
ROUGH = Costs(
    start_s=4.0,
    load_s=3.0,
    spread=0.2,
    stages={"ingest": StageCost(2.0, 0.0), **{stage.name: stage.cost for stage in STAGES.values()}},
)


def names_of(stage: Stage, plan: Plan, slide: int, index: int) -> list[str]:
    """Return the names of all that a task of a slide publishes."""
    return [stage.product_of(plan, index), *stage.beside_of(plan, slide)]


def census(root: Path, plan: Plan) -> dict[str, tuple[int, int]]:
    """Return how many tasks of each stage are published and not deleted, and how many were planned.

    The names of files and receipts tell: each folder is looked at once, however many tasks there are.
    """
    there = _listing(root)
    found = {}
    for stage in STAGES.values():
        slides = [slide for slide in range(len(plan.slides)) if stage.is_due(plan, slide)]
        if stage.serves_scores:  # a slide without tissue may have no pixels to store
            slides = [slide for slide in slides if plan.slides[slide].n_tiles]
        tasks = [(slide, task) for slide in slides for task in stage.tasks_of(plan, slide)]
        done = [all(map(there, names_of(stage, plan, slide, task))) for slide, task in tasks]
        if done:
            found[stage.name] = (sum(done), len(done))
    return found


def ingested(root: Path, slides: Iterable[str]) -> int:
    """Return how many slides have been looked at."""
    there = _listing(root)
    return sum(there(f"tissue/{slide}.json") for slide in slides)


def _listing(root: Path) -> Callable[[str], bool]:
    """Return a function that tells whether a name has a receipt and its file."""

    @cache
    def names(folder: Path) -> frozenset[str]:
        try:
            with os.scandir(folder) as found:
                return frozenset(item.name for item in found)
        except (FileNotFoundError, NotADirectoryError):
            return frozenset()

    def there(name: str) -> bool:
        folder, _, last = name.rpartition("/")
        return f"{last}.json" in names(root / publish.RECEIPTS / folder) and last in names(root / folder)

    return there
