"""Run the whole line: cases, plan, then shards of slides through every stage, then the scores.

The caller passes the function that starts a step: it uses threads in `direct`, Prefect's tasks in `pipeline`.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from wsiflow.errors import Failure
from wsiflow.run import first_pass, intake, shards
from wsiflow.run.config import RunConfig
from wsiflow.run.executor import driver
from wsiflow.run.executor.params import ExecutorParams, cores_here
from wsiflow.run.executor.protocol import Executor, Outcome, Slice, Work
from wsiflow.run.results import finish, record
from wsiflow.run.stages import ingest
from wsiflow.run.stages.line import STAGES
from wsiflow.system.machine import allocated_cores

from . import logs, progress
from .cluster import workers

_FIRST = "first pass: "  # before the names of steps

Check = Callable[[Path], Mapping[str, Failure]]
"""``check(cases)`` returns what is wrong with the slides of a run by slide id, see `intake.find_faults`."""

Pool = Callable[[ExecutorParams, Path], AbstractContextManager[Executor]]
"""``pool(params, root)`` yields the executor of the run in a folder."""


def _no_failures(_result: Any) -> Sequence[Failure]:
    return ()


class Step(NamedTuple):
    """A part of the line that is started by itself, as an orchestrator shows it.

    Attributes:
        name: What it does, in one word.
        slides: Ids of the slides that it works on; empty where it concerns the whole run.
        stages: Names of the stages that it does.
        after: Futures of the steps whose results it needs.
        failures: Returns why slides have no result, by what the step returned.
    """

    name: str
    slides: Sequence[str] = ()
    stages: Sequence[str] = ()
    after: Sequence["StepFuture"] = ()
    failures: Callable[[Any], Sequence[Failure]] = _no_failures

    @property
    def title(self) -> str:
        """The name of the step with those of its first slides."""
        return f"{self.name} {shards.label(self.slides)}".rstrip()


class StepFuture(Protocol):
    """The result of a step, as soon as there is one."""

    def result(self) -> Any:
        """Wait for the step, and return what it returned, or raise what it raised."""
        ...


Submit = Callable[..., StepFuture]
"""``submit(step, function, *args)`` starts a step, which calls a function, and returns its future."""


def line(config: RunConfig, submit: Submit, views: Sequence[progress.View] = ()) -> finish.Summary:
    """Run the whole line, and record in the run's folder which process does so.

    Args:
        config: The configuration.
        submit: Starts a step, and returns its future.
        views: Where the progress is shown besides the user's terminal.
    """
    cores = cores_here(config.executor, cores=allocated_cores())
    with driver.recorded(config.out, cores=cores) as ended, progress.shown(config.out, views), _tracked(config):
        summary = _line(config, submit, workers, logs.note)
        ended["exit_code"] = summary.exit_code
        _track_end(config, summary)
    return summary


@contextmanager
def _tracked(config: RunConfig) -> Iterator[None]:
    """Record a run that ends with an error as failed."""
    try:
        yield
    except _WorkLeftError:
        raise  # the run that does the work goes on with the record
    except Exception as error:
        record.fail(config, str(error))
        raise


def _track_end(config: RunConfig, summary: finish.Summary) -> None:
    """Record a run that ends without scores as failed."""
    if not summary.metrics:
        record.fail(config, summary.text)


def finished(config: RunConfig) -> finish.Summary | None:
    """Return the summary of a run in which nothing is left to do, else None.

    The check goes through the whole line, but needs neither workers nor an orchestrator.
    """
    notes: list[tuple[str, int]] = []
    try:
        with _tracked(config):
            summary = _line(config, _at_once, _no_workers, lambda *note: notes.append(note), _nothing_to_check)
    except _WorkLeftError:
        return None  # the run that does the work logs all notes again
    _track_end(config, summary)
    for note in notes:
        logs.note(*note)
    return summary


def _line(
    config: RunConfig, submit: Submit, pool_of: Pool, note: shards.Note, check: Check = intake.find_faults
) -> finish.Summary:
    clock = finish.Clock(config)
    cases = shards.begin(config, note)
    record.begin(config)
    with pool_of(config.executor, config.out) as pool:
        chosen = submit(Step("choose engine", stages=["choose"]), shards.choose, pool, cases)
        if choice := chosen.result():
            note(choice, logging.INFO)
        faults = check(cases)
        for fault in (*intake.describe_faults(cases, faults), *intake.describe_shared_truth(cases)):
            note(fault, logging.WARNING)
        first = _first_pass(config, submit, pool, cases, note) if config.inference.cascade.is_on else []
        planned = _plan(config, submit, pool, cases, [chosen])
        plan_path = planned.result()
        finish.set_aside(plan_path)
        rejections = intake.describe_rejections(plan_path, faults)
        for warning in (*rejections, *intake.describe_usable(cases, plan_path)):
            note(warning, logging.WARNING)
        slice_s = config.executor.slice_s
        if slice_s:
            shards.measure_costs(pool, plan_path)
        calibrated = shards.calibrate(pool, plan_path, slice_s)
        futures = _predict(config, submit, pool, plan_path, planned)
        ended = [calibrated, *(future.result() for future in futures)]
        for advice in shards.advise(pool, plan_path):
            note(advice, logging.WARNING)
    summary: finish.Summary = submit(
        Step("score", after=futures), finish.finish, config, plan_path, ended, clock, first
    ).result()
    return summary


def _first_pass(
    config: RunConfig, submit: Submit, pool: Executor, cases: Path, note: shards.Note
) -> list[shards.Progress]:
    """Take the slides through the first pass of a cascade, and return how its tasks ended.

    All slides go through it before the run is planned: where the run's own pass looks follows from its scores. Before
    that the threshold is chosen where the configuration says ``auto``.
    """
    planned = _plan_first(config, submit, pool, shards.begin_first_pass(cases))
    if config.inference.cascade.threshold == "auto":
        developed = _plan_first(config, submit, pool, shards.begin_development(cases))
        if not shards.has_threshold(planned.result(), developed.result()):
            ended = _predict_first(config, submit, pool, developed)
            shards.choose_threshold(pool, developed.result(), ended)
        note(shards.describe_threshold(cases), logging.INFO)
    return _predict_first(config, submit, pool, planned)


def _plan_first(config: RunConfig, submit: Submit, pool: Executor, first: Path) -> StepFuture:
    """Start the steps that make the plan of a first pass."""
    choice = submit(Step(f"{_FIRST}choose engine", stages=["choose"]), shards.choose, pool, first)
    choice.result()
    return _plan(config, submit, pool, first, [choice], _FIRST)


def _predict_first(config: RunConfig, submit: Submit, pool: Executor, planned: StepFuture) -> list[shards.Progress]:
    """Take the slides of a plan through the stages of a first pass, and return how its tasks ended."""
    plan_path = planned.result()
    calibrated = shards.calibrate(pool, plan_path, config.executor.slice_s)
    futures = _predict(config, submit, pool, plan_path, planned, first_pass.STAGES)
    return [calibrated, *(future.result() for future in futures)]


def _plan(
    config: RunConfig, submit: Submit, pool: Executor, cases: Path, after: Sequence[StepFuture], which: str = ""
) -> StepFuture:
    """Start the steps that ingest the shards, wait for them, and start the one that makes the plan."""
    futures = []
    for part in shards.cut(shards.case_sizes(cases), config.shard_slides):
        slides, failures = shards.listed_slides(cases, part), partial(shards.rejections, cases)
        step = Step(f"{which}ingest", slides, ["ingest"], after, failures)
        futures.append(submit(step, shards.ingest_shard, pool, cases, part))
    outcomes = [outcome for future in futures for outcome in future.result()]
    return submit(Step(f"{which}plan", after=futures), ingest.make_plan, cases, outcomes)


def _predict(
    config: RunConfig,
    submit: Submit,
    pool: Executor,
    plan_path: Path,
    planned: StepFuture,
    stages: Sequence[str] = (),
) -> list[StepFuture]:
    """Start the steps that take the shards from pixels to detections; ``stages`` are those of a first pass."""
    futures, which = [], _FIRST if stages else ""
    for part in shards.cut(shards.slide_sizes(plan_path), config.shard_slides):
        slides, failures = shards.planned_slides(plan_path, part), partial(shards.given_up, plan_path)
        step = Step(f"{which}predict", slides, list(stages or STAGES), [planned], failures)
        futures.append(submit(step, shards.line, pool, plan_path, part, config.executor.slice_s, stages))
    return futures


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


def _nothing_to_check(cases: Path) -> Mapping[str, Failure]:
    """Return no fault where all slides are ingested, as they have passed the check."""
    if intake.not_ingested(cases):
        raise _WorkLeftError("ingest")
    return {}


def _at_once(_step: Step, function: Callable[..., Any], *args: Any) -> Future[Any]:
    """Call a function now, and return its future; its exceptions are raised here."""
    done: Future[Any] = Future()
    done.set_result(function(*args))
    return done


def direct(config: RunConfig) -> finish.Summary:
    """Run the same line without Prefect."""
    with ThreadPoolExecutor(shards.SIDE_BY_SIDE) as threads:

        def submit(_step: Step, function: Callable[..., Any], *args: Any) -> Any:
            return threads.submit(function, *args)

        return line(config, submit)
