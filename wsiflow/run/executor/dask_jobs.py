"""The jobs of a Dask cluster at a batch scheduler: a log of them in the run's folder, by which they are cancelled.

A line is appended when a job was submitted, with the command that cancels it, and when it was cancelled. Jobs whose
driver is gone have no scheduler of Dask to work for any more.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from wsiflow.run.executor import jobs
from wsiflow.run.executor.dialect import Dialect, expand
from wsiflow.system import processes, publish
from wsiflow.system.processes import Process
from wsiflow.system.usage import now

LOG = f"{publish.RECEIPTS}/dask_jobs.jsonl"

_DRIVER_S = 10.0
_ASKED = 8  # jobs at a time for which it is asked why they wait


class DaskJob(NamedTuple):
    """A job that may be in the queue.

    Attributes:
        job: The scheduler's id.
        cancel: Command that cancels it, without the id.
        driver: The process that submitted it.
    """

    job: str
    cancel: tuple[str, ...]
    driver: Process


def note(root: Path, job: str, cancel: Sequence[str]) -> None:
    """Note that a job of this process was submitted; the line is on disk before this returns."""
    _append(root, event="job", job=job, cancel=list(cancel), driver=jobs.identity())


def note_end(root: Path, job: str) -> None:
    """Note that a job was cancelled."""
    _append(root, event="ended", job=job)


def _append(root: Path, **line: object) -> None:
    (root / LOG).parent.mkdir(parents=True, exist_ok=True)
    publish.append_line(root / LOG, json.dumps({"at": now(), **line}), sync=True)


def open_jobs(root: Path) -> list[DaskJob]:
    """Return the jobs that were not cancelled, the first one first; they may have ended by themselves."""
    path, found = root / LOG, dict[str, DaskJob]()
    for line in jobs.parse(path.read_bytes()) if path.exists() else []:
        if line["event"] == "job":
            driver = processes.from_record(line["driver"])
            found[line["job"]] = DaskJob(line["job"], tuple(line["cancel"]), driver)
        else:
            found.pop(line["job"], None)
    return list(found.values())


def drop(root: Path, dropped: Sequence[DaskJob]) -> list[str]:
    """Cancel jobs, and return their ids.

    Raises:
        EnvironmentFault: There is no such command on this machine.
    """
    for cancel in {job.cancel: None for job in dropped}:
        jobs.call([*cancel, *(job.job for job in dropped if job.cancel == cancel)])  # of some that are gone it fails
    for job in dropped:
        note_end(root, job.job)
    return [job.job for job in dropped]


def drop_left(root: Path) -> list[str]:
    """Cancel the jobs of drivers that are known to have ended, and return their ids."""
    return drop(root, [job for job in open_jobs(root) if processes.has_ended(job.driver)])


def cancel(root: Path) -> list[str]:
    """Cancel the Dask jobs of a run by its folder alone, after its driver, where that runs on this machine.

    Returns:
        A sentence for each driver and for the jobs; empty where there are none.

    Raises:
        EnvironmentFault: There is no command that cancels them on this machine.
    """
    left = open_jobs(root)
    sentences = [_end(driver) for driver in {job.driver: None for job in left}]
    if left:
        sentences.append(f"Dask jobs cancelled: {', '.join(drop(root, left))}")
    return sentences


def _end(driver: Process) -> str:
    """End a driver, which would submit cancelled jobs again, and return a sentence that says what became of it."""
    if not processes.is_observable(driver):
        return f"the driver was started on {driver.host}, or in another container: end it there"
    if processes.has_ended(driver):
        return "the driver had ended before"
    processes.end(driver, patience_s=_DRIVER_S)
    return f"the driver, process {driver.pid}, was ended"


def own(root: Path) -> list[DaskJob]:
    """Return the jobs of this process that were not cancelled."""
    return [job for job in open_jobs(root) if job.driver == processes.current()]


def reasons(listed: Sequence[DaskJob], dialect: Dialect) -> list[str]:
    """Return why the jobs wait that have not started, in the words of their scheduler; empty where it tells nothing."""
    found: set[str] = set()
    for job in listed[:_ASKED]:
        answer = jobs.call(expand(dialect.reasons, {"whole": job.job}))
        found.add(dialect.explained("" if answer.returncode else answer.stdout))
    return sorted(filter(None, found))


def never_starts(job: DaskJob, dialect: Dialect, reason: str) -> str:
    """Return why a job that waits for some reason will never start; empty where it may."""
    if dialect.is_hopeless(reason) or dialect.cause("", "", began=False, reason=reason) == "start":
        return reason
    if not dialect.verify:
        return ""
    answer = jobs.call(expand(dialect.verify, {"whole": job.job}))
    return dialect.never_runs(answer.stdout + answer.stderr)
