"""Determine the status of every slide of a run, and write it as ``process_list.csv``."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from wsiflow.errors import WsiflowError
from wsiflow.run.config import RunConfig
from wsiflow.run.plan import Plan
from wsiflow.run.results import cost
from wsiflow.run.shards import Ended, failures_by_slide
from wsiflow.run.stages.line import STAGES, STEPS
from wsiflow.system import publish, tables

OWN_TABLE = ("a table of the run", "run again")


class Status(NamedTuple):
    """The status of one slide at the end of a run, a row of ``process_list.csv``.

    Attributes:
        slide_id: Name of the slide.
        status: ``done``, ``no tissue``, ``failed`` or ``rejected``.
        reason: Message of the failure; empty where the slide has a result.
        exit_code: Exit code of the failure; 0 where the slide has a result.
        n_tiles, n_groups: Number of tissue tiles and of array tasks of the slide.
        attempts: Number of tasks that this start of the run executed for the slide.
    """

    slide_id: str
    status: str
    reason: str
    exit_code: int
    n_tiles: int
    n_groups: int
    attempts: int


def missing_slides(statuses: Sequence[Status]) -> list[Status]:
    """Return the statuses of the slides that have no result."""
    return [status for status in statuses if status.exit_code]


def may_be_scored(config: RunConfig, statuses: Sequence[Status]) -> bool:
    """Tell whether scores may be computed: all slides have a result, or some do and ``allow_partial`` is set."""
    missing = missing_slides(statuses)
    return not missing or (config.allow_partial and len(missing) < len(statuses))


def with_fault(status: Status, faults: Mapping[str, WsiflowError]) -> Status:
    """Return a slide's status as ``failed`` where the slide cannot be scored, else unchanged.

    Args:
        status: The status before scoring.
        faults: Faults of the slides that cannot be scored, by slide id.
    """
    fault = faults.get(status.slide_id)
    return status if fault is None else status._replace(status="failed", reason=str(fault), exit_code=fault.exit_code)


def slide_statuses(plan: Plan, ended: Sequence[Ended]) -> list[Status]:
    """Return the status of every slide, in the order of the plan, rejected slides last.

    Args:
        plan: The run's plan.
        ended: How every task of this start of the run ended.
    """
    failures = failures_by_slide(plan, ended)
    attempts: dict[int, int] = {}
    for item in ended:
        index = STAGES[item.stage].task(plan, item.task).slide
        attempts[index] = attempts.get(index, 0) + item.executed
    rows = []
    for index, planned in enumerate(plan.slides):
        failure = failures.get(index)
        status = "failed" if failure else "no tissue" if not planned.n_tiles else "done"
        reason = str(failure) if failure else ""
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
    return rows + [Status(slide, "rejected", reason, code, 0, 0, 1) for slide, reason, code in plan.rejected]


def process_list(statuses: Sequence[Status], receipts: Sequence[publish.Receipt]) -> str:
    """Return the text of ``process_list.csv``: a row per slide, with its times summed over its published files."""
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
    """Return the lines for the user where nothing was scored: the failures, and how to go on."""
    bad = [status for status in statuses if status.exit_code]
    lines = [f"{status.status}: {status.reason}" for status in bad]
    others = f"; the others are in {root}" if len(bad) < len(statuses) else ""
    lines.append(f"{len(bad)} of {len(statuses)} slides have no result, so nothing was scored{others}")
    lines.append(f"report     {root / 'report.html'}")
    partly = ", or score without them: allow_partial=true" if len(bad) < len(statuses) else ""
    lines.append(f"fix them and run the same command again{partly}")
    if (root / FORMER).is_dir():
        lines.append(f"scores of an earlier state of the folder are in {root / FORMER}")
    return "\n".join(lines)


FORMER = "evaluation-FORMER"
