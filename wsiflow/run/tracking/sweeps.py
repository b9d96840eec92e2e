"""Write sweeps and comparisons to the MLflow store.

Faults of the store raise nothing: every function returns a `LogResult` that says why nothing was recorded.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wsiflow.redaction import redacted, without_secrets
from wsiflow.run.tracking import views
from wsiflow.run.tracking.entries import (
    ENTRIES_PER_CALL,
    NOTE,
    OFF,
    PARAM_CHARS,
    REASON,
    SWEEP,
    SWEEP_FOLDER,
    TAG_CHARS,
    accepted_name,
    experiment_with_view,
    log_bytes,
    metric_entries,
    origin,
    save_view,
    set_tags,
    yes_no,
)
from wsiflow.run.tracking.reading import all_runs
from wsiflow.run.tracking.records import ComparedRun, ComparisonRecord, LogResult
from wsiflow.run.tracking.store import TrackingParams, with_store

if TYPE_CHECKING:
    from mlflow import MlflowClient

_OF_COMPARISON = (views.PARETO, views.AGAINST, views.COLOUR)
_ENDED = ("FAILED", "KILLED")


def begin_sweep(params: TrackingParams, folder: Path) -> LogResult:
    """Create the store and the sweep's parent run before its trials start, which would otherwise all create them."""
    sweep = params.sweep
    if params.kind == "off" or sweep is None:
        return OFF
    return with_store(params, lambda client: _begin_sweep(client, params, sweep, str(folder)))


def _begin_sweep(client: "MlflowClient", params: TrackingParams, sweep: str, folder: str) -> LogResult:
    experiment = experiment_with_view(client, params)
    return LogResult(_parent(client, experiment, sweep, folder), "", experiment)


def log_sweep(params: TrackingParams, folder: Path, description: str) -> LogResult:
    """Describe a sweep on the page of its parent run, where its runs were not compared."""
    sweep = params.sweep
    if params.kind == "off" or sweep is None:
        return OFF

    def describe(client: "MlflowClient") -> LogResult:
        logged = _begin_sweep(client, params, sweep, str(folder))
        run_id = str(logged.run_id)
        text = f"{description}{_failed(_children(client, logged.experiment_id, run_id))}"
        client.set_tag(run_id, NOTE, without_secrets(text)[:TAG_CHARS])
        view = views.tag(views.key_of_sweep(run_id), name=sweep, parent=run_id)
        save_view(client, logged.experiment_id, view)
        return logged

    return with_store(params, describe)


def log_comparison(params: TrackingParams, record: ComparisonRecord) -> LogResult:
    """Tag the runs of a sweep with ``wsiflow.pareto`` (``yes`` or ``no``), and log the comparison to its parent run.

    The record of an earlier comparison is replaced.
    """
    sweep = params.sweep
    if params.kind == "off" or sweep is None:
        return OFF if params.kind == "off" else LogResult(None, "the runs are of no sweep")
    return with_store(params, lambda client: _log_comparison(client, params, sweep, record))


def _log_comparison(client: "MlflowClient", params: TrackingParams, sweep: str, record: ComparisonRecord) -> LogResult:
    """Replace the comparison of a sweep and return the record of its parent run."""
    experiment = experiment_with_view(client, params)
    parent = record.parent or _parent(client, experiment, sweep, record.sweep_folder)
    children = _children(client, experiment, parent)
    of_sweep = {run.info.run_id: run for run in children}
    for run_id in {**of_sweep, **record.runs}:  # where a sweep was moved while it ran, it has two parents
        _mark(client, of_sweep.get(run_id) or client.get_run(run_id), record.runs.get(run_id))
    text = f"{record.description}{_failed(children)}".replace("{run}", parent)
    tags = redacted({**record.tags, NOTE: text})
    for key in client.get_run(parent).data.tags:
        if key.startswith("common."):  # of an earlier version; now it is a file
            client.delete_tag(parent, key)
    set_tags(client, parent, tags)
    client.log_batch(parent, metrics=metric_entries(record.metrics))
    log_bytes(client, parent, record.files)
    view = views.tag(views.key_of_sweep(parent), name=sweep, axes=record.axes, parent=parent)
    save_view(client, experiment, view)
    return LogResult(parent, "", experiment)


def _mark(client: "MlflowClient", run: Any, compared: ComparedRun | None) -> None:
    """Add to a run what a comparison says of it, or remove what an earlier one said."""
    from mlflow.entities import Param, RunTag

    run_id = run.info.run_id
    if compared is None:
        for name in set(_OF_COMPARISON) & run.data.tags.keys():
            client.delete_tag(run_id, name)
        return
    colour = views.FRONT if compared.pareto else views.BEATEN
    tags = zip(_OF_COMPARISON, (yes_no(compared.pareto), compared.against, colour), strict=True)
    params = [
        Param(accepted_name(key), value[:PARAM_CHARS])
        for key, value in redacted(compared.params).items()
        if accepted_name(key) not in run.data.params
    ]
    client.log_batch(run_id, params=params[:ENTRIES_PER_CALL], tags=[RunTag(*tag) for tag in tags])


def _children(client: "MlflowClient", experiment: str, parent: str) -> list[Any]:
    return all_runs(client, experiment, f"tags.`mlflow.parentRunId` = '{parent}'")


def _failed(children: Sequence[Any]) -> str:
    """Return a list of the runs that failed or were killed, with their reasons; empty where there are none."""
    lines = [
        f"- **{run.info.run_name}** {run.info.status.lower()}: {run.data.tags.get(REASON, 'no reason is known')}"
        for run in children
        if run.info.status in _ENDED
    ]
    return "\n".join(["\n\n## Without scores\n", *lines]) if lines else ""


def parent_tags(client: "MlflowClient", experiment: str, params: TrackingParams, folder: str) -> dict[str, str]:
    """Return the tags that make a run the child of its sweep; none for a single run."""
    if params.sweep is None:
        return {}
    return {SWEEP: params.sweep, "mlflow.parentRunId": _parent(client, experiment, params.sweep, folder)}


def _parent(client: "MlflowClient", experiment: str, sweep: str, folder: str) -> str:
    """Return the id of the parent run of the sweep in a folder, created if absent."""
    folder = without_secrets(str(Path(folder).resolve()))
    for run in all_runs(client, experiment, "tags.`wsiflow.role` = 'sweep'"):
        known, run_id = run.data.tags.get(SWEEP_FOLDER), str(run.info.run_id)
        if known == folder:
            return run_id
        is_former = known is None and run.data.tags[SWEEP] == sweep
        if is_former and _holds_all(_children(client, experiment, run_id), folder):
            return run_id
    tags = {"wsiflow.role": "sweep", SWEEP: sweep, SWEEP_FOLDER: folder, **origin()}
    tags = {key: text[:TAG_CHARS] for key, text in redacted(tags).items()}
    run_id = str(client.create_run(experiment, tags=tags, run_name=sweep).info.run_id)
    client.set_terminated(run_id, "FINISHED")
    return run_id


def _holds_all(children: Sequence[Any], folder: str) -> bool:
    """Tell whether all runs of a parent, which an earlier version recorded without its folder, lie in a folder."""
    return all(str(Path(run.data.tags.get("wsiflow.out", "")).resolve().parent) == folder for run in children)
