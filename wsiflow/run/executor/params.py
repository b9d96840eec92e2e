"""Where tasks run."""

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, Field, field_serializer, model_validator

from wsiflow.redaction import redacted
from wsiflow.run.executor.dialect import ArrayParams
from wsiflow.run.executor.kinds import KINDS
from wsiflow.system.choices import OneOf


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

    kind: Annotated[str, OneOf(KINDS)]
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


def worker_count(params: ExecutorParams, *, cores: int) -> int:
    """Return how many tasks run at a time; 0 where only the cluster knows."""
    size = KINDS[params.kind].size
    if size == "one":
        return 1
    return params.workers or (cores if size == "cores" else 0)
