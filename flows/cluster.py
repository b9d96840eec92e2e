"""The executor of a run, and its Dask cluster if it has one, which is started here or found at an address.

prefect-dask's task runner starts and ends the cluster and does nothing else: shards stay threads of this process, and
slices are sent to the workers as plain functions, so that workers need neither Prefect nor its server.
"""

import logging
import pkgutil
import shutil
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wsiflow.errors import EnvironmentFault, InputError
from wsiflow.run import executor
from wsiflow.run.cases import needed_paths
from wsiflow.run.executor.kinds import KINDS
from wsiflow.run.executor.params import DaskParams, ExecutorParams
from wsiflow.run.executor.protocol import Executor, Outcome, Slice, Work
from wsiflow.run.plan import latest_plan
from wsiflow.run.stages import ingest
from wsiflow.system import faults, publish
from wsiflow.system.machine import allocated_cores

from . import stopping

if TYPE_CHECKING:  # imported where there is a cluster: it takes seconds
    from distributed import Client
    from prefect_dask.task_runners import DaskTaskRunner

# Anybody who can talk to a scheduler can run code on it: hence TLS, and a dashboard for this machine alone.
_SECURED: dict[str, Any] = {
    "security": True,
    "protocol": "tls://",
    "scheduler_options": {"dashboard_address": "127.0.0.1:0"},
}
_KEEP_S = 10.0
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
    if KINDS[params.kind].forks:
        stopping.shield()
    with (
        cluster(params, cores=cores) as client,
        executor.make(params, cores=cores, root=root, client=client, **_about_nodes(params, root)) as pool,
        stopping.at_stop(pool.stop),
    ):
        yield _StoppableExecutor(pool)


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
def cluster(params: ExecutorParams, *, cores: int) -> "Iterator[Client | None]":
    """Yield a client of the run's Dask cluster, None for every other executor.

    Args:
        params: Where tasks run.
        cores: Cores that this process may use. A local cluster has as many workers, unless ``executor.workers`` is set.

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
        dask.config.set({"distributed.deploy.lost-worker-timeout": _LOST_WORKER_TIMEOUT}),
        _runner(params, cores, scratch) as runner,
    ):
        client = _client(runner, params.dask or DaskParams())
        with _kept_at_size(client), stopping.at_stop(lambda: _end(client, scratch)):
            yield client


def _end(client: "Client", scratch: str) -> None:
    """End a cluster that was started here, with its processes, or with its jobs at a scheduler."""
    if client.cluster is not None:
        client.cluster.close()
    shutil.rmtree(scratch, ignore_errors=True)


def _runner(params: ExecutorParams, cores: int, scratch: str) -> "DaskTaskRunner":
    from prefect_dask.task_runners import DaskTaskRunner

    dask = params.dask or DaskParams()
    if dask.address:
        return DaskTaskRunner(address=dask.address)
    path = dask.cluster or "distributed.LocalCluster"
    size = {"n_workers": params.workers} if params.workers else {}
    keywords = size | _SECURED if path.startswith("dask_jobqueue.") else size
    kwargs = {**(keywords if dask.cluster else _local(params.workers or cores, scratch)), **dask.cluster_kwargs}
    try:
        stopping.in_main_thread(lambda: pkgutil.resolve_name(path))
        return DaskTaskRunner(cluster_class=path, cluster_kwargs=kwargs, adapt_kwargs=dict(dask.adapt_kwargs))
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
    try:
        return runner.client
    except (TypeError, ValueError) as error:
        cause = f"{name} refuses executor.dask.cluster_kwargs: {error}"
        raise InputError(cause, "see the keywords of its class", stage="configuration") from error
    except (OSError, RuntimeError) as error:
        if isinstance(error, OSError) and faults.number(error) and not dask.cluster + dask.address:
            raise faults.worker_fault(error, "or take executor=inline") from error
        cause = f"no Dask scheduler answers at {dask.address}" if dask.address else f"{name} does not start"
        raise EnvironmentFault(f"{cause}: {error}", "make sure that it can be reached, then run again") from error


@contextmanager
def _kept_at_size(client: "Client") -> Iterator[None]:
    """Keep the cluster at its size: jobs that end before the run does, at their time limit, are submitted again."""
    from distributed import SpecCluster

    ended = threading.Event()

    def keep(cluster: SpecCluster) -> None:
        while not ended.wait(_KEEP_S):
            SpecCluster.scale(cluster, len(cluster.worker_spec))  # type: ignore[no-untyped-call]

    if isinstance(client.cluster, SpecCluster):
        threading.Thread(target=keep, args=(client.cluster,), daemon=True).start()
    try:
        yield
    finally:
        ended.set()
