"""One protocol for every place where tasks can run.

An executor is a context manager with one method, ``run(work, source, stage, slices)``. A slice is a range of a stage's
tasks, what a pool item, a Dask future or an array job's element works through; ``run`` yields an `Outcome` for every
task as it ends, in any order. ``work`` is an importable function; paths and numbers travel, never pixels.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

from pydantic import BaseModel, Field, field_serializer, model_validator

from wsiflow.errors import EnvironmentFault
from wsiflow.redaction import redacted
from wsiflow.run.executor.dialect import ArrayParams


class DaskParams(BaseModel, frozen=True, extra="forbid"):
    """Which Dask workers do the work.

    Attributes:
        cluster: Class path of the cluster to start, such as ``dask_jobqueue.SLURMCluster``; empty for this machine.
        cluster_kwargs: What the class is called with.
        adapt_kwargs: Limits between which the cluster grows and shrinks; empty for a fixed size.
        address: Scheduler of a cluster that runs already, instead of ``cluster``.
        window: Slices in flight at most, per worker.
    """

    cluster: str = ""
    cluster_kwargs: Mapping[str, Any] = {}
    adapt_kwargs: Mapping[str, Any] = {}
    address: str = ""
    window: int = Field(default=4, ge=1, le=1000)

    @field_serializer("cluster_kwargs", when_used="json")
    def _without_secrets(self, keywords: Mapping[str, Any]) -> dict[str, Any]:
        """Return the keywords as files and servers may have them."""
        return redacted(keywords)

    @model_validator(mode="after")
    def _one_cluster(self) -> "DaskParams":
        if self.address and (self.cluster or self.cluster_kwargs or self.adapt_kwargs):
            raise ValueError("executor.dask.address names a cluster that runs, what starts one must be empty")
        return self


class ExecutorParams(BaseModel, frozen=True, extra="forbid"):
    """Where tasks run.

    Attributes:
        kind: ``inline`` in this process, ``process`` in a pool of worker processes, ``dask`` on a Dask cluster,
            ``array`` in array jobs of a batch scheduler.
        workers: Tasks that run at a time; 0 takes all there is: a core each, or what the cluster gives.
        threads: Threads of each worker's network; part of the numeric class, since it can change the last bits.
        slice_s: Seconds of work to hand out at once; 0 hands out single tasks.
        dask: Settings of ``dask``.
        array: Settings of ``array``.
    """

    kind: Literal["inline", "process", "dask", "array"]
    workers: int = Field(ge=0, le=100_000)
    threads: int = Field(ge=1, le=1024)
    slice_s: float = Field(ge=0, le=86_400)
    dask: DaskParams | None = None
    array: ArrayParams | None = None

    @model_validator(mode="after")
    def _has_its_settings(self) -> "ExecutorParams":
        if self.kind == "dask" and self.dask is None:
            raise ValueError("executor.dask is missing, take executor=dask")
        if self.kind == "array" and self.array is None:
            raise ValueError("executor.array is missing, take executor=slurm_array or another array")
        return self


class Slice(NamedTuple):
    """A half-open range of a stage's tasks, done by one worker one after another."""

    lo: int
    hi: int


class Outcome(NamedTuple):
    """How one task ended.

    Attributes:
        task: The task's place in its stage.
        receipt: The receipt of what it published, None where it failed.
        executed: False where it was done already.
        error: What went wrong, in one line.
        exit_code: The error's exit class, 0 where all is well.
        usage: What the attempt used and where it ran, see `wsiflow.system.usage`; None where it is not known.
        retried: This attempt was lost and another one follows: of interest to the trace alone.
    """

    task: int
    receipt: dict[str, Any] | None
    executed: bool
    error: str = ""
    exit_code: int = 0
    usage: dict[str, Any] | None = None
    retried: bool = False

    def with_usage(self, **known: Any) -> "Outcome":
        """Return the outcome with more that is known of its attempt."""
        return self._replace(usage={**(self.usage or {}), **known})


Work = Callable[[Path, str, int, int], Iterator[Outcome]]
"""``work(source, stage, lo, hi)`` does the tasks of a slice and yields how each ended."""


class Executor(Protocol):
    """Runs tasks of a plan."""

    def run(self, work: Work, source: Path, stage: str, slices: Sequence[Slice]) -> Iterator[Outcome]:
        """Run every slice, the first ones first, and yield the outcomes as they come.

        Args:
            work: What a worker calls with each slice.
            source: The file that says what there is to do, see `wsiflow.run.stages.work`.
            stage: The stage.
            slices: Ranges that do not overlap.

        Yields:
            For each task one outcome that is not ``retried``, and any number that are.

        Raises:
            EnvironmentFault: The executor was closed or stopped meanwhile, see `closed`.
        """
        ...

    def stop(self) -> str | None:
        """End what is under way and take nothing more, from any thread; return what is to be told of it."""
        ...


def closed() -> EnvironmentFault:
    """Return what ends every `Executor.run` that is under way when its executor ends: nobody waits for ever."""
    return EnvironmentFault("the run ended before this was done", "run again: what is done stays done")


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


def worker_count(params: ExecutorParams, *, cores: int) -> int:
    """Return how many tasks run at a time; 0 where only the cluster knows."""
    if params.kind == "inline":
        return 1
    return params.workers or (cores if params.kind == "process" else 0)
