"""The flows that Prefect deployments start: one for each use, each with a form from `flows.forms`.

A filled form becomes the overrides of the command line. When a flow is cancelled or crashes, its array jobs are
cancelled by what the run's folder records, since the process that submitted them has ended by then.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from prefect import Flow, flow
from prefect.artifacts import create_markdown_artifact, create_table_artifact
from prefect.client.schemas.objects import FlowRun, State
from prefect.logging.loggers import flow_run_logger

from wsiflow.analysis.tradeoff import comparison
from wsiflow.errors import InputError, WsiflowError
from wsiflow.evaluation.evaluate import Existing, evaluate_existing
from wsiflow.run.config import RunConfig
from wsiflow.run.results.finish import Summary

from . import comparing, forms
from . import sweep as sweeps
from .compose import compose_config, trials
from .pipeline import SlidesFailedError
from .run import as_flow

# What a run is judged by at a glance; summary.json has every number.
_MAIN_NUMBERS = ("froc.score", "froc.strict_score", "roc.auc", "throughput.tiles_per_s", "throughput.core_hours")


class TrialsFailedError(Exception):
    """Some runs of a sweep have no scores; the others are finished."""


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
    "on_cancellation": [cancel_arrays],
    "on_crashed": [cancel_arrays],
}


@flow(name="wsiflow demo", **_RUNS)
def demo(request: forms.Demo) -> dict[str, float]:
    """Test the model that ships with wsiflow on synthetic slides with known lesions.

    Raises:
        InputError: A value of the form is out of bounds.
        SlidesFailedError: Slides have no result; the message lists them.
    """
    return _run(compose_config(request.to_overrides()))


@flow(name="wsiflow run", **_RUNS)
def run(request: forms.Run) -> dict[str, float]:
    """Test a classifier on every slide of a data set.

    Raises:
        InputError: A value of the form is out of bounds.
        SlidesFailedError: Slides have no result; the message lists them.
    """
    return _run(compose_config(request.to_overrides()))


@flow(name="wsiflow sweep", **_RUNS)
def sweep(request: forms.Sweep) -> dict[str, dict[str, float]]:
    """Run every combination of the listed values, one after another; one that fails does not stop the others.

    Raises:
        InputError: An override cannot be parsed.
        TrialsFailedError: A run has no scores; the message names it and the reason.
    """
    summaries = {name: _trial(job, name) for name, job in trials(request.to_overrides()).items()}
    create_table_artifact(
        [
            {"run": job, "exit code": summary.exit_code, **_main_numbers(summary.metrics)}
            for job, summary in summaries.items()
        ],
        key="wsiflow-sweep",
        description=f"Sweep {request.name}",
    )
    _compare_trials(request, [job for job, summary in summaries.items() if not summary.metrics])
    failed = [f"{job}: {summary.text}" for job, summary in summaries.items() if not summary.metrics]
    if failed:
        raise TrialsFailedError("; ".join(failed))
    return {job: summary.metrics for job, summary in summaries.items()}


@flow(name="wsiflow evaluate", flow_run_name="{request.out}", persist_result=False)
def evaluate(request: forms.Evaluate) -> dict[str, float]:
    """Score detections that lie on the disk: FROC (official and strict) and slide AUC.

    Raises:
        InputError: A value of the form is out of bounds, or a file cannot be used.
    """
    config = compose_config(request.to_overrides())
    existing = Existing(
        Path(request.manifest),
        Path(request.detections),
        Path(request.scores) if request.scores else None,
        request.mask_downsample,
    )
    out = Path(request.out)
    metrics = evaluate_existing(existing, config.evaluation, seed=config.seed, out=out).metrics
    _show_on_page("evaluation", metrics, f"Scores and curves: `{out.resolve()}`")
    return metrics


@flow(name="wsiflow compare", flow_run_name="{request.out}", persist_result=False)
def compare(request: forms.Compare) -> list[str]:
    """Compare the runs of a sweep, and return its Pareto set.

    Raises:
        InputError: A value of the form is out of bounds, or runs must not be compared.
    """
    config = compose_config(request.to_overrides())
    options = comparison.Options(request.reference, config.evaluation.bootstrap, config.seed)
    folders = [Path(folder) for folder in request.folders]
    params = None if folders else config.tracking
    result = comparison.run_comparison(comparison.Request(folders, params, options), Path(request.out))
    comparing.create_artifacts(result)
    return [row.name for row in result.tradeoff.pareto]


def _run(config: RunConfig) -> dict[str, float]:
    """Run the line as a flow of its own, and show its numbers and its folder on the page of this flow run."""
    summary = as_flow(config, config.name)
    _show_on_page(config.name, summary.metrics, f"```\n{summary.text}\n```\n\nFolder: `{config.out.resolve()}`")
    if not summary.metrics:
        raise SlidesFailedError(summary)
    return summary.metrics


def _trial(job: sweeps.TrialOverrides, name: str) -> Summary:
    """Run one combination of a sweep, and return its summary even where it fails."""
    try:
        config = compose_config(job.overrides, job=name)
        if name:
            sweeps.claim(config.out, job.swept)
        return as_flow(config, name or config.name)
    except Exception as error:  # noqa: BLE001 - the other trials go on, and the flow run of this one has its traceback
        return Summary(getattr(error, "exit_code", WsiflowError.exit_code), {}, f"{type(error).__name__}: {error}")


def _compare_trials(request: forms.Sweep, failed: list[str]) -> None:
    """Compare the trials that have scores, and show the result, or why they were not compared."""
    try:
        config = next(_configs(request), None)
        if config is None:
            return
        options = comparison.Options(resamples=config.evaluation.bootstrap, seed=config.seed)
        result = comparison.compare_sweep_folder(config.out.parent, config.tracking, options, failed)
    except WsiflowError as error:
        create_markdown_artifact(f"Not compared: {error}\n", key="wsiflow-compare", description=request.name)
        return
    if result is not None:
        comparing.create_artifacts(result)


def _show_on_page(name: str, metrics: Mapping[str, float], text: str) -> None:
    """Show the main numbers, and where the files are, on the page of the flow run."""
    rows = [{"number": key, "value": value} for key, value in _main_numbers(metrics).items()]
    create_table_artifact(rows, key="wsiflow-numbers", description=name)
    create_markdown_artifact(f"# {name}\n\n{text}\n", key="wsiflow-report", description=name)


def _main_numbers(metrics: Mapping[str, float]) -> dict[str, float | None]:
    """Return the main numbers; one that does not exist is null."""
    return {key: metrics[key] if math.isfinite(metrics[key]) else None for key in _MAIN_NUMBERS if key in metrics}
