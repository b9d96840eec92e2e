"""The settings of executors: where tasks run."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, Field, field_serializer, model_validator

from wsiflow.redaction import redacted
from wsiflow.run.executor.dialect import ArrayParams
from wsiflow.run.executor.kinds import KINDS
from wsiflow.system.choices import OneOf

# Keywords of dask-jobqueue that name folders on the machine of the driver; other folders are on the nodes.
_FOLDERS = ("log_directory", "shared_temp_directory")


def _with_absolute_folders(keywords: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the keywords of a cluster with absolute paths of folders, which do not depend on the working folder."""
    return {
        name: str(Path(value).absolute()) if name in _FOLDERS and isinstance(value, str) else value
        for name, value in keywords.items()
    }


class DaskParams(BaseModel, frozen=True, extra="forbid"):
    """Which Dask workers do the work."""

    cluster: str = Field(
        default="",
        description="Class path of the cluster to start, such as dask_jobqueue.SLURMCluster. Empty: workers on this "
        "machine.",
    )
    cluster_kwargs: Annotated[Mapping[str, Any], AfterValidator(_with_absolute_folders)] = Field(
        default={}, description="Keywords that the class is called with."
    )
    adapt_kwargs: Mapping[str, Any] = Field(
        default={},
        description="Limits between which the cluster grows and shrinks, such as {minimum: 1, maximum: 20}. Empty: its "
        "size is fixed.",
    )
    address: str = Field(
        default="", description="Address of a scheduler that runs already. Empty: a cluster is started for the run."
    )
    window: int = Field(default=4, ge=1, le=1000, description="Most slices in flight at a time, per worker.")

    @field_serializer("cluster_kwargs", when_used="json")
    def _without_secrets(self, keywords: Mapping[str, Any]) -> dict[str, Any]:
        """Return the keywords with secrets redacted, for files and servers."""
        return redacted(keywords)

    @model_validator(mode="after")
    def _one_cluster(self) -> "DaskParams":
        if self.address and (self.cluster or self.cluster_kwargs or self.adapt_kwargs):
            keys = "cluster, cluster_kwargs and adapt_kwargs"
            raise ValueError(f"executor.dask.address names a running cluster, {keys} must be empty")
        return self


class ExecutorParams(BaseModel, frozen=True, extra="forbid"):
    """Where tasks run."""

    kind: Annotated[str, OneOf(KINDS)] = Field(
        description="Where tasks run. inline: in this process. process: in a pool of worker processes. dask: on a Dask "
        "cluster. array: in array jobs of a batch scheduler."
    )
    workers: int = Field(
        ge=0,
        le=100_000,
        description="Number of tasks that run at a time. 0: as many as there are cores, or as the cluster gives.",
    )
    threads: int = Field(
        ge=1,
        le=1024,
        description="Threads of each worker's network. They are part of the numeric class: their number can change the "
        "last bits of a score.",
    )
    slice_s: float = Field(
        ge=0, le=86_400, description="Seconds of work that are handed out at once. 0: tasks are handed out one by one."
    )
    dask: DaskParams | None = Field(default=None, description="Settings of the Dask cluster, where there is one.")
    array: ArrayParams | None = Field(default=None, description="Settings of array jobs, where there are some.")

    @model_validator(mode="after")
    def _has_its_settings(self) -> "ExecutorParams":
        if self.kind == "dask" and self.dask is None:
            raise ValueError("executor.dask is missing, take executor=dask")
        if self.kind == "array" and self.array is None:
            raise ValueError("executor.array is missing, take executor=slurm_array or another array")
        return self


def starts_all_workers(params: ExecutorParams) -> bool:
    """Tell whether every worker is this process or descends from it."""
    dask = params.dask or DaskParams()
    return KINDS[params.kind].is_local or (params.kind == "dask" and not dask.address and not dask.cluster)


def cores_here(params: ExecutorParams, *, cores: int) -> int:
    """Return how many cores of this process the workers take; 0 where workers are elsewhere.

    Args:
        params: Where tasks run.
        cores: Number of cores that this process may use.
    """
    if not starts_all_workers(params):
        return 0
    return min(cores, (worker_count(params, cores=cores) or cores) * params.threads)


def worker_count(params: ExecutorParams, *, cores: int) -> int:
    """Return the number of tasks that run at a time; 0 where the cluster decides it."""
    size = KINDS[params.kind].size
    if size == "one":
        return 1
    return params.workers or (cores if size == "cores" else 0)
