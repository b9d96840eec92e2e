"""Read the recorded runs of an experiment."""

import sqlite3
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from wsiflow.errors import EnvironmentFault, InputError
from wsiflow.redaction import without_secrets
from wsiflow.run.tracking.records import LogResult
from wsiflow.run.tracking.store import TrackingParams, database, readable, usable

if TYPE_CHECKING:
    from mlflow import MlflowClient

_COMPLETE = "tags.`wsiflow.role` = 'run' and tags.`wsiflow.partial` = 'no' and attributes.status = 'FINISHED'"


class TrackedRun(NamedTuple):
    """A finished, complete run as MLflow has recorded it.

    Attributes:
        run_id: Id of the MLflow run.
        name: Name of the run.
        sweep: Name of the sweep that the run belongs to, or empty.
        params, metrics, tags: Settings, metrics and tags by name.
    """

    run_id: str
    name: str
    sweep: str
    params: Mapping[str, str]
    metrics: Mapping[str, float]
    tags: Mapping[str, str]

    @property
    def parent(self) -> str:
        """Id of the sweep's parent run; empty for a single run."""
        return self.tags.get("mlflow.parentRunId", "")


def tracked_runs(params: TrackingParams, tags: Mapping[str, str] | None = None) -> list[TrackedRun]:
    """Return the finished and complete runs of an experiment, oldest first; of one folder only the latest record.

    Args:
        params: The store and the experiment.
        tags: Tags that the runs must have, by name.

    Raises:
        InputError: The store or the experiment does not exist, or the experiment was deleted.
        EnvironmentFault: The store cannot be read.
    """
    path = database(params.uri)
    if path is not None and not path.exists():
        raise InputError("there is no such MLflow store", "name an existing one with --uri", path=path)
    with readable(params) as client:
        found = client.get_experiment_by_name(params.experiment)
        if found is None:
            known = ", ".join(sorted(one.name for one in client.search_experiments()))
            cause = f"{without_secrets(params.uri)} has no experiment {params.experiment!r}"
            raise InputError(cause, f"name one of: {known}; or folders of finished runs")
        which = " and ".join([_COMPLETE, *(_equals(name, value) for name, value in (tags or {}).items())])
        runs = [_tracked_run(run) for run in all_runs(client, usable(found, params), which)]
    # A folder whose scores changed (a slide was added, an outline was corrected) has a record of each state.
    return list({run.tags.get("wsiflow.folder", run.run_id): run for run in runs}.values())


def _equals(name: str, value: str) -> str:
    """Return a filter of MLflow, in which a text has no way to contain both kinds of quotation marks.

    Raises:
        InputError: The name or the value cannot be written in a filter.
    """
    if "`" in name or ("'" in value and '"' in value):
        raise InputError(f"MLflow cannot search for the tag {name}={value}", "choose another tag")
    mark = '"' if "'" in value else "'"
    return f"tags.`{name}` = {mark}{value}{mark}"


def all_runs(client: "MlflowClient", experiment_id: str, which: str) -> list[Any]:
    """Return every run of an experiment that matches an MLflow filter, oldest first."""
    runs: list[Any] = []
    token = None
    while True:
        page = client.search_runs(
            [experiment_id], which, order_by=["attributes.start_time ASC"], max_results=1000, page_token=token
        )
        runs += page
        token = page.token
        if not token:
            return runs


def _tracked_run(run: Any) -> TrackedRun:
    tags = dict(run.data.tags)
    sweep = tags.get("wsiflow.sweep", "")
    return TrackedRun(run.info.run_id, run.info.run_name, sweep, dict(run.data.params), dict(run.data.metrics), tags)


def download(params: TrackingParams, run_id: str, names: Sequence[str], folder: Path) -> dict[str, Path]:
    """Download artifacts of a run into a folder, and return the paths of those that the run has, by name.

    Raises:
        EnvironmentFault: The store cannot be read.
    """
    with readable(params) as client:
        known = {one.path for one in client.list_artifacts(run_id)}
        return {name: Path(client.download_artifacts(run_id, name, str(folder))) for name in names if name in known}


_KNOWN = """
    select runs.run_uuid, runs.experiment_id from runs
    join experiments on experiments.experiment_id = runs.experiment_id
    join tags as keys on keys.run_uuid = runs.run_uuid and keys.key = ?
    join tags as parts on parts.run_uuid = runs.run_uuid and parts.key = 'wsiflow.partial'
    where runs.lifecycle_stage = 'active' and runs.status = 'FINISHED'
    and experiments.name = ? and experiments.lifecycle_stage = 'active' and keys.value = ? and parts.value in (?, ?)
"""


def known_to_sqlite(params: TrackingParams, tag: str, value: str, partial: Sequence[str]) -> LogResult | None:
    """Return the finished record with a tag in a SQLite store; None where only MLflow can tell.

    Importing MLflow takes seconds, which restarting a complete run would otherwise cost each time. Where the tables of
    another version of MLflow do not answer the query, the record is looked up by MLflow.

    Args:
        params: The store and the experiment.
        tag: Name of the tag, ``wsiflow.key`` or ``wsiflow.folder``.
        value: Value of the tag.
        partial: Values of the tag ``wsiflow.partial`` that count.
    """
    try:
        path = database(params.uri)
        if path is None or not path.exists():
            return None
        query = (tag, params.experiment, value, partial[0], partial[-1])
        with closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)) as opened:
            row = opened.execute(_KNOWN, query).fetchone()
    except (sqlite3.Error, EnvironmentFault):
        return None
    return LogResult(str(row[0]), "", str(row[1])) if row else None
