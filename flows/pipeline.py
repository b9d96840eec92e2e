"""The line as a Prefect flow.

Each step of the line is a Prefect task: two for each shard, one that ingests it and one that takes it from pixels to
detections. So there are tens to hundreds of Prefect tasks, however many array tasks there are. States tell how slides
ended: a task whose shard lost slides is shown as failed, although the run goes on without these slides.
"""

import contextvars
import logging
import threading
from collections.abc import Callable, Sequence
from functools import partial
from queue import SimpleQueue
from typing import Any, cast

import httpx
from prefect import flow, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import Parameter, RunInput, State, TaskRunResult
from prefect.context import FlowRunContext
from prefect.futures import PrefectFuture
from prefect.settings import PREFECT_API_URL
from prefect.states import Completed, Failed
from prefect.task_runners import TaskRunner, ThreadPoolTaskRunner

from wsiflow.errors import PARTIAL, Failure, WsiflowError
from wsiflow.run import shards
from wsiflow.run.config import RunConfig
from wsiflow.run.results.finish import Summary
from wsiflow.run.results.status import missing_slides
from wsiflow.system.machine import limit_threads

from . import artifacts, logs, reported, server, stopping
from .line import Step, direct, line

#: The task runner of every flow that calls `run_line`.
TASK_RUNNER = cast("TaskRunner[PrefectFuture[Any]]", ThreadPoolTaskRunner(max_workers=shards.SIDE_BY_SIDE))

_NAMED_FAILURES = 3  # in the message of a state
_LISTED_SLIDES = 100  # in the inputs of a task
_GRACE_S = 1.0  # in which a flow usually ends once its run has ended


class _StepFuture:
    """The result of a step, in whatever state its task has ended."""

    def __init__(self, future: PrefectFuture[Any], ended: list[Any]) -> None:
        self._future, self._ended = future, ended
        self.task_run_id = future.task_run_id

    def result(self) -> Any:
        """Wait for the task, and return what the step returned, or raise what it raised."""
        self._future.wait()
        if not self._ended:  # Prefect itself has ended the task
            return self._future.result()
        if isinstance(self._ended[0], Exception):
            raise self._ended[0]
        return self._ended[0]


class _Tasks:
    """The steps of a run as tasks of the flow run in whose context they are submitted.

    Attributes:
        failures: Why slides have no result, as far as the steps tell by now.
    """

    def __init__(self) -> None:
        self.failures: list[Failure] = []

    def submit(self, step: Step, function: Callable[..., Any], *args: Any) -> _StepFuture:
        """Start a step as a task."""
        ended: list[Any] = []

        # The names of these parameters are what the page of the task shows, with `_inputs` as their values.
        @task(name=step.name, task_run_name=step.title, cache_policy=NO_CACHE, persist_result=False, retries=0)
        def body(after: None, slides: None, stages: None) -> State[Any]:  # noqa: ARG001
            try:
                ended.append(function(*args))
            except WsiflowError as error:  # its message is enough: Prefect would log a traceback
                ended.append(error)
                return Failed(message=str(error))
            return self._state(step, ended[0])

        context = FlowRunContext.get()
        if context is None:
            raise RuntimeError("a step was submitted outside of a flow run")
        parameters = dict.fromkeys(("after", "slides", "stages"))
        future = context.task_runner.submit(body, parameters, dependencies=_inputs(step))
        return _StepFuture(future, ended)

    def _state(self, step: Step, result: Any) -> State[Any]:
        if isinstance(result, Summary):  # of the last step, which ends as the run does
            return state_of(result)
        failures = step.failures(result)
        self.failures.extend(failures)
        if not failures:
            return Completed()
        return Failed(message=_describe(len(failures), len(step.slides), [str(one) for one in failures]))


def _inputs(step: Step) -> dict[str, set[RunInput]]:
    """Return what a task shows as its inputs; those after which it runs are its arrows in the flow's graph."""
    after: set[RunInput] = {TaskRunResult(id=one.task_run_id) for one in step.after if isinstance(one, _StepFuture)}
    listed = [*step.slides[:_LISTED_SLIDES]]
    if len(step.slides) > _LISTED_SLIDES:
        listed.append(f"and {len(step.slides) - _LISTED_SLIDES} more")
    shown = {"slides": ", ".join(listed), "stages": ", ".join(step.stages)}
    return {"after": after} | {name: {Parameter(name=text)} if text else set() for name, text in shown.items()}


