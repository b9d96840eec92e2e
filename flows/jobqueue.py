"""Clusters of dask-jobqueue, whose workers are jobs of a batch scheduler: one is started first, and all are noted."""

import logging
import re
import shlex
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import CancelledError
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from wsiflow.errors import EnvironmentFault
from wsiflow.run.executor import dask_jobs
from wsiflow.run.executor.dialect import Dialect
from wsiflow.run.executor.params import DaskParams
from wsiflow.system import publish

from . import logs

PREFIX = "dask_jobqueue."
"""The beginning of the path of these classes."""

_REMEDY = "correct executor.dask.cluster_kwargs, then run again"
_KEEP_S, _TELL_S = 10.0, 60.0
_FIRST_S, _FIRST_POLL_S = 10.0, 0.5  # so long a job may take to get a reason why it waits
_MARGIN_S, _MARGIN_SHARE = 600.0, 1 / 6  # of its walltime a worker keeps the smaller one to hand its work over
_NO_REASON_YET = "None"
_TIME = re.compile(r"(?:(?P<days>\d+)-)?(?P<clock>\d+(?::\d+){0,2})")

_logger = logging.getLogger("wsiflow.cluster")


@contextmanager
def private(kwargs: Mapping[str, Any], root: Path) -> Iterator[Mapping[str, Any]]:
    """Yield the keywords of a cluster with a folder of this process for its certificates, if they are for the run's.

    What a killed process leaves there is swept by the next start, as all that is private to a process.
    """
    name = "shared_temp_directory"
    if kwargs.get(name) != str(root / publish.ATTEMPTS):
        yield kwargs
        return
    with publish.private_folder(root) as folder:
        yield {**kwargs, name: str(folder)}


def remove_certificates(cluster: Any) -> None:
    """Remove the certificates of a cluster that has ended, which it would do at some later time."""
    for name in ("_job_ca_file", "_job_cert", "_job_key"):
        if (file := getattr(cluster, name, None)) is not None:
            file.close()


def keywords(cluster_class: Any, given: Mapping[str, Any], root: Path) -> dict[str, Any]:
    """Return the keywords of a cluster that starts without workers, and notes its jobs in a run's folder.

    Args:
        cluster_class: The class.
        given: What the configuration says.
        root: The run's folder.
    """
    arguments = list(given.get("worker_extra_args") or ())
    walltime_s = _seconds(str(given.get("walltime") or ""))
    if walltime_s and not any(str(argument).startswith("--lifetime") for argument in arguments):
        arguments += _lifetime(walltime_s)
    own = {"job_cls": _noted(given.get("job_cls") or cluster_class.job_cls, root), "worker_extra_args": arguments}
    named = {"job_name": f"{root.name}-dask", **given}
    return {name: value for name, value in {**named, **own}.items() if name not in {"n_workers", "jobs"}}


def _seconds(walltime: str) -> int:
    """Return the seconds of ``[days-]hours:minutes:seconds``, in which fewer parts begin with minutes; 0 for others."""
    match = _TIME.fullmatch(walltime)
    if not match:
        return 0
    parts = [int(part) for part in match["clock"].split(":")]
    if match["days"]:
        parts = [*parts, 0, 0][:3]
    elif len(parts) < 3:
        parts = [0, *parts, 0][:3]
    hours, minutes, seconds = parts
    return ((int(match["days"] or 0) * 24 + hours) * 60 + minutes) * 60 + seconds


def _lifetime(walltime_s: int) -> list[str]:
    """Return the options with which workers end before their jobs do, not all at the same moment."""
    margin_s = min(_MARGIN_S, walltime_s * _MARGIN_SHARE)
    return ["--lifetime", f"{walltime_s - margin_s:.0f}s", "--lifetime-stagger", f"{margin_s / 2:.0f}s"]


def _noted(job_class: Any, root: Path) -> Any:
    """Return a class of jobs that are noted in a run's folder when they are submitted and when they are cancelled."""

    class NotedJob(job_class):  # type: ignore[misc]
        """A job that holds workers, and is noted."""

        async def start(self) -> None:
            await super().start()
            dask_jobs.note(root, self.job_id, shlex.split(self.cancel_command))
            _logger.info("job %s submitted", self.job_id)

        async def close(self) -> None:
            await super().close()
            if self.job_id:
                dask_jobs.note_end(root, self.job_id)

    return NotedJob


