"""Write runs, sweeps and comparisons to the MLflow store.

Faults of the store raise nothing: every function returns a `LogResult` that says why nothing was recorded.
"""

import getpass
import json
import logging
import math
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wsiflow.redaction import redacted, redacted_list, without_secrets
from wsiflow.run.tracking import views
from wsiflow.run.tracking.reading import all_runs, known_to_sqlite
from wsiflow.run.tracking.records import (
    ComparedRun,
    ComparisonRecord,
    DatasetRecord,
    LogResult,
    ModelRecord,
    RunRecord,
    RunStart,
)
from wsiflow.run.tracking.store import TrackingParams, experiment_id, one_line, with_store
from wsiflow.system import processes

if TYPE_CHECKING:
    from mlflow import MlflowClient

_logger = logging.getLogger(__name__)

# Limits of MLflow's API.
_PARAM_CHARS, _TAG_CHARS, _KEY_CHARS = 6000, 8000, 250
_ENTRIES_PER_CALL, _METRICS_PER_CALL = 100, 1000
_NOT_IN_NAMES = re.compile(r"[^\w.\- :/]")

_NOTE, _REASON, _DRIVER = "mlflow.note.content", "wsiflow.reason", "wsiflow.driver"
_FOLDER, _SWEEP, _SWEEP_FOLDER = "wsiflow.folder", "wsiflow.sweep", "wsiflow.sweep_folder"
_OF_COMPARISON = (views.PARETO, views.AGAINST, views.COLOUR)
_ENDED = ("FAILED", "KILLED")
_OFF = LogResult(None, "tracking is off")
_GIT_S = 5.0


# --- runs


def begin_run(params: TrackingParams, start: RunStart) -> LogResult:
    """Record that a run has begun, unless its folder has a finished record, and that other runs were killed."""
    if params.kind == "off":
        return _OFF
    known = known_to_sqlite(params, _FOLDER, start.folder, ("yes", "no"))
    return known or with_store(params, lambda client: _begin(client, params, start))


def fail_run(params: TrackingParams, start: RunStart, reason: str) -> LogResult:
    """Record that a run ended without scores, and why."""
    if params.kind == "off":
        return _OFF
    return with_store(params, lambda client: _fail(client, _begin(client, params, start), reason, "FAILED"))


def log_run(params: TrackingParams, record: RunRecord) -> LogResult:
    """Record a finished run, unless a finished record with the same key and completeness exists.

    Returns:
        The new or existing record; or the reason why there is none: tracking is off, or the store failed.
    """
    if params.kind == "off":
        return _OFF
    known = known_to_sqlite(params, "wsiflow.key", record.key, (_yes_no(record.partial),))
    logged = known or with_store(params, lambda client: _log_once(client, params, record))
    if logged.run_id:
        _logger.info("MLflow run %s has the record, in %s", logged.run_id, without_secrets(params.uri))
    return logged


def _begin(client: "MlflowClient", params: TrackingParams, start: RunStart) -> LogResult:
    experiment = _experiment_with_view(client, params)
    _end_killed(client, experiment, but=start.folder)
    tags = {
        "wsiflow.role": "run",
        _FOLDER: start.folder,
        "wsiflow.out": start.out,
        _DRIVER: json.dumps(start.driver._asdict()),
        **_origin(),
        **_parent_tags(client, experiment, params, start.sweep_folder),
    }
    tags = {name: text[:_TAG_CHARS] for name, text in redacted(tags).items()}
    run = _blank(client, experiment, start.folder, delete_others=False)
    if run is None:
        return LogResult(str(client.create_run(experiment, tags=tags, run_name=start.name).info.run_id), "", experiment)
    run_id = str(run.info.run_id)
    for name in {_NOTE, _REASON} & run.data.tags.keys():
        client.delete_tag(run_id, name)
    _set_tags(client, run_id, tags)
    client.update_run(run_id, status="RUNNING", name=start.name)
    return LogResult(run_id, "", experiment)


def _end_killed(client: "MlflowClient", experiment: str, *, but: str) -> None:
    """Mark the runs whose process is known to have ended without a word, except that of one folder."""
    for run in all_runs(client, experiment, f"tags.`{_DRIVER}` LIKE '%' and attributes.status = 'RUNNING'"):
        driver = processes.from_record(json.loads(run.data.tags[_DRIVER]))
        if run.data.tags.get(_FOLDER) != but and processes.has_ended(driver):
            reason = "the process of the run was killed; run the same command again to go on"
            _fail(client, LogResult(run.info.run_id, ""), reason, "KILLED")


