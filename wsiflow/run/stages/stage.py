"""What a stage of the line is: one record, declared in the stage's own file, says all that others know of it."""

from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple

from wsiflow.errors import IntegrityError
from wsiflow.run.costs import StageCost
from wsiflow.run.plan import Plan, Task, Unit
from wsiflow.system import publish

Work = Callable[[Path, int], tuple[publish.Receipt, bool]]
"""``(source, index) -> (receipt, executed)``: one task, see `wsiflow.run.stages.work`."""


def _always(_plan: Plan, _slide: int) -> bool:
    return True


def _whatever_it_holds(_root: Path, _plan: Plan, _slide: int) -> bool:
    return True


class Stage(NamedTuple):
    """A stage of the line.

    Attributes:
        name: Its name in the trace, in receipts' keys and on the command line.
        unit: What one task of it works on.
        work: Does one task.
        product: The name of the file that a task publishes, relative to the run's folder.
        key: The key under which it does: what decides the file's content. Raises IntegrityError where the file is made
            of others of the run, and one of those is not published.
        cost: Roughly what a task costs, until it is measured.
        steps: What the seconds of its receipts are told apart by.
        is_due: Whether a run asks for the stage of a slide.
        is_good: Whether what is published of a slide satisfies the run.
        beside: Names of what it publishes beside its product, for people to look at; ``{slide}`` is the slide's.
        verified: How the driver sees that a file is whole: by its hash, or by its size where whoever reads it compares
            every byte with its receipt or checksum.
        serves_scores: Whether its files are of no use any more once the slide has its scores.
        loads_network: Whether its tasks need the network.
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
    beside: tuple[str, ...] = ()
    verified: Literal["hash", "size"] = "hash"
    serves_scores: bool = False
    loads_network: bool = False

    def task(self, plan: Plan, index: int) -> Task:
        """Return what the task at a place in the stage works on."""
        return plan.task(self.unit, index)

    def tasks_of(self, plan: Plan, slide: int) -> range:
        """Return the places of a slide's tasks."""
        return plan.tasks_of(self.unit, slide)

    def product_of(self, plan: Plan, index: int) -> str:
        """Return the name of the file that a task publishes."""
        return self.product(plan, self.task(plan, index))

    def beside_of(self, plan: Plan, slide: int) -> list[str]:
        """Return the names of what is published beside the file of a slide."""
        return [name.format(slide=plan.slides[slide].slide_id) for name in self.beside]

    def key_of(self, root: Path, plan: Plan, index: int) -> str:
        """Return the key under which a task publishes its file.

        Raises:
            IntegrityError: See ``key``.
        """
        return self.key(root, plan, self.task(plan, index))

    def published(self, root: Path, plan: Plan, slide: int) -> list[str]:
        """Return the SHA-256 of what is published of a slide, as the receipts say, in the order of the tasks.

        Raises:
            IntegrityError: Something is missing.
        """
        names = [self.product_of(plan, index) for index in self.tasks_of(plan, slide)]
        receipts = {name: publish.read_receipt(root, name) for name in names}
        missing = next((name for name, receipt in receipts.items() if receipt is None), None)
        if missing:
            raise IntegrityError(f"{missing} was not published", "run again", slide=plan.slides[slide].slide_id)
        return [receipt["sha256"] for receipt in receipts.values() if receipt]