def _describe(n_missing: int, n_slides: int, reasons: Sequence[str]) -> str:
    """Return the message of a state: how many slides have no result, and why the first of them have none."""
    more = [f"and {len(reasons) - _NAMED_FAILURES} more"] if len(reasons) > _NAMED_FAILURES else []
    return f"{n_missing} of {n_slides} slides failed: {' | '.join([*reasons[:_NAMED_FAILURES], *more])}"


def state_of(summary: Summary) -> State[Any]:
    """Return the state that says how a run ended: ``Completed``, ``Partial``, which is a kind of it, or ``Failed``."""
    missing = missing_slides(summary.statuses)
    message = _describe(len(missing), len(summary.statuses), [one.reason for one in missing]) if missing else ""
    if not summary.metrics:
        return Failed(message=message or summary.text)
    scores = artifacts.scores_line(summary.metrics)
    if summary.exit_code == PARTIAL:
        return Completed(name="Partial", message=f"{message}; without them: {scores}")
    return Completed(message=scores)


def run_line(config: RunConfig, report: Callable[[Summary], None] = lambda _summary: None) -> Summary:
    """Run the line with its steps as tasks of the present flow run, and show on its page what came of it.

    Args:
        config: The configuration.
        report: Called with the summary before it is shown on the page.
    """
    limit_threads(config.executor.threads)
    tasks = _Tasks()
    with reported.records(), reported.cancelled_at_stop():
        reported.tag(config)
        summary = line(config, tasks.submit, [reported.PageView(config)])
        report(summary)
        artifacts.show_result(config, summary, tasks.failures)
    return summary


def as_flow(config: RunConfig, name: str, report: Callable[[Summary | Exception], None] | None = None) -> Summary:
    """Run the line as a flow run.

    Args:
        config: The configuration.
        name: Name of the flow run.
        report: Called with the summary, or with the error of the line, before Prefect learns of it.

    Raises:
        Exception: Whatever the line raises.
    """
    ended: list[Summary | Exception] = []

    def tell(result: Summary | Exception) -> None:
        ended.append(result)
        if report:
            report(result)

    @flow(
        name="wsiflow run",
        flow_run_name=lambda: name,
        persist_result=False,
        validate_parameters=False,
        task_runner=TASK_RUNNER,
    )
    def body(config: RunConfig) -> State[Any]:
        """Test a classifier on every slide of a data set."""
        try:
            return state_of(run_line(config, tell))
        except WsiflowError as error:
            tell(error)
            return Failed(message=str(error))
        except Exception as error:
            tell(error)
            raise

    state = body(config, return_state=True)
    if not ended:
        state.result()
        raise RuntimeError(f"the flow run ended in the state {state.name} before the line began")
    if isinstance(ended[0], Exception):
        raise ended[0]
    return ended[0]


def as_flow_or_without(config: RunConfig, name: str) -> Summary:
    """Run the line as a flow run, and return its summary even where the server is lost meanwhile.

    The flow runs in a thread: Prefect asks a server that is gone again and again, for minutes, and a run does not need
    the answers.
    """
    heard: SimpleQueue[Summary | BaseException] = SimpleQueue()
    began = threading.Event()

    def report(result: Summary | Exception) -> None:
        began.set()
        heard.put(result)

    def body() -> None:
        try:
            as_flow(config, name, report)
        except BaseException as error:  # noqa: BLE001 - raised again in the calling thread; some of Prefect are no Exception
            heard.put(error)

    thread = threading.Thread(target=partial(contextvars.copy_context().run, body), name="flow", daemon=True)
    thread.start()
    result = heard.get()
    url = PREFECT_API_URL.value() or ""
    if isinstance(result, httpx.HTTPError) and not began.is_set():
        logs.note(f"the Prefect server at {url} does not take the run, which goes on without it", logging.WARNING)
        return direct(config)
    if _is_lost(thread, url):
        logs.note(f"the Prefect server at {url} no longer answers: the run's page ends early, the run does not")
        stopping.abandon_threads()
    if isinstance(result, BaseException):
        raise result
    return result


def _is_lost(thread: threading.Thread, url: str) -> bool:
    """Wait until the flow has ended, or its server is lost; a server that is slow is waited for."""
    while thread.is_alive():
        thread.join(_GRACE_S)
        if thread.is_alive() and server.is_lost(url):
            return True
    return False