def _fail(client: "MlflowClient", logged: LogResult, reason: str, status: str) -> LogResult:
    text = without_secrets(reason)[:_TAG_CHARS]
    tags = {_REASON: text, _NOTE: f"**{status.capitalize()}:** {text}"[:_TAG_CHARS]}
    _set_tags(client, str(logged.run_id), tags)
    client.set_terminated(logged.run_id, status)
    return logged


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
    which = f"tags.`{_FOLDER}` = '{folder}' and attributes.status != 'FINISHED'"
    chosen = None
    for run in all_runs(client, experiment, which):
        if chosen is None and _DRIVER in run.data.tags and not run.data.params and not run.data.metrics:
            chosen = run
        elif delete_others:
            client.delete_run(run.info.run_id)
    return chosen


def _log_once(client: "MlflowClient", params: TrackingParams, record: RunRecord) -> LogResult:
    experiment = _experiment_with_view(client, params)
    existing = _finished(client, experiment, record.key, partial=record.partial)
    if existing is not None:
        return LogResult(existing, "", experiment)
    _delete_unfinished(client, experiment, record.key)
    tags = _tags(record) | _parent_tags(client, experiment, params, record.sweep_folder)
    begun = _blank(client, experiment, record.tags.get(_FOLDER, ""), delete_others=True)
    if begun is None:
        run_id = str(client.create_run(experiment, tags=tags, run_name=record.name).info.run_id)
    else:
        run_id = str(begun.info.run_id)
        client.update_run(run_id, status="RUNNING", name=record.name)
        _set_tags(client, run_id, tags)
    if record.description:
        client.set_tag(run_id, _NOTE, record.description.replace("{run}", run_id)[:_TAG_CHARS])
    _log_numbers(client, run_id, record)
    _log_files(client, run_id, record)
    if record.model is not None:
        _register(client, run_id, record.model)
    client.set_terminated(run_id, "FINISHED")
    return LogResult(run_id, "", experiment)


def _finished(client: "MlflowClient", experiment: str, key: str, *, partial: bool) -> str | None:
    same = f"tags.`wsiflow.key` = '{key}' and tags.`wsiflow.partial` = '{_yes_no(partial)}'"
    runs = client.search_runs([experiment], f"{same} and attributes.status = 'FINISHED'", max_results=1)
    return str(runs[0].info.run_id) if runs else None


def _delete_unfinished(client: "MlflowClient", experiment: str, key: str) -> None:
    """Delete the records of a run that were broken off while they were written."""
    for run in all_runs(client, experiment, f"tags.`wsiflow.key` = '{key}' and attributes.status != 'FINISHED'"):
        client.delete_run(run.info.run_id)


# --- sweeps


def begin_sweep(params: TrackingParams, folder: Path) -> LogResult:
    """Create the store and the sweep's parent run before its trials start, which would otherwise all create them."""
    sweep = params.sweep
    if params.kind == "off" or sweep is None:
        return _OFF
    return with_store(params, lambda client: _begin_sweep(client, params, sweep, str(folder)))


def _begin_sweep(client: "MlflowClient", params: TrackingParams, sweep: str, folder: str) -> LogResult:
    experiment = _experiment_with_view(client, params)
    return LogResult(_parent(client, experiment, sweep, folder), "", experiment)


def log_sweep(params: TrackingParams, folder: Path, description: str) -> LogResult:
    """Describe a sweep on the page of its parent run, where its runs were not compared."""
    sweep = params.sweep
    if params.kind == "off" or sweep is None:
        return _OFF

    def describe(client: "MlflowClient") -> LogResult:
        logged = _begin_sweep(client, params, sweep, str(folder))
        run_id = str(logged.run_id)
        text = f"{description}{_failed(_children(client, logged.experiment_id, run_id))}"
        client.set_tag(run_id, _NOTE, text[:_TAG_CHARS])
        client.set_experiment_tag(logged.experiment_id, *views.tag(views.key_of_sweep(run_id), parent=run_id))
        return logged

    return with_store(params, describe)


def log_comparison(params: TrackingParams, record: ComparisonRecord) -> LogResult:
    """Tag the runs of a sweep with ``wsiflow.pareto`` (``yes`` or ``no``), and log the comparison to its parent run.

    The record of an earlier comparison is replaced.
    """
    sweep = params.sweep
    if params.kind == "off" or sweep is None:
        return _OFF if params.kind == "off" else LogResult(None, "the runs are of no sweep")
    return with_store(params, lambda client: _log_comparison(client, params, sweep, record))


