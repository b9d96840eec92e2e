"""The executor of a run, and its Dask cluster if it has one, which is started here or found at an address.

prefect-dask's task runner starts and ends the cluster and does nothing else: shards stay threads of this process, and
slices are sent to the workers as plain functions, so that workers need neither Prefect nor its server.
"""

import logging
import pkgutil
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wsiflow.errors import EnvironmentFault, InputError
from wsiflow.run import executor
from wsiflow.run.cases import needed_paths
from wsiflow.run.executor import jobs
from wsiflow.run.executor.kinds import KINDS
from wsiflow.run.executor.params import DaskParams, ExecutorParams, starts_all_workers, worker_count
from wsiflow.run.executor.protocol import Executor, Outcome, Slice, Work
from wsiflow.run.plan import latest_plan
from wsiflow.run.stages import ingest
from wsiflow.system import faults, publish
from wsiflow.system.machine import allocated_cores

from . import jobqueue, logs, stopping

if TYPE_CHECKING:  # imported where there is a cluster: it takes seconds
    from distributed import Client
    from prefect_dask.task_runners import DaskTaskRunner

# Anybody who can talk to a scheduler can run code on it: hence TLS, and a dashboard for this machine alone.
_SECURED: dict[str, Any] = {
    "security": True,
    "protocol": "tls://",
    "scheduler_options": {"dashboard_address": "127.0.0.1:0"},
}
# Dask checks once, so long after a worker was lost, whether it is back. A worker that died a second time and is being
# restarted at that moment is ended for good.
_LOST_WORKER_TIMEOUT = "60s"


@contextmanager
def workers(params: ExecutorParams, root: Path) -> Iterator[Executor]:
    """Yield the executor of a run whose folder is ``root``, with its cluster if it has one.

    Raises:
        WsiflowError: As `cluster` and `wsiflow.run.executor.make`.
    """
    cores = allocated_cores()
    _note_shared_cores(params, cores)
    if KINDS[params.kind].forks:
        stopping.shield()
    with (
        cluster(params, cores=cores, root=root) as client,
        executor.make(params, cores=cores, root=root, client=client, **_about_nodes(params, root)) as pool,
        stopping.at_stop(pool.stop, unfinished=jobs.may_be_left(root) if params.kind == "array" else ""),
    ):
        yield _StoppableExecutor(pool)


def _note_shared_cores(params: ExecutorParams, cores: int) -> None:
    """Say that workers here are more than the cores: often the cores are those of a job, and not of the machine."""
    if starts_all_workers(params) and worker_count(params, cores=cores) * params.threads > cores:
        text = f"executor.workers={params.workers} of executor.threads={params.threads} share {cores} cores, "
        logs.note(f"{text}which are all that this process may use", logging.WARNING)


def _about_nodes(params: ExecutorParams, root: Path) -> dict[str, Any]:
    """Return what every node of array jobs must have, see `executor.make`: what it sees, and its class of machines."""
    path = ingest.newest_cases(root) if params.kind == "array" else None
    if path is None:
        return {}
    planned = latest_plan(root).settings.numeric_class if publish.generations(root, "plan.json") else None
    return {"needs": needed_paths(path), "numeric_class": planned}


class _StoppableExecutor:
    """An executor that holds its callers once the command is being stopped.

    Tasks that end from then on end because of the stop: nobody may record that, retry them or take them for failures.
    """

    def __init__(self, pool: Executor) -> None:
        self._pool = pool

    def run(self, work: Work, source: Path, stage: str, slices: Sequence[Slice]) -> Iterator[Outcome]:
        try:
            for outcome in self._pool.run(work, source, stage, slices):
                stopping.hold()
                yield outcome
        except Exception:
            stopping.hold()
            raise

    def stop(self) -> str | None:
        return self._pool.stop()


@contextmanager
def cluster(params: ExecutorParams, *, cores: int, root: Path) -> "Iterator[Client | None]":
    """Yield a client of the run's Dask cluster, None for every other executor.

    Args:
        params: Where tasks run.
        cores: Cores that this process may use. A local cluster has as many workers, unless ``executor.workers`` is set.
        root: The run's folder, in which jobs are noted.

    Raises:
        InputError: The class or its keywords are wrong.
        EnvironmentFault: The cluster does not start, or the scheduler does not answer.
    """
    if not KINDS[params.kind].has_client:
        yield None
        return
    import dask

    with (
        tempfile.TemporaryDirectory(prefix="wsiflow-dask-") as scratch,
        stopping.at_stop(lambda: shutil.rmtree(scratch, ignore_errors=True), last=True),
        dask.config.set({"distributed.deploy.lost-worker-timeout": _LOST_WORKER_TIMEOUT}),
        jobqueue.private((params.dask or DaskParams()).cluster_kwargs, root) as kwargs,
        ExitStack() as ends,
        _runner(params, cores, scratch, kwargs, root) as runner,
    ):
        client = _client(runner, params.dask or DaskParams())
        ends.callback(jobqueue.remove_certificates, client.cluster)
        has_jobs = (params.dask or DaskParams()).cluster.startswith(jobqueue.PREFIX)
        unfinished = jobs.may_be_left(root) if has_jobs else ""
        with (
            stopping.at_stop(lambda: _end(client, root), unfinished=unfinished),
            _staffed(client, params, root),
        ):
            yield client


