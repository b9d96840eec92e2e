"""The ledger of a run: what was planned against what is published, from the disk alone."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from wsiflow.plan.slide_plan import SlidePlan
from wsiflow.run.plan import Plan, latest_plan
from wsiflow.system import publish


class Ledger(NamedTuple):
    """Planned = published + quarantined + failed, in array tasks; a rejected slide counts as one task."""

    planned: int
    published: int
    quarantined: int
    failed: int

    @property
    def complete(self) -> bool:
        """Everything that was planned is published."""
        return self.planned == self.published


def balance(root: Path, plan: Plan) -> Ledger:
    """Count what the disk says: the groups' files and receipts, nothing an orchestrator remembers.

    A folder holds one set of settings, and a receipt of its own for every file, so the names tell; keys and hashes are
    compared by whoever reads a group's scores.
    """
    published = sum(len(published_groups(root, planned)) for planned in plan.slides)
    planned = plan.n_groups + len(plan.rejected)
    return Ledger(planned, published, len(plan.rejected), plan.n_groups - published)


def published_groups(root: Path, planned: SlidePlan) -> set[str]:
    """Return the names of a slide's groups that are published and were not deleted: one look at each of two folders."""
    name = f"predictions/{planned.slide_id}"
    told = {receipt.removesuffix(".json") for receipt in _names(root / publish.RECEIPTS / name)}
    return told & _names(root / name) & {f"t{k}.h5" for k in range(1, planned.n_groups + 1)}


def _names(folder: Path) -> set[str]:
    try:
        with os.scandir(folder) as found:
            return {item.name for item in found}
    except FileNotFoundError:
        return set()


def summary(roots: Iterable[Path]) -> str:
    """Say in a few words how far some runs have come."""
    found = [balance(root, latest_plan(root)) for root in roots if publish.generations(root, "plan.json")]
    if not found:
        return "nothing was planned yet"
    return f"{sum(each.published for each in found)} tasks done, {sum(each.failed for each in found)} left"