def _log_comparison(client: "MlflowClient", params: TrackingParams, sweep: str, record: ComparisonRecord) -> LogResult:
    """Replace the comparison of a sweep and return the record of its parent run."""
    experiment = _experiment_with_view(client, params)
    parent = record.parent or _parent(client, experiment, sweep, record.sweep_folder)
    children = _children(client, experiment, parent)
    of_sweep = {run.info.run_id: run for run in children}
    for run_id in {**of_sweep, **record.runs}:  # where a sweep was moved while it ran, it has two parents
        _mark(client, of_sweep.get(run_id) or client.get_run(run_id), record.runs.get(run_id))
    text = f"{record.description}{_failed(children)}".replace("{run}", parent)
    tags = redacted({**record.tags, _NOTE: text})
    for key in client.get_run(parent).data.tags:
        if key.startswith("common."):  # of an earlier version; now it is a file
            client.delete_tag(parent, key)
    _set_tags(client, parent, tags)
    client.log_batch(parent, metrics=_metrics(record.metrics))
    _log_bytes(client, parent, record.files)
    client.set_experiment_tag(experiment, *views.tag(views.key_of_sweep(parent), axes=record.axes, parent=parent))
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
    tags = zip(_OF_COMPARISON, (_yes_no(compared.pareto), compared.against, colour), strict=True)
    params = [
        Param(_name(key), value[:_PARAM_CHARS])
        for key, value in redacted(compared.params).items()
        if _name(key) not in run.data.params
    ]
    client.log_batch(run_id, params=params[:_ENTRIES_PER_CALL], tags=[RunTag(*tag) for tag in tags])


def _children(client: "MlflowClient", experiment: str, parent: str) -> list[Any]:
    return all_runs(client, experiment, f"tags.`mlflow.parentRunId` = '{parent}'")


def _failed(children: Sequence[Any]) -> str:
    """Return a list of the runs that failed or were killed, with their reasons; empty where there are none."""
    lines = [
        f"- **{run.info.run_name}** {run.info.status.lower()}: {run.data.tags.get(_REASON, 'no reason is known')}"
        for run in children
        if run.info.status in _ENDED
    ]
    return "\n".join(["\n\n## Without scores\n", *lines]) if lines else ""


def _parent_tags(client: "MlflowClient", experiment: str, params: TrackingParams, folder: str) -> dict[str, str]:
    """Return the tags that make a run the child of its sweep; none for a single run."""
    if params.sweep is None:
        return {}
    return {_SWEEP: params.sweep, "mlflow.parentRunId": _parent(client, experiment, params.sweep, folder)}


def _parent(client: "MlflowClient", experiment: str, sweep: str, folder: str) -> str:
    """Return the id of the parent run of the sweep in a folder, created if absent."""
    for run in all_runs(client, experiment, "tags.`wsiflow.role` = 'sweep'"):
        known, run_id = run.data.tags.get(_SWEEP_FOLDER), str(run.info.run_id)
        if known == folder:
            return run_id
        is_former = known is None and run.data.tags[_SWEEP] == sweep
        if is_former and _holds_all(_children(client, experiment, run_id), folder):
            return run_id
    tags = {"wsiflow.role": "sweep", _SWEEP: sweep, _SWEEP_FOLDER: folder, **_origin()}
    run_id = str(client.create_run(experiment, tags=redacted(tags), run_name=sweep).info.run_id)
    client.set_terminated(run_id, "FINISHED")
    return run_id


def _holds_all(children: Sequence[Any], folder: str) -> bool:
    """Tell whether all runs of a parent, which an earlier version recorded without its folder, lie in a folder."""
    return all(str(Path(run.data.tags.get("wsiflow.out", "")).parent) == folder for run in children)


# --- experiments, tags and files


def _experiment_with_view(client: "MlflowClient", params: TrackingParams) -> str:
    """Return the id of the experiment, created with its view if absent."""
    found = experiment_id(client, params)
    name, value = views.tag(views.EXPERIMENT)
    if name not in client.get_experiment(found).tags:
        client.set_experiment_tag(found, name, value)
    return found


