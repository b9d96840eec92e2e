"""The flows that Prefect deployments start: one for each use, each with a form from `flows.forms`.

A filled form becomes the overrides of the command line. When a flow is cancelled or crashes, its array jobs are
cancelled by what the run's folder records, since the process that submitted them has ended by then.
"""

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from prefect import Flow, flow
from prefect.artifacts import create_markdown_artifact
from prefect.client.schemas.objects import FlowRun, State
from prefect.logging.loggers import flow_run_logger
from prefect.states import Completed, Failed

from wsiflow.analysis.tradeoff import comparison, rows
from wsiflow.errors import PARTIAL, InputError, WsiflowError
from wsiflow.evaluation.evaluate import Existing, evaluate_existing
from wsiflow.redaction import without_secrets
from wsiflow.run.config import RunConfig
from wsiflow.run.results.finish import Summary

from . import artifacts, comparing, forms, logs, reported, trial
from .compose import compose_config, trials
from .pipeline import TASK_RUNNER, as_flow, run_line, state_of


def cancel_arrays(flow: Flow[..., Any], flow_run: FlowRun, state: State[Any]) -> None:
    """Cancel the array jobs that a flow run left behind, as the folders of its runs record them."""
    form: type[forms.Form] = flow.fn.__annotations__["request"]
    logger = flow_run_logger(flow_run, flow)
    for root in _roots(form.model_validate(flow_run.parameters["request"])):
        for sentence in _cancel(root):
            logger.info("%s: %s: %s", state.name, root, sentence)


def _cancel(root: Path) -> list[str]:
    """Cancel a run's array jobs, and return what was done, or why it failed; other runs follow."""
    from wsiflow.run.executor import jobs

    try:
        return jobs.cancel(root)
    except WsiflowError as error:
        return [str(error)]


def _roots(form: forms.Form) -> Iterator[Path]:
    """Yield the folders of a form's runs."""
    return (config.out for config in _configs(form))


def _configs(form: forms.Form) -> Iterator[RunConfig]:
    """Yield the configurations of a form's runs, without those that are refused: these have started nothing."""
    for name, job in trials(form.to_overrides()).items():
        with suppress(InputError):
            yield compose_config(job.overrides, job=name)


_RUNS: Any = {
    "flow_run_name": "{request.name}",
    "persist_result": False,
    "task_runner": TASK_RUNNER,
    "on_cancellation": [cancel_arrays],
    "on_crashed": [cancel_arrays],
}


@flow(name="wsiflow demo", **_RUNS)
def demo(request: forms.Demo) -> State[Any]:
    """Test the model that ships with wsiflow on synthetic slides with known lesions.

    The state is ``Failed``, with the reasons as its message, where slides have no result or the form is out of bounds.
    """
    return _ended(lambda: state_of(run_line(compose_config(request.to_overrides()))))


@flow(name="wsiflow run", **_RUNS)
def run(request: forms.Run) -> State[Any]:
    """Test a classifier on every slide of a data set.

    The state is ``Failed``, with the reasons as its message, where slides have no result or the form is out of bounds;
    ``Partial``, which is a kind of ``Completed``, where the form allows that.
    """
    return _ended(lambda: state_of(run_line(compose_config(request.to_overrides()))))


@flow(name="wsiflow sweep", **_RUNS)
def sweep(request: forms.Sweep) -> State[Any]:
    """Run every combination of the listed values, one after another; one that fails does not stop the others.

    The state is ``Failed`` where a combination has no scores; the message names it and the reason.
    """
    with reported.records():
        return _ended(lambda: _sweep(request))


@flow(name="wsiflow evaluate", flow_run_name="{request.out}", persist_result=False)
def evaluate(request: forms.Evaluate) -> State[Any]:
    """Score detections that lie on the disk: FROC (official and strict) and slide AUC.

    The state is ``Failed``, with the reason as its message, where the form is out of bounds or a file cannot be used.
    """
    return _ended(lambda: _evaluate(request))


@flow(name="wsiflow compare", flow_run_name="{request.out}", persist_result=False)
def compare(request: forms.Compare) -> State[Any]:
    """Compare the runs of a sweep; the message of the state names the Pareto set.

    The state is ``Failed``, with the reason as its message, where the form is out of bounds or the runs must not be
    compared.
    """
    return _ended(lambda: _compare(request))


def _ended(run: Callable[[], State[Any]]) -> State[Any]:
    """Return the state in which a flow ended; errors with a message of their own need no traceback."""
    try:
        return run()
    except WsiflowError as error:
        return Failed(message=str(error))


def _evaluate(request: forms.Evaluate) -> State[Any]:
    config = compose_config(request.to_overrides())
    existing = Existing(
        Path(request.manifest),
        Path(request.detections),
        Path(request.scores) if request.scores else None,
        request.mask_downsample,
        request.unit,
    )
    out = Path(request.out)
    scores = evaluate_existing(existing, config.evaluation, seed=config.seed, out=out)
    for sentence in scores.remarks:
        logs.note(sentence, logging.WARNING)
    artifacts.show_scores(out, scores.metrics)
    return Completed(message=artifacts.scores_line(scores.metrics))


