"""Run the whole line: cases, plan, then shards of slides through every stage, then the scores.

The caller passes the function that starts a shard's work: it uses threads in `direct`, Prefect's tasks in `pipeline`.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from wsiflow.run import shards
from wsiflow.run.config import RunConfig
from wsiflow.run.executor import driver
from wsiflow.run.executor.params import ExecutorParams
from wsiflow.run.executor.protocol import Executor, Outcome, Slice, Work
from wsiflow.run.results import finish, record
from wsiflow.run.stages import ingest

from . import logs, progress
from .cluster import workers

Pool = Callable[[ExecutorParams, Path], AbstractContextManager[Executor]]
"""``pool(params, root)`` yields the executor of the run in a folder."""

Submit = Callable[..., Any]
"""``submit(name, function, *args)`` starts a call and returns its future."""

Note = Callable[[str, int], None]
"""``note(text, level)`` logs a note for the user, see `flows.logs.note`."""


def line(config: RunConfig, submit: Submit, views: Sequence[progress.View] = ()) -> finish.Summary:
    """Run the whole line, and record in the run's folder which process does so.

    Args:
        config: The configuration.
        submit: Starts the work of a shard, and returns its future.
        views: Where the progress is shown besides the user's terminal.
    """
    with driver.recorded(config.out) as ended, progress.shown(config.out, views), _tracked(config):
        summary = _line(config, submit, workers, logs.note)
        ended["exit_code"] = summary.exit_code
        if not summary.metrics:
            record.fail(config, summary.text)
    return summary


@contextmanager
def _tracked(config: RunConfig) -> Iterator[None]:
    """Record a run that ends with an error as failed."""
    try:
        yield
    except Exception as error:
        record.fail(config, str(error))
        raise


def finished(config: RunConfig) -> finish.Summary | None:
    """Return the summary of a run in which nothing is left to do, else None.

    The check goes through the whole line, but needs neither workers nor an orchestrator.
    """
    notes: list[tuple[str, int]] = []
    try:
        summary = _line(config, _at_once, _no_workers, lambda *note: notes.append(note))
    except _WorkLeftError:
        return None  # the run that does the work logs all notes again
    for note in notes:
        logs.note(*note)
    return summary


def _line(config: RunConfig, submit: Submit, pool_of: Pool, note: Note) -> finish.Summary:
    clock = finish.Clock(config)
    cases = shards.begin(config)
    record.begin(config)
    with pool_of(config.executor, config.out) as pool:
        if choice := shards.choose(pool, cases):
            note(choice, logging.INFO)
        parts = shards.cut(shards.case_sizes(cases), config.shard_slides)
        ingested = [submit(f"ingest {i}", shards.ingest_shard, pool, cases, part) for i, part in enumerate(parts, 1)]
        plan_path = ingest.make_plan(cases, [outcome for future in ingested for outcome in future.result()])
        finish.set_aside(plan_path)
        for warning in (*shards.describe_rejections(plan_path), *shards.describe_duplicates(plan_path)):
            note(warning, logging.WARNING)
        slice_s = config.executor.slice_s
        if slice_s:
            shards.measure_costs(pool, plan_path)
        calibrated = shards.calibrate(pool, plan_path, slice_s)
        parts = shards.cut(shards.slide_sizes(plan_path), config.shard_slides)
        futures = [
            submit(f"slides {i}", shards.line, pool, plan_path, part, slice_s) for i, part in enumerate(parts, 1)
        ]
        ended = [calibrated, *(future.result() for future in futures)]
        for advice in shards.advise(pool, plan_path):
            note(advice, logging.WARNING)
    return finish.finish(config, plan_path, ended, clock)


class _WorkLeftError(Exception):
    """Some work of the run is left to do."""


class _NoWorkers:
    """An executor that does nothing, and raises an error where there is work."""

    def run(self, work: Work, source: Path, stage: str, slices: Sequence[Slice]) -> Iterator[Outcome]:  # noqa: ARG002
        """Return no outcome, for no slices."""
        if slices:
            raise _WorkLeftError(stage)
        return iter(())

    def stop(self) -> None:
        """Nothing runs."""


@contextmanager
def _no_workers(_params: ExecutorParams, _root: Path) -> Iterator[Executor]:
    yield _NoWorkers()


def _at_once(_name: str, function: Callable[..., Any], *args: Any) -> Future[Any]:
    """Call a function now, and return its future; its exceptions are raised here."""
    done: Future[Any] = Future()
    done.set_result(function(*args))
    return done


def direct(config: RunConfig) -> finish.Summary:
    """Run the same line without Prefect."""
    with ThreadPoolExecutor(shards.SIDE_BY_SIDE) as threads:

        def submit(_name: str, function: Callable[..., Any], *args: Any) -> Any:
            return threads.submit(function, *args)

        return line(config, submit)