def start(cluster: Any, dask: DaskParams, workers: int, root: Path) -> None:
    """Submit the jobs of a cluster: one first, for what is wrong with it is wrong with all.

    Args:
        cluster: The cluster, without workers.
        dask: Its settings.
        workers: Number of workers; where it is 0, the settings say how many.
        root: The run's folder.

    Raises:
        EnvironmentFault: The scheduler refuses the job, or will never start it.
    """
    if left := dask_jobs.drop_left(root):
        logs.note(f"Dask jobs of an earlier start are cancelled: {', '.join(left)}")
    cluster.worker_spec.update(cluster.new_worker_spec())
    if refusal := _refusal(cluster):
        raise EnvironmentFault(f"{dask.cluster} submits no workers: {refusal}", _REMEDY, stage="executor")
    _await_reason(cluster, root)
    if dask.adapt_kwargs:
        cluster.adapt(**dask.adapt_kwargs)
    else:
        kwargs = dask.cluster_kwargs
        jobs = int(kwargs.get("jobs") or 0)
        processes = int(kwargs.get("processes") or 1)
        size = jobs or -(-int(kwargs.get("n_workers") or workers or 1) // processes)
        while len(cluster.worker_spec) < size:
            cluster.worker_spec.update(cluster.new_worker_spec())
        if refusal := _refusal(cluster):
            logs.note(f"fewer workers than wanted, the others are asked for again: {refusal}", logging.WARNING)
    ids = ", ".join(job.job for job in dask_jobs.open_jobs(root))
    logs.note(f"Dask jobs submitted: {ids}; their logs are in {dask.cluster_kwargs.get('log_directory') or 'the home'}")


def _refusal(cluster: Any) -> str:
    """Submit the jobs that are missing, and return in the scheduler's words why one of them was refused, or nothing."""
    try:
        cluster.sync(cluster._correct_state)  # noqa: SLF001 - `scale` does it elsewhere, where errors are lost
    except FileNotFoundError as error:
        _forget_refused(cluster)
        return f"there is no command {error.filename} on this machine"
    except (RuntimeError, ValueError, OSError, CancelledError) as error:
        _forget_refused(cluster)
        return _last_words(str(error)) or type(error).__name__
    return ""


def _forget_refused(cluster: Any) -> None:
    """Take jobs that were not submitted for missing again: the cluster would neither ask for them again nor close."""
    refused = {name: job for name, job in cluster.workers.items() if getattr(job, "job_id", "") is None}
    for name, job in refused.items():
        del cluster.workers[name]
        cluster._created.discard(job)  # noqa: SLF001


def _last_words(text: str) -> str:
    """Return the last line of what a command printed, or of an error."""
    lines = [line.strip() for line in text.splitlines() if line.strip() and line.strip() not in {"stdout:", "stderr:"}]
    return lines[-1] if lines else ""


def _await_reason(cluster: Any, root: Path) -> None:
    """Wait until the first job's worker is there, or the scheduler says why it waits.

    Raises:
        EnvironmentFault: It will never start.
    """
    end, dialect = time.monotonic() + _FIRST_S, _dialect_of(cluster)
    while dialect and time.monotonic() < end and not cluster.scheduler_info["workers"]:
        own = dask_jobs.own(root)
        for reason in dask_jobs.reasons(own, dialect):
            if never := dask_jobs.never_starts(own[0], dialect, reason):
                cause = f"the jobs of the Dask workers would never start: {never}"
                raise EnvironmentFault(cause, _REMEDY, stage="executor")
            if reason != _NO_REASON_YET and not dialect.verify:  # those that verify also tell what has long passed
                return
        time.sleep(_FIRST_POLL_S)


def _dialect_of(cluster: Any) -> Dialect | None:
    """Return the dialect of a cluster's scheduler, as array jobs have it; None where there is none."""
    file = resources.files("wsiflow.conf").joinpath(f"executor/{cluster.job_cls.config_name}_array.yaml")
    if not file.is_file():
        return None
    return Dialect(**yaml.safe_load(file.read_text(encoding="utf-8"))["array"]["dialect"])


@contextmanager
def kept(cluster: Any, root: Path) -> Iterator[None]:
    """Keep a cluster at its size: workers that end before the run does, at their time limit, are started again.

    Once a minute a note says how many workers are missing, and why.
    """
    ended = threading.Event()

    def keep() -> None:
        told, told_s = "", time.monotonic()
        while not ended.wait(_KEEP_S):
            refusal = _refusal(cluster)
            if refusal and refusal != told and not ended.is_set():
                _logger.warning("a Dask worker does not start, and is tried again: %s", refusal)
            told = refusal
            if time.monotonic() - told_s >= _TELL_S:
                told_s = time.monotonic()
                _tell(cluster, root)

    threading.Thread(target=keep, name="dask-jobs", daemon=True).start()
    try:
        yield
    finally:
        ended.set()


def _tell(cluster: Any, root: Path) -> None:
    """Note how many workers are missing, and why."""
    wanted, there = len(cluster.plan), len(cluster.scheduler_info["workers"])
    if there < wanted:
        dialect = _dialect_of(cluster)
        told = dask_jobs.reasons(dask_jobs.own(root), dialect) if dialect else []
        reasons = [reason for reason in told if reason != _NO_REASON_YET]
        logs.note(f"{there} of {wanted} Dask workers are there" + f"; jobs wait: {', '.join(reasons)}" * bool(reasons))


def cancel(root: Path) -> str | None:
    """Cancel the jobs of this process, and return in words how many they were."""
    dropped = dask_jobs.drop(root, dask_jobs.own(root))
    return f"{len(dropped)} Dask job{'s' * (len(dropped) != 1)} cancelled" if dropped else None
