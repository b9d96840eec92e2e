"""One protocol for every place where tasks can run.

An executor is a context manager with one method, ``run(work, source, stage, slices)``. A slice is a range of a stage's
tasks, what a pool item, a Dask future or an array job's element works through; ``run`` yields an `Outcome` for every
task as it ends, in any order. ``work`` is an importable function; paths and numbers travel, never pixels.
"""

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from wsiflow.run.executor.params import DaskParams, ExecutorParams, worker_count
from wsiflow.run.executor.protocol import Executor, Outcome, Slice, Work, closed

__all__ = [
    "DaskParams",
    "Executor",
    "ExecutorParams",
    "Outcome",
    "Slice",
    "Work",
    "closed",
    "make",
    "worker_count",
]


def make(params: ExecutorParams, *, cores: int, root: Path, client: Any = None) -> AbstractContextManager[Executor]:
    """Return the executor that the parameters name.

    Args:
        params: The choice.
        cores: Cores this process may use.
        root: The run's folder.
        client: Of the Dask cluster, for ``dask``.
    """
    from wsiflow.run.executor.inline import Inline
    from wsiflow.run.executor.process import ProcessPool

    if params.kind == "inline":
        return Inline()
    if params.kind == "array" and params.array is not None:
        from wsiflow.run.executor.array import ArrayJobs

        return ArrayJobs(params.array, root=root, workers=params.workers, threads=params.threads)
    if params.kind == "dask" and params.dask is not None:
        from wsiflow.run.executor.dask import Dask

        return Dask(client, threads=params.threads, window=params.dask.window)
    return ProcessPool(worker_count(params, cores=cores), threads=params.threads)