def _end(client: "Client", root: Path) -> str | None:
    """End a cluster that was started here, with its processes, or with its jobs at a scheduler."""
    ended = jobqueue.cancel(root)
    if client.cluster is not None:
        client.cluster.close()
    return ended


def _refused_by_system(error: BaseException) -> OSError | None:
    """Return the error of the system that an error of Dask stems from, None where there is none."""
    stem: BaseException | None = error
    while stem is not None:
        if isinstance(stem, OSError) and faults.number(stem):
            return stem
        stem = stem.__cause__ or stem.__context__
    return None


@contextmanager
def _staffed(client: "Client", params: ExecutorParams, root: Path) -> Iterator[None]:
    """Start the workers of a cluster of jobs, and keep any cluster that was started here at its size.

    Raises:
        EnvironmentFault: The scheduler refuses the jobs.
    """
    from distributed import SpecCluster

    if not isinstance(client.cluster, SpecCluster):
        yield
        return
    dask = params.dask or DaskParams()
    if dask.cluster.startswith(jobqueue.PREFIX):
        jobqueue.start(client.cluster, dask, params.workers, root)
    with jobqueue.kept(client.cluster, root):
        yield


def _runner(params: ExecutorParams, cores: int, scratch: str, given: Mapping[str, Any], root: Path) -> "DaskTaskRunner":
    """Return the runner that starts the cluster with the given keywords, or connects to one at an address."""
    from prefect_dask.task_runners import DaskTaskRunner

    dask = params.dask or DaskParams()
    if dask.address:
        return DaskTaskRunner(address=dask.address)
    path, adapt_kwargs = dask.cluster or "distributed.LocalCluster", dict(dask.adapt_kwargs)
    size = {"n_workers": params.workers} if params.workers else {}
    kwargs = {**(size if dask.cluster else _local(params.workers or cores, scratch)), **given}
    try:
        found: list[Any] = []
        stopping.in_main_thread(lambda: found.append(pkgutil.resolve_name(path)))
        if path.startswith(jobqueue.PREFIX):
            kwargs, adapt_kwargs = _SECURED | jobqueue.keywords(found[0], kwargs, root), {}
        return DaskTaskRunner(cluster_class=path, cluster_kwargs=kwargs, adapt_kwargs=adapt_kwargs)
    except (ImportError, AttributeError, ValueError) as error:
        remedy = "give the path of a class and install its package"
        raise InputError(f"executor.dask.cluster is {path}: {error}", remedy, stage="configuration") from error


def _local(workers: int, scratch: str) -> dict[str, Any]:
    """Return the keywords of a cluster on this machine."""
    return {
        "n_workers": workers,
        "threads_per_worker": 1,
        "host": "127.0.0.1",
        "security": True,  # anybody who can talk to a scheduler can run code on it
        "dashboard_address": "127.0.0.1:0",
        "local_directory": scratch,
        "silence_logs": logging.CRITICAL,
    }


def _client(runner: "DaskTaskRunner", dask: DaskParams) -> "Client":
    """Start the cluster, or find it at its address, and return a client of it."""
    name = dask.cluster or "the local Dask cluster"
    runner.logger.disabled = True  # what it would print of errors is said below
    try:
        return runner.client
    except (TypeError, ValueError) as error:
        cause = f"{name} refuses executor.dask.cluster_kwargs: {error}"
        raise InputError(cause, "see the keywords of its class", stage="configuration") from error
    except (OSError, RuntimeError) as error:
        refused = _refused_by_system(error)
        if refused is not None and not dask.cluster + dask.address:
            raise faults.worker_fault(refused, "or take executor=inline") from error
        cause = f"no Dask scheduler answers at {dask.address}" if dask.address else f"{name} does not start"
        raise EnvironmentFault(f"{cause}: {error}", "make sure that it can be reached, then run again") from error
