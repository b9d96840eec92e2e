"""Write runs and their classifiers to the MLflow store, when they begin, fail and finish.

Faults of the store raise nothing: every function returns a `LogResult` that says why nothing was recorded.
"""

import json
import logging
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from wsiflow.redaction import redacted, without_secrets
from wsiflow.run.tracking.entries import (
    ENTRIES_PER_CALL,
    FOLDER,
    METRICS_PER_CALL,
    NOTE,
    OFF,
    PARAM_CHARS,
    REASON,
    TAG_CHARS,
    accepted_name,
    experiment_with_view,
    finite,
    log_bytes,
    metric_entries,
    origin,
    set_tags,
    yes_no,
)
from wsiflow.run.tracking.reading import all_runs, known_to_sqlite
from wsiflow.run.tracking.records import DatasetRecord, LogResult, ModelRecord, RunRecord, RunStart
from wsiflow.run.tracking.store import TrackingParams, one_line, with_store
from wsiflow.run.tracking.sweeps import parent_tags
from wsiflow.system import processes

if TYPE_CHECKING:
    from mlflow import MlflowClient

_logger = logging.getLogger(__name__)

_DRIVER = "wsiflow.driver"


def begin_run(params: TrackingParams, start: RunStart) -> LogResult:
    """Record that a run has begun, unless its folder has a finished record, and that other runs were killed."""
    if params.kind == "off":
        return OFF
    known = known_to_sqlite(params, FOLDER, start.folder, ("yes", "no"))
    return known or with_store(params, lambda client: _begin(client, params, start))


def fail_run(params: TrackingParams, start: RunStart, reason: str) -> LogResult:
    """Record that a run ended without scores, and why, unless its folder has a finished record."""
    if params.kind == "off":
        return OFF

    def fail(client: "MlflowClient") -> LogResult:
        begun = _begin(client, params, start)
        if client.get_run(str(begun.run_id)).info.status == "RUNNING":
            _fail(client, begun, reason, "FAILED")
        return begun

    return with_store(params, fail)


def log_run(params: TrackingParams, record: RunRecord) -> LogResult:
    """Record a finished run, unless a finished record with the same key and completeness exists.

    Returns:
        The new or existing record; or the reason why there is none: tracking is off, or the store failed.
    """
    if params.kind == "off":
        return OFF
    known = known_to_sqlite(params, "wsiflow.key", record.key, (yes_no(record.partial),))
    logged = known or with_store(params, lambda client: _log_once(client, params, record))
    if logged.run_id:
        _logger.info("MLflow run %s has the record, in %s", logged.run_id, without_secrets(params.uri))
    return logged


def _begin(client: "MlflowClient", params: TrackingParams, start: RunStart) -> LogResult:
    experiment = experiment_with_view(client, params)
    _end_killed(client, experiment, but=start.folder)
    which = f"tags.`{FOLDER}` = '{start.folder}' and attributes.status = 'FINISHED'"
    for run in client.search_runs([experiment], which, max_results=1):
        return LogResult(str(run.info.run_id), "", experiment)
    tags = {
        "wsiflow.role": "run",
        FOLDER: start.folder,
        "wsiflow.out": start.out,
        _DRIVER: json.dumps(start.driver._asdict()),
        **origin(),
        **parent_tags(client, experiment, params, start.sweep_folder),
    }
    tags = {name: text[:TAG_CHARS] for name, text in redacted(tags).items()}
    blank = _blank(client, experiment, start.folder, delete_others=False)
    if blank is None:
        return LogResult(str(client.create_run(experiment, tags=tags, run_name=start.name).info.run_id), "", experiment)
    run_id = str(blank.info.run_id)
    for name in {NOTE, REASON} & blank.data.tags.keys():
        client.delete_tag(run_id, name)
    set_tags(client, run_id, tags)
    client.update_run(run_id, status="RUNNING", name=start.name)
    return LogResult(run_id, "", experiment)


def _end_killed(client: "MlflowClient", experiment: str, *, but: str) -> None:
    """Mark the runs whose process is known to have ended without a word, except that of one folder."""
    for run in all_runs(client, experiment, f"tags.`{_DRIVER}` LIKE '%' and attributes.status = 'RUNNING'"):
        driver = processes.from_record(json.loads(run.data.tags[_DRIVER]))
        if run.data.tags.get(FOLDER) != but and processes.has_ended(driver):
            reason = "the process of the run was killed; run the same command again to go on"
            _fail(client, LogResult(run.info.run_id, ""), reason, "KILLED")


def _fail(client: "MlflowClient", logged: LogResult, reason: str, status: str) -> None:
    text = without_secrets(reason)
    shown = text.replace("\n", "\n\n")  # in Markdown one line break is none
    tags = {REASON: " ".join(text.split()), NOTE: f"**{status.capitalize()}:** {shown}"}
    set_tags(client, str(logged.run_id), tags)
    client.set_terminated(str(logged.run_id), status)


def _blank(client: "MlflowClient", experiment: str, folder: str, *, delete_others: bool) -> Any | None:
    """Return the record of a folder that only says that a run has begun, to be continued; None where there is none.

    Args:
        client: A client of the store.
        experiment: Id of the experiment.
        folder: Identity of the folder.
        delete_others: Whether to delete the remains of records that were broken off while they were written.
    """
    if not folder:
        return None
    which = f"tags.`{FOLDER}` = '{folder}' and attributes.status != 'FINISHED'"
    chosen = None
    for run in all_runs(client, experiment, which):
        if chosen is None and _DRIVER in run.data.tags and not run.data.params and not run.data.metrics:
            chosen = run
        elif delete_others:
            client.delete_run(run.info.run_id)
    return chosen


