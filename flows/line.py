"""The whole line: cases, plan, then shards of slides through every stage, then the scores.

Who starts a shard's work is handed in: threads here, Prefect's tasks in `pipeline`.
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
from wsiflow.run.results import finish
from wsiflow.run.stages import ingest

from . import logs, progress
from .cluster import workers

Pool = Callable[[ExecutorParams, Path], AbstractContextManager[Executor]]
"""``pool(params, root)`` gives the executor of the run in a folder."""

Submit = Callable[..., Any]
"""``submit(name, function, *args)`` starts a call and returns its future."""

Note = Callable[[str, int], None]
"""``note(text, level)`` says something on the way, see `flows.logs.note`."""


def line(config: RunConfig, submit: Submit, views: Sequence[progress.View] = ()) -> finish.Summary:
    """Run everything, with ``submit`` starting each shard's work, and note who does.

    Args:
        config: The configuration.
        submit: Starts a call.
        views: Who is shown the progress besides the user.
    """
    with driver.recorded(config.out) as ended, progress.shown(config.out, views):
        summary = _line(config, submit, workers, logs.note)
        ended["exit_code"] = summary.exit_code
    return summary


def finished(config: RunConfig) -> finish.Summary | None:
    """Look through a run once more, and return what it ends with where there is nothing left to do; else None.

    It takes neither workers nor an orchestrator to see that.
    """
    notes: list[tuple[str, int]] = []
    try:
        summary = _line(config, _at_once, _nobody, lambda *note: notes.append(note))
    except _WorkLeftError:
        return None  # whoever does it says all of that again
    for note in notes:
        logs.note(*note)
    return summary


def _line(config: RunConfig, submit: Submit, pool_of: Pool, note: Note) -> finish.Summary:
    clock = finish.Clock(config)
    cases = shards.begin(config)
    with pool_of(config.executor, config.out) as pool:
        if choice := shards.choose(pool, cases):
            note(choice, logging.INFO)
        wanted = shards.cut(shards.case_sizes(cases), config.shard_slides)
        ingested = [submit(f"ingest {i}", shards.ingest_shard, pool, cases, part) for i, part in enumerate(wanted, 1)]
        plan_path = ingest.make_plan(cases, [outcome for future in ingested for outcome in future.result()])
        finish.set_aside(plan_path)
        for warning in (*shards.describe_rejections(plan_path), *shards.describe_duplicates(plan_path)):
            note(warning, logging.WARNING)
        slice_s = config.executor.slice_s
        if slice_s:
            shards.measure_costs(pool, plan_path)
        calibrated = shards.calibrate(pool, plan_path, slice_s)
        wanted = shards.cut(shards.slide_sizes(plan_path), config.shard_slides)
        futures = [
            submit(f"slides {i}", shards.line, pool, plan_path, part, slice_s) for i, part in enumerate(wanted, 1)
        ]
        ended = [calibrated, *(future.result() for future in futures)]
        for advice in shards.advise(pool, plan_path):
            note(advice, logging.WARNING)
    return finish.finish(config, plan_path, ended, clock)


class _WorkLeftError(Exception):
    """There is something to do."""


class _Nobody:
    """The executor that does nothing and says so."""

    def run(self, work: Work, source: Path, stage: str, slices: Sequence[Slice]) -> Iterator[Outcome]:  # noqa: ARG002
        """Return no outcome, for no slices."""
        if slices:
            raise _WorkLeftError(stage)
        return iter(())

    def stop(self) -> None:
        """Nothing runs."""


@contextmanager
def _nobody(_params: ExecutorParams, _root: Path) -> Iterator[Executor]:
    yield _Nobody()


def _at_once(_name: str, function: Callable[..., Any], *args: Any) -> Future[Any]:
    """Call a function now; what it raises ends the line here."""
    done: Future[Any] = Future()
    done.set_result(function(*args))
    return done


def direct(config: RunConfig) -> finish.Summary:
    """Run the same line without Prefect."""
    with ThreadPoolExecutor(shards.SIDE_BY_SIDE) as threads:

        def submit(_name: str, function: Callable[..., Any], *args: Any) -> Any:
            return threads.submit(function, *args)

        return line(config, submit)