def _tags(record: RunRecord) -> dict[str, str]:
    own = {
        "wsiflow.role": "run",
        "wsiflow.key": record.key,
        "wsiflow.plan_hash": record.plan_hash,
        "wsiflow.partial": _yes_no(record.partial),
        "wsiflow.version": version("wsiflow"),
    }
    without = sorted(set(record.metrics) - set(_finite(record.metrics)))
    own |= {"wsiflow.metrics_without_value": ", ".join(without)} if without else {}
    return {name: text[:_TAG_CHARS] for name, text in {**redacted(record.tags), **own, **_origin()}.items()}


def _origin() -> dict[str, str]:
    """Return the tags that say who recorded a run, and from what: the columns User, Source and Version of MLflow."""
    words = [Path(sys.argv[0]).name, *sys.argv[1:]]
    tags = {"mlflow.source.name": shlex.join(map(str, redacted_list(words))), "mlflow.source.type": "LOCAL"}
    commit = _git_commit(Path(__file__).parents[3])
    tags |= {"mlflow.source.git.commit": commit} if commit else {}
    try:
        return {**tags, "mlflow.user": getpass.getuser()}
    except (KeyError, OSError):  # a container may run as a user without a name
        return tags


def _git_commit(checkout: Path) -> str:
    """Return the commit of a source checkout; empty for an installed package, and where git fails."""
    command = ["git", "-C", str(checkout), "rev-parse", "--verify", "HEAD"]
    quiet = {**os.environ, "GIT_TERMINAL_PROMPT": "0", "GIT_OPTIONAL_LOCKS": "0"}
    try:
        if not (checkout / ".git").exists():
            return ""
        result = subprocess.run(
            command, capture_output=True, stdin=subprocess.DEVNULL, env=quiet, timeout=_GIT_S, check=True
        )
    except (OSError, subprocess.SubprocessError):  # a record without a commit is better than none
        return ""
    commit = result.stdout.decode("ascii", "replace").strip()
    return commit if re.fullmatch(r"[0-9a-f]{40,64}", commit) else ""


def _yes_no(flag: bool) -> str:  # noqa: FBT001 - the text of a flag
    return "yes" if flag else "no"


def _finite(metrics: Mapping[str, float]) -> dict[str, float]:
    return {name: float(value) for name, value in metrics.items() if math.isfinite(value)}


def _name(text: str) -> str:
    """Return a name with the characters and the length that MLflow accepts."""
    return _NOT_IN_NAMES.sub("_", text)[:_KEY_CHARS]


def _set_tags(client: "MlflowClient", run_id: str, tags: Mapping[str, str]) -> None:
    from mlflow.entities import RunTag

    listed = [RunTag(_name(key), text[:_TAG_CHARS]) for key, text in tags.items()]
    for first in range(0, len(listed), _ENTRIES_PER_CALL):
        client.log_batch(run_id, tags=listed[first : first + _ENTRIES_PER_CALL])


def _metrics(metrics: Mapping[str, float]) -> list[Any]:
    from mlflow.entities import Metric

    now_ms = int(time.time() * 1000)
    return [Metric(_name(key), value, now_ms, 0) for key, value in _finite(metrics).items()]


def _log_numbers(client: "MlflowClient", run_id: str, record: RunRecord) -> None:
    from mlflow.entities import DatasetInput, InputTag, Param

    client.log_inputs(run_id, [DatasetInput(_dataset(record.dataset), [InputTag("mlflow.data.context", "test")])])
    params = [Param(_name(key), str(value)[:_PARAM_CHARS]) for key, value in redacted(record.params).items()]
    for first in range(0, len(params), _ENTRIES_PER_CALL):
        client.log_batch(run_id, params=params[first : first + _ENTRIES_PER_CALL])
    metrics = _metrics(record.metrics)
    for first in range(0, len(metrics), _METRICS_PER_CALL):
        client.log_batch(run_id, metrics=metrics[first : first + _METRICS_PER_CALL])


def _dataset(record: DatasetRecord) -> Any:
    """Return the slides as MLflow lists them; MLflow cannot read slides, so the source is only a path."""
    from mlflow.entities import Dataset

    source = json.dumps({"uri": without_secrets(record.source)})
    return Dataset(
        _name(record.name), record.digest, "local", source, profile=json.dumps({"num_rows": record.n_slides})
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
    _log_bytes(client, run_id, record.figures, "figures")


def _log_bytes(client: "MlflowClient", run_id: str, files: Mapping[str, bytes], folder: str | None = None) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        for name, data in files.items():
            (Path(scratch) / name).write_bytes(data)
        client.log_artifacts(run_id, scratch, folder)


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
        model.name, source, run_id, tags=tags, description=model.description, await_creation_for=None
    )
    return str(made.version)
