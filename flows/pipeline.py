"""The line as a Prefect flow.

Each shard is two Prefect tasks, one that ingests it and one that takes it through the line. So there are tens to
hundreds of Prefect tasks, however many array tasks there are.
"""

from collections.abc import Callable
from typing import Any, cast

from prefect import flow, task
from prefect.cache_policies import NO_CACHE
from prefect.futures import PrefectFuture
from prefect.task_runners import TaskRunner, ThreadPoolTaskRunner

from wsiflow.run import shards
from wsiflow.run.config import RunConfig
from wsiflow.run.results import finish

from . import reported
from .line import line

_TASK_RUNNER = cast("TaskRunner[PrefectFuture[Any]]", ThreadPoolTaskRunner(max_workers=shards.SIDE_BY_SIDE))


class SlidesFailedError(Exception):
    """A run ended without scores; its summary says why."""

    def __init__(self, summary: finish.Summary) -> None:
        """Make the summary's text the message, and keep the summary."""
        super().__init__(summary.text)
        self.summary = summary


@task(cache_policy=NO_CACHE, persist_result=False, retries=0)
def _shard(function: Callable[..., Any], *args: Any) -> Any:
    """Do the work of one shard; the executor retries what fails, and results are files."""
    return function(*args)


def _as_task(name: str, function: Callable[..., Any], *args: Any) -> Any:
    return _shard.with_options(name=name.split()[0], task_run_name=name).submit(function, *args)


@flow(
    name="wsiflow",
    flow_run_name="{config.name}",
    persist_result=False,
    validate_parameters=False,
    task_runner=_TASK_RUNNER,
)
def pipeline(config: RunConfig) -> finish.Summary:
    """Test a classifier on every slide of a data set.

    Raises:
        SlidesFailedError: Slides have no result, so that the flow shows as failed.
    """
    with reported.records():
        summary = line(config, _as_task, [reported.PageView(config.name)])
    if not summary.metrics:
        raise SlidesFailedError(summary)
    return summary
