"""The ledger of a run: the numbers of planned and of published tasks, from the files of its folder alone."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from wsiflow.plan.slide_plan import SlidePlan
from wsiflow.run.plan import Plan, latest_plan
from wsiflow.system import publish


class Ledger(NamedTuple):
    """The ledger: planned = published + quarantined + failed, in groups; a rejected slide counts as one group.

    Attributes:
        planned: Number of groups in the plan, plus the rejected slides.
        published: Number of groups whose scores are published.
        quarantined: Number of rejected slides.
        failed: Number of groups that are not published.
    """

    planned: int
    published: int
    quarantined: int
    failed: int

    @property
    def complete(self) -> bool:
        """Whether everything that was planned is published."""
        return self.planned == self.published


def balance(root: Path, plan: Plan) -> Ledger:
    """Return the ledger of a run, from the names of its files and receipts.

    Names are enough, because a folder holds one set of settings, and each file has a receipt of its own. The keys and
    hashes of scores are verified when they are read.
    """
    published = sum(len(published_groups(root, planned)) for planned in plan.slides)
    planned = plan.n_groups + len(plan.rejected)
    return Ledger(planned, published, len(plan.rejected), plan.n_groups - published)


def published_groups(root: Path, planned: SlidePlan) -> set[str]:
    """Return the names of the groups of a slide whose file and receipt exist; two folders are listed once each."""
    name = f"predictions/{planned.slide_id}"
    recorded = {receipt.removesuffix(".json") for receipt in _names(root / publish.RECEIPTS / name)}
    return recorded & _names(root / name) & {f"t{k}.h5" for k in range(1, planned.n_groups + 1)}


def _names(folder: Path) -> set[str]:
    try:
        with os.scandir(folder) as entries:
            return {entry.name for entry in entries}
    except FileNotFoundError:
        return set()


def summary(roots: Iterable[Path]) -> str:
    """Return in a few words how many tasks of some runs are done, and how many are left."""
    ledgers = [balance(root, latest_plan(root)) for root in roots if publish.generations(root, "plan.json")]
    if not ledgers:
        return "nothing was planned yet"
    return f"{sum(each.published for each in ledgers)} tasks done, {sum(each.failed for each in ledgers)} left"
