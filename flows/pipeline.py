"""The whole line as a Prefect flow: cases, plan, then shards of slides through every stage, then the scores.

One Prefect task to ingest a shard and one to take it through the line: tens to hundreds however many array tasks there
are. Without Prefect (``orchestrator=none``) the same functions are called in the same order.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

from prefect import flow, task
from prefect.cache_policies import NO_CACHE
from prefect.futures import PrefectFuture
from prefect.task_runners import TaskRunner, ThreadPoolTaskRunner

from wsiflow import ingest, results, shards, terminal
from wsiflow.config import RunConfig
from wsiflow.executor import driver

from .cluster import workers

_TASK_RUNNER = cast("TaskRunner[PrefectFuture[Any]]", ThreadPoolTaskRunner(max_workers=shards.SIDE_BY_SIDE))

Submit = Callable[..., Any]
"""``submit(name, function, *args)`` starts a call and returns its future."""


def line(config: RunConfig, submit: Submit) -> results.Summary:
    """Run everything, with ``submit`` starting each shard's work, and note who does."""
    with driver.noted(config.out) as ended:
        summary = _line(config, submit)
        ended["exit_code"] = summary.exit_code
    return summary


def _line(config: RunConfig, submit: Submit) -> results.Summary:
    clock = results.Clock(config)
    cases = shards.begin(config)
    with workers(config.executor, config.out) as pool:
        told = shards.choose(pool, cases)
        if told:
            terminal.say(told)
        wanted = shards.cut(shards.case_sizes(cases), config.shard_slides)
        ingested = [submit(f"ingest {i}", shards.ingest_shard, pool, cases, part) for i, part in enumerate(wanted, 1)]
        plan_path = ingest.make_plan(cases, [outcome for future in ingested for outcome in future.result()])
        results.set_aside(plan_path)
        for told in (*shards.rejections(plan_path), *shards.doubles(plan_path)):
            terminal.say(told)
        slice_s = config.executor.slice_s
        if slice_s:
            shards.measure_costs(pool, plan_path)
        calibrated = shards.calibrate(pool, plan_path, slice_s)
        wanted = shards.cut(shards.slide_sizes(plan_path), config.shard_slides)
        futures = [
            submit(f"slides {i}", shards.line, pool, plan_path, part, slice_s) for i, part in enumerate(wanted, 1)
        ]
        progress = [calibrated, *(future.result() for future in futures)]
        for told in shards.advise(pool, plan_path):
            terminal.say(told)
    return results.finish(config, plan_path, progress, clock)


class SlidesFailedError(Exception):
    """A run that ended without scores; everything there is to say is in its summary."""

    def __init__(self, summary: results.Summary) -> None:
        """Keep the summary."""
        super().__init__(summary.text)
        self.summary = summary


@task(cache_policy=NO_CACHE, persist_result=False, retries=0)
def _shard(function: Callable[..., Any], *args: Any) -> Any:
    """Do one shard's work; retries are the executor's, and results are files."""
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
def pipeline(config: RunConfig) -> results.Summary:
    """Test a classifier on every slide of a data set.

    Raises:
        SlidesFailedError: Slides have no result, so that the flow shows as failed.
    """
    summary = line(config, _as_task)
    if not summary.metrics:
        raise SlidesFailedError(summary)
    return summary


def direct(config: RunConfig) -> results.Summary:
    """Run the same line without Prefect."""
    with ThreadPoolExecutor(shards.SIDE_BY_SIDE) as threads:

        def submit(_name: str, function: Callable[..., Any], *args: Any) -> Any:
            return threads.submit(function, *args)

        return line(config, submit)