def _compare(request: forms.Compare) -> State[Any]:
    config = compose_config(request.to_overrides())
    options = rows.Options(request.reference, config.evaluation.bootstrap, config.seed)
    folders = [Path(folder) for folder in request.folders]
    params = None if folders else config.tracking
    result = comparison.run_comparison(comparison.Request(folders, params, options), Path(request.out))
    comparing.create_artifacts(result)
    return Completed(message=f"Pareto set: {', '.join(row.name for row in result.tradeoff.pareto)}")


def _sweep(request: forms.Sweep) -> State[Any]:
    reported.add_tags(sweep=request.name)
    jobs = trials(request.to_overrides())
    summaries = {}
    for number, (name, job) in enumerate(jobs.items(), 1):
        title = trial.trial_title(number, len(jobs), name or request.name)
        summaries[name or request.name] = summary = _trial(job, name, title)
        logs.note(f"{title}: {_how_it_ended(summary)}, {_result(summary)}")
    folder = next((config.out.parent for config in _configs(request)), Path(request.name))
    failed = {name: " ".join(summary.text.split()) for name, summary in summaries.items() if not summary.metrics}
    rows = [_row(name, summary) for name, summary in summaries.items()]
    text = f"# Sweep {request.name}\n\n{len(jobs) - len(failed)} of {len(jobs)} trials have scores.\n\n"
    create_markdown_artifact(
        text + artifacts.table(rows) + "\n",
        key=artifacts.key_of(request.name, folder, "sweep"),
        description=f"Sweep {request.name}",
    )
    if "" not in jobs:  # a single run is in the folder of its name, beside others
        _compare_trials(request, failed)
    if failed:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in failed.items())
        return Failed(message=f"{len(failed)} of {len(jobs)} trials failed: {reasons}")
    partial = [name for name, summary in summaries.items() if summary.exit_code == PARTIAL]
    if partial:
        return Completed(name="Partial", message=f"slides are missing in {len(partial)} of {len(jobs)} trials")
    return Completed(message=f"{len(jobs)} trials")


def _row(name: str, summary: Summary) -> dict[str, str]:
    """Return the row of a trial in the table of its sweep."""
    return {"trial": name, "ended": _how_it_ended(summary), "scores, or why there are none": _result(summary)}


def _how_it_ended(summary: Summary) -> str:
    return {0: "complete", PARTIAL: "partial"}.get(summary.exit_code, f"failed ({summary.exit_code})")


def _result(summary: Summary) -> str:
    return artifacts.scores_line(summary.metrics) if summary.metrics else summary.text


def _trial(job: trial.TrialOverrides, name: str, title: str) -> Summary:
    """Run one combination of a sweep, and return its summary even where it fails."""
    try:
        config = compose_config(job.overrides, job=name)
        if name:
            trial.claim(config.out, job.swept)
    except WsiflowError as error:
        return _refused(error, title)
    try:
        return as_flow(config, title)
    except Exception as error:  # noqa: BLE001 - the other trials go on, and the flow run of this one has its traceback
        return _summary_of(error)


def _refused(error: WsiflowError, title: str) -> Summary:
    """Show a trial whose settings are refused as a flow run, too, and return its summary."""

    @flow(name="wsiflow run", flow_run_name=lambda: title, persist_result=False)
    def refuse() -> State[Any]:
        return Failed(message=str(error))

    refuse(return_state=True)
    return _summary_of(error)


def _summary_of(error: Exception) -> Summary:
    """Return the summary of a run that ended with an error."""
    message = str(error) if isinstance(error, WsiflowError) else f"{type(error).__name__}: {error}"
    return Summary(getattr(error, "exit_code", WsiflowError.exit_code), {}, without_secrets(message))


def _compare_trials(request: forms.Sweep, failed: Mapping[str, str]) -> None:
    """Compare the trials that have scores, and show the result, or why they were not compared."""
    config = next(_configs(request), None)
    if config is None:
        return
    try:
        options = rows.Options(resamples=config.evaluation.bootstrap, seed=config.seed)
        result = comparison.compare_sweep_folder(config.out.parent, config.tracking, options, failed)
    except WsiflowError as error:
        key = artifacts.key_of(request.name, config.out.parent, "comparison")
        create_markdown_artifact(f"Not compared: {error}\n", key=key, description=request.name)
        comparison.describe_sweep(config.out.parent, config.tracking, str(error), failed)
        return
    if result is not None:
        comparing.create_artifacts(result)
    else:
        comparison.describe_sweep(config.out.parent, config.tracking, "fewer than two of them have scores", failed)