def _log_once(client: "MlflowClient", params: TrackingParams, record: RunRecord) -> LogResult:
    experiment = experiment_with_view(client, params)
    existing = _finished(client, experiment, record.key, partial=record.partial)
    if existing is not None:
        return LogResult(existing, "", experiment)
    _delete_unfinished(client, experiment, record.key)
    tags = _tags(record) | parent_tags(client, experiment, params, record.sweep_folder)
    begun = _blank(client, experiment, record.tags.get(FOLDER, ""), delete_others=True)
    if begun is None:
        run_id = str(client.create_run(experiment, tags=tags, run_name=record.name).info.run_id)
    else:
        run_id = str(begun.info.run_id)
        client.update_run(run_id, status="RUNNING", name=record.name)
        set_tags(client, run_id, tags)
        client.delete_tag(run_id, _DRIVER)
    if record.description:
        client.set_tag(run_id, NOTE, record.description.replace("{run}", run_id)[:TAG_CHARS])
    _log_numbers(client, run_id, record)
    _log_files(client, run_id, record)
    if record.model is not None:
        _register(client, run_id, record.model)
    client.set_terminated(run_id, "FINISHED")
    return LogResult(run_id, "", experiment)


def _finished(client: "MlflowClient", experiment: str, key: str, *, partial: bool) -> str | None:
    same = f"tags.`wsiflow.key` = '{key}' and tags.`wsiflow.partial` = '{yes_no(partial)}'"
    runs = client.search_runs([experiment], f"{same} and attributes.status = 'FINISHED'", max_results=1)
    return str(runs[0].info.run_id) if runs else None


def _delete_unfinished(client: "MlflowClient", experiment: str, key: str) -> None:
    """Delete the records of a run that were broken off while they were written."""
    for run in all_runs(client, experiment, f"tags.`wsiflow.key` = '{key}' and attributes.status != 'FINISHED'"):
        client.delete_run(run.info.run_id)


def _tags(record: RunRecord) -> dict[str, str]:
    own = {
        "wsiflow.role": "run",
        "wsiflow.key": record.key,
        "wsiflow.plan_hash": record.plan_hash,
        "wsiflow.partial": yes_no(record.partial),
        "wsiflow.version": version("wsiflow"),
    }
    without = sorted(set(record.metrics) - set(finite(record.metrics)))
    own |= {"wsiflow.metrics_without_value": ", ".join(without)} if without else {}
    return {name: text[:TAG_CHARS] for name, text in {**redacted(record.tags), **own, **origin()}.items()}


def _log_numbers(client: "MlflowClient", run_id: str, record: RunRecord) -> None:
    from mlflow.entities import DatasetInput, InputTag, Param

    client.log_inputs(run_id, [DatasetInput(_dataset(record.dataset), [InputTag("mlflow.data.context", "test")])])
    params = [Param(accepted_name(key), str(value)[:PARAM_CHARS]) for key, value in redacted(record.params).items()]
    for first in range(0, len(params), ENTRIES_PER_CALL):
        client.log_batch(run_id, params=params[first : first + ENTRIES_PER_CALL])
    metrics = metric_entries(record.metrics)
    for first in range(0, len(metrics), METRICS_PER_CALL):
        client.log_batch(run_id, metrics=metrics[first : first + METRICS_PER_CALL])


def _dataset(record: DatasetRecord) -> Any:
    """Return the slides as MLflow lists them; MLflow cannot read slides, so the source is only a path."""
    from mlflow.entities import Dataset

    source = json.dumps({"uri": without_secrets(record.source)})
    return Dataset(
        accepted_name(record.name), record.digest, "local", source, profile=json.dumps({"num_rows": record.n_slides})
    )


def _log_files(client: "MlflowClient", run_id: str, record: RunRecord) -> None:
    for path in record.artifacts:
        if path.is_dir():
            client.log_artifacts(run_id, str(path), path.name)
        else:
            client.log_artifact(run_id, str(path))
    for name, columns in record.tables.items():
        client.log_table(run_id, dict(columns), name)
    for name, values in record.documents.items():
        client.log_text(run_id, json.dumps(redacted(values), indent=1), name)
    log_bytes(client, run_id, record.figures, "figures")


# --- the model registry


def _register(client: "MlflowClient", run_id: str, model: ModelRecord) -> None:
    """Register the classifier, once per identity, and name its version in the run; the weights are not needed.

    A store without a registry, or one that the user may not write, costs a warning.
    """
    from mlflow.exceptions import MlflowException

    try:
        number = _model_version(client, run_id, model)
    except MlflowException as error:
        _logger.warning("the model registry did not take %s: %s", model.name, one_line(error))
        return
    client.set_tag(run_id, "wsiflow.model", f"{model.name}, version {number}")


def _model_version(client: "MlflowClient", run_id: str, model: ModelRecord) -> str:
    """Return the version of the registered model that has the classifier's identity, created if absent."""
    known = client.search_model_versions(f"name = '{model.name}'")
    for one in known:
        if one.tags.get("wsiflow.model_hash") == model.identity:
            return str(one.version)
    if not known and not client.search_registered_models(f"name = '{model.name}'"):
        client.create_registered_model(model.name, description=model.description)
    client.log_text(run_id, model.card, "model/card.json")
    source = f"{client.get_run(run_id).info.artifact_uri}/model"
    tags = {"wsiflow.model_hash": model.identity, "card": model.name, "architecture": model.architecture}
    made = client.create_model_version(
        model.name, source, run_id, tags=tags, description=model.description, await_creation_for=0
    )
    return str(made.version)
