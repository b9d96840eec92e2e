"""The record of a stage of the line: each stage declares one in its own file, and nothing else describes it."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from wsiflow.errors import IntegrityError
from wsiflow.run.costs import StageCost
from wsiflow.run.plan import Plan, Task, Unit
from wsiflow.system import publish

Work = Callable[[Path, int], tuple[publish.Receipt, bool]]
"""``(source, index) -> (receipt, executed)`` does one task, see `wsiflow.run.stages.work`."""


def _always(_plan: Plan, _slide: int) -> bool:
    return True


def _nothing(_maps: Sequence[str], _passes: int) -> tuple[str, ...]:
    return ()


def _whatever_it_holds(_root: Path, _plan: Plan, _slide: int) -> bool:
    return True


class Stage(NamedTuple):
    """A stage of the line.

    Attributes:
        name: Name of the stage in the trace, in the keys of receipts and on the command line.
        unit: What one task works on.
        work: Function that does one task.
        product: Function that returns the name of the file that a task publishes, relative to the run's folder.
        key: Function that returns the key of that file, from everything that decides its content. It raises
            IntegrityError where the file is computed from other files, and one of them is not published.
        cost: Rough cost of a task, which is used until costs are measured.
        steps: Names of the steps by which the receipts divide their seconds.
        is_due: Function that tells whether a run needs the stage for a slide.
        is_good: Function that tells whether a run accepts what is published of a slide.
        beside: Function from the names of the further classes that are mapped and the number of passes, 2 in a cascade,
            to the names of the files that are published beside the file; ``{slide}`` stands for the slide's id.
        verified: How the driver verifies that a file is whole: by its hash, or by its size where every reader compares
            the bytes with the receipt or with checksums.
        serves_scores: Whether the files are not needed any more once the slide has its scores.
        loads_network: Whether a task needs the network.
    """

    name: str
    unit: Unit
    work: Work
    product: Callable[[Plan, Task], str]
    key: Callable[[Path, Plan, Task], str]
    cost: StageCost
    steps: tuple[str, ...]
    is_due: Callable[[Plan, int], bool] = _always
    is_good: Callable[[Path, Plan, int], bool] = _whatever_it_holds
    beside: Callable[[Sequence[str], int], tuple[str, ...]] = _nothing
    verified: Literal["hash", "size"] = "hash"
    serves_scores: bool = False
    loads_network: bool = False

    def task(self, plan: Plan, index: int) -> Task:
        """Return what the task with an index works on."""
        return plan.task(self.unit, index)

    def tasks_of(self, plan: Plan, slide: int) -> range:
        """Return the indices of the tasks of a slide."""
        return plan.tasks_of(self.unit, slide)

    def product_of(self, plan: Plan, index: int) -> str:
        """Return the name of the file that a task publishes."""
        return self.product(plan, self.task(plan, index))

    def beside_of(self, plan: Plan, slide: int) -> list[str]:
        """Return the names of the files that are published beside the file of a slide."""
        names = self.beside(plan.settings.maps, 1 if plan.settings.cascade is None else 2)
        return [name.format(slide=plan.slides[slide].slide_id) for name in names]

    def key_of(self, root: Path, plan: Plan, index: int) -> str:
        """Return the key under which a task publishes its file.

        Raises:
            IntegrityError: A file from which this one is computed is not published.
        """
        return self.key(root, plan, self.task(plan, index))

    def published(self, root: Path, plan: Plan, slide: int) -> list[str]:
        """Return the SHA-256 of the published files of a slide, from the receipts, in the order of the tasks.

        Raises:
            IntegrityError: A file is not published.
        """
        names = [self.product_of(plan, index) for index in self.tasks_of(plan, slide)]
        receipts = {name: publish.read_receipt(root, name) for name in names}
        missing = next((name for name, receipt in receipts.items() if receipt is None), None)
        if missing:
            raise IntegrityError(f"{missing} was not published", "run again", slide=plan.slides[slide].slide_id)
        return [receipt["sha256"] for receipt in receipts.values() if receipt]
