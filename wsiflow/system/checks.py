"""Checks of what a run needs of the machine: each gives what was found, and a remedy where it will not do."""

import fcntl
import multiprocessing
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from wsiflow.errors import EnvironmentFault, Failure
from wsiflow.system import faults, machine, publish

_SMALL_BYTES = 1_000_000_000
_SCHEDULERS = {"sbatch": "Slurm (executor=slurm_array)", "qsub": "Grid Engine or PBS (executor=sge_array, pbs_array)"}
_SCHEDULERS |= {"bsub": "LSF (executor=lsf_array)"}


class Finding(NamedTuple):
    """The result of a check.

    Attributes:
        subject: What was checked.
        text: What was found.
        remedy: What to do about it; empty where all is well.
    """

    subject: str
    text: str
    remedy: str = ""


def findings(folder: Path) -> Iterator[Finding]:
    """Check this machine, and a folder in which runs would lie.

    Yields:
        What was found, one after another, as each check takes a moment.
    """
    yield _cores()
    yield _checked("folder", lambda: _folder(folder))
    yield _checked("locks", lambda: _locks(folder))
    yield _checked("home", _home)
    yield _checked("temporary", _temporary)
    yield _checked("processes", _processes)
    yield _scheduler()


def _checked(subject: str, check: Callable[[], Finding]) -> Finding:
    """Return what a check finds, or the error of the system that ends it."""
    try:
        return check()
    except EnvironmentFault as fault:
        return of_failure(subject, fault.failure)
    except OSError as error:
        return of_failure(subject, faults.fault(error).failure)


def of_failure(subject: str, failure: Failure) -> Finding:
    """Return a failure as what a check found, in one line."""
    place = f"{failure.path}: " if failure.path else ""
    return Finding(subject, " ".join(f"{place}{failure.cause}".split()), failure.remedy)


def _cores() -> Finding:
    may, has = machine.allocated_cores(), os.cpu_count() or 1
    return Finding("cores", f"this process may use {may} of {has} cores")


def _folder(folder: Path) -> Finding:
    free = shutil.disk_usage(folder).free
    with tempfile.TemporaryDirectory(dir=folder, prefix=".wsiflow-") as probe:
        publish.preflight(Path(probe))
    text = f"files can be published in {folder.resolve()}, {free / 1e9:.1f} GB are free"
    return Finding("folder", text, "" if free > _SMALL_BYTES else "free space there, or run elsewhere (out=)")


def _locks(folder: Path) -> Finding:
    with tempfile.TemporaryFile(dir=folder) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            remedy = "runs need none; name a store elsewhere, or a server, as tracking.uri, or take tracking=off"
            return Finding("locks", f"this disk has no locks ({faults.cause(error)})", remedy)
    return Finding("locks", "this disk has locks, so that MLflow's store can lie here")


def _home() -> Finding:
    home = Path.home()
    with tempfile.TemporaryFile(dir=home):
        return Finding("home", f"{home} can be written")


def _temporary() -> Finding:
    folder = Path(tempfile.gettempdir())
    free = shutil.disk_usage(folder).free
    with tempfile.TemporaryFile(dir=folder) as file:
        file.write(bytes(1 << 16))
    remedy = "" if free > _SMALL_BYTES else "free space there, or set TMPDIR"
    return Finding("temporary", f"{folder}, {free / 1e9:.1f} GB are free", remedy)


def _processes() -> Finding:
    try:
        multiprocessing.get_context("spawn").Lock()
    except OSError as error:
        raise faults.worker_fault(error, "or take executor=inline") from error
    return Finding("processes", "worker processes can be started")


def _scheduler() -> Finding:
    found = [name for command, name in _SCHEDULERS.items() if shutil.which(command)]
    return Finding("scheduler", ", ".join(found) or "none: executor=process uses this machine")
