"""How every slide of a run ended."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from wsiflow.errors import Failure, WsiflowError
from wsiflow.run.config import RunConfig
from wsiflow.run.plan import Plan
from wsiflow.run.results import cost
from wsiflow.run.shards import Ended
from wsiflow.run.stages.line import STAGES, STEPS
from wsiflow.system import publish, tables

OWN_TABLE = ("a table of the run", "run again")


class Status(NamedTuple):
    """How one slide ended: a row of ``process_list.csv``."""

    slide_id: str
    status: str
    reason: str
    exit_code: int
    n_tiles: int
    n_groups: int
    attempts: int


def missing_slides(statuses: Sequence[Status]) -> list[Status]:
    """Return how the slides without a result ended."""
    return [status for status in statuses if status.exit_code]


def may_be_scored(config: RunConfig, statuses: Sequence[Status]) -> bool:
    """Tell whether there is something to score, and the user wants it although slides may be missing."""
    missing = missing_slides(statuses)
    return not missing or (config.allow_partial and len(missing) < len(statuses))


def faulted(status: Status, faults: Mapping[str, WsiflowError]) -> Status:
    """Return how a slide ended once it turned out that it cannot be scored."""
    fault = faults.get(status.slide_id)
    return status if fault is None else status._replace(status="failed", reason=str(fault), exit_code=fault.exit_code)


def slide_statuses(made: Plan, ended: Sequence[Ended]) -> list[Status]:
    """Return how every slide ended, in the order of the plan, the rejected ones last."""
    failures: dict[int, Failure] = {}
    attempts: dict[int, int] = {}
    for item in ended:
        index = STAGES[item.stage].task(made, item.task).slide
        attempts[index] = attempts.get(index, 0) + item.executed
    for item in {(item.stage, item.task): item for item in ended}.values():  # a later try of a task is what counts
        if item.failure:
            failures.setdefault(STAGES[item.stage].task(made, item.task).slide, item.failure)
    rows = []
    for index, planned in enumerate(made.slides):
        failure = failures.get(index)
        status = "failed" if failure else "no tissue" if not planned.n_tiles else "done"
        reason = str(failure.about(slide=planned.slide_id)) if failure else ""
        rows.append(
            Status(
                planned.slide_id,
                status,
                reason,
                failure.exit_code if failure else 0,
                planned.n_tiles,
                planned.n_groups,
                attempts.get(index, 0),
            )
        )
    return rows + [Status(slide, "rejected", reason, code, 0, 0, 1) for slide, reason, code in made.rejected]


def process_list(statuses: Sequence[Status], receipts: Sequence[publish.Receipt]) -> str:
    """Return ``process_list.csv``: a row per slide, its times summed over everything published for it."""
    seconds = cost.seconds_by_slide(receipts)
    columns = ["slide_id", "status", "reason", "n_tiles", "n_groups", "attempts"]
    timed = [f"seconds_{step}" for step in (*STEPS, "wall", "cpu")]
    rows = [
        {name: getattr(status, name) for name in columns}
        | {name: f"{value:.3f}" for name, value in seconds.get(status.slide_id, {}).items()}
        for status in statuses
    ]
    return tables.csv_text(rows, [*columns, *timed])


def failure_text(root: Path, statuses: Sequence[Status]) -> str:
    """Say what is wrong where nothing was scored, and what to do about it."""
    bad = [status for status in statuses if status.exit_code]
    lines = [f"{status.status}: {status.reason}" for status in bad]
    others = f"; the others are in {root}" if len(bad) < len(statuses) else ""
    lines.append(f"{len(bad)} of {len(statuses)} slides have no result, so nothing was scored{others}")
    partly = ", or score without them: allow_partial=true" if len(bad) < len(statuses) else ""
    lines.append(f"mend them and run the same command again{partly}")
    if (root / FORMER).is_dir():
        lines.append(f"scores of an earlier state of the folder are in {root / FORMER}")
    return "\n".join(lines)


FORMER = "evaluation-FORMER"
