"""Record each run, and comparisons of runs, in MLflow. This is the only module that uses mlflow.

Input: metrics, figures, tables and files of a finished run. Output: the id of its MLflow run, or the reason why there
is none; and the recorded runs of an experiment.

Conventions:

* MLflow is a view. No result depends on it, and workers never talk to it. A store that cannot be reached costs some
  seconds and one warning: the files of the run are authoritative, and logging again later creates one record only.
* The store is a SQLite database with its artifacts beside it, or a server. A writer of a SQLite store holds a lock file
  beside it, since several first starts would otherwise create the tables at the same time.
* A metric without a finite value is left out and named in the tag ``wsiflow.metrics_without_value``.
* Secrets are replaced before anything is sent, see `wsiflow.redaction`.
"""

import fcntl
import logging
import math
import os
import re
import sqlite3
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from pydantic import BaseModel, Field, field_serializer

from wsiflow.errors import EnvironmentFault, InputError, WsiflowError
from wsiflow.redaction import REDACTED, redacted, without_secrets
from wsiflow.system import faults
from wsiflow.system.paths import SQLITE, StoreAddress

if TYPE_CHECKING:
    from mlflow import MlflowClient

_logger = logging.getLogger(__name__)

# Limits of MLflow's API.
_PARAM_CHARS, _TAG_CHARS, _KEY_CHARS = 6000, 8000, 250
_PARAMS_PER_CALL, _METRICS_PER_CALL = 100, 1000
_NOT_IN_NAMES = re.compile(r"[^\w.\- :/]")

_PARETO = "wsiflow.pareto"
_GIT_S = 5.0


class TrackingParams(BaseModel, frozen=True, extra="forbid"):
    """Where runs are recorded."""

    kind: Literal["mlflow", "off"] = Field(
        description="Where runs are recorded. mlflow: in an MLflow store. off: nowhere."
    )
    uri: StoreAddress = Field(
        min_length=1,
        description="Address of the MLflow store: sqlite:/// with the path of a database, which is made when absent, "
        "or that of a server.",
    )
    experiment: str = Field(
        min_length=1, max_length=500, description="Name of the MLflow experiment, which is made when absent."
    )
    sweep: str | None = Field(
        description="Name of the sweep: its runs are children of one parent run of this name. null: a single run."
    )
    timeout_s: int = Field(ge=1, le=600, description="Seconds that a server has to answer a request.")
    retries: int = Field(ge=0, le=7, description="How often a request that got no answer is sent again.")
    lock_wait_s: float = Field(
        ge=0, le=3600, description="Seconds to wait for another run that writes to the same SQLite store."
    )

    @field_serializer("uri", when_used="json")
    def _without_secrets(self, uri: str) -> str:
        """Return the address without secrets, for files and servers: their readers must not learn a password."""
        return without_secrets(uri)


@dataclass(frozen=True)
class RunRecord:
    """The content of one run in MLflow.

    Attributes:
        name: Name of the run in MLflow's lists.
        key: Identity of the run, letters and digits. A run is recorded once per key, so repeats that measure time need
            different keys.
        plan_hash: The plan's hash.
        partial: Whether slides are missing from the scores.
        params: Settings by dotted name.
        metrics: Metrics by name.
        tags: Further tags by name.
        dataset: Name and digest of the data set; the digest has at most 36 characters.
        artifacts: Paths of files, and of folders with all their files.
        figures: PNG bytes by file name.
        tables: Columns by file name, which ends in ``.json``; the columns of a table have equal length.
    """

    name: str
    key: str
    plan_hash: str
    partial: bool
    params: Mapping[str, Any]
    metrics: Mapping[str, float]
    tags: Mapping[str, str]
    dataset: tuple[str, str]
    artifacts: Sequence[Path]
    figures: Mapping[str, bytes]
    tables: Mapping[str, Mapping[str, Sequence[Any]]]


@dataclass(frozen=True)
class ComparisonRecord:
    """The content of a comparison in MLflow, which belongs to the parent run of a sweep.

    Attributes:
        pareto: Whether a run belongs to the Pareto set, by run id.
        metrics: Metrics of the comparison by name.
        tags: Tags of the comparison by name.
        common: Settings that all runs share, by name; they become tags that begin with ``common.``.
        description: Markdown that the page of the parent run shows.
        files: Bytes of the artifacts by name.
    """

    pareto: Mapping[str, bool]
    metrics: Mapping[str, float]
    tags: Mapping[str, str]
    common: Mapping[str, Any]
    description: str
    files: Mapping[str, bytes]


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


class LogResult(NamedTuple):
    """The id of a recorded MLflow run; or None, and the reason why it was not recorded, in one line."""

    run_id: str | None
    reason: str


def log_run(params: TrackingParams, record: RunRecord) -> LogResult:
    """Record a run, unless a finished record with the same key and completeness exists.

    Faults of the store raise nothing, since the run is complete without its record.

    Returns:
        The id of the new or existing record; or the reason why there is none: tracking is off, or the store failed.
    """
    if params.kind == "off":
        return LogResult(None, "tracking is off")
    known = _known_to_sqlite(params, record)
    logged = LogResult(known, "") if known else _with_store(params, lambda client: _log_once(client, params, record))
    if logged.run_id:
        _logger.info("MLflow run %s has the record, in %s", logged.run_id, without_secrets(params.uri))
    return logged


_KNOWN = """
    select runs.run_uuid from runs
    join experiments on experiments.experiment_id = runs.experiment_id
    join tags as keys on keys.run_uuid = runs.run_uuid and keys.key = 'wsiflow.key'
    join tags as parts on parts.run_uuid = runs.run_uuid and parts.key = 'wsiflow.partial'
    where runs.lifecycle_stage = 'active' and runs.status = 'FINISHED'
    and experiments.name = ? and experiments.lifecycle_stage = 'active' and keys.value = ? and parts.value = ?
"""


def _known_to_sqlite(params: TrackingParams, record: RunRecord) -> str | None:
    """Return the id of the finished record in a SQLite store; None where only MLflow can tell.

    Importing MLflow takes seconds, which restarting a complete run would otherwise cost each time. Where the tables of
    another version of MLflow do not answer the query, the record is looked up by MLflow.
    """
    database = _database(params.uri)
    if database is None or not database.exists():
        return None
    query = (params.experiment, record.key, _yes_no(record.partial))
    try:
        with closing(sqlite3.connect(f"{database.as_uri()}?mode=ro", uri=True)) as opened:
            row = opened.execute(_KNOWN, query).fetchone()
    except sqlite3.Error:
        return None
    return str(row[0]) if row else None


def begin_sweep(params: TrackingParams) -> str:
    """Create the store and the sweep's parent run before its trials start, which would otherwise all create them.

    Returns:
        The reason why the store failed; empty where it did not.
    """
    sweep = params.sweep
    if params.kind == "off" or sweep is None:
        return ""
    return _with_store(params, lambda client: _parent(client, _experiment(client, params), sweep)).reason


def _with_store(params: TrackingParams, record: Callable[["MlflowClient"], str]) -> LogResult:
    """Call ``record`` with a client of the store while holding its lock; it returns the id of the MLflow run."""
    _set_environment(params)
    from mlflow import MlflowClient

    try:
        params = params.model_copy(update={"uri": _whole(params.uri)})
        with _only_writer(params):
            return LogResult(record(MlflowClient(tracking_uri=params.uri)), "")
    except Exception as error:  # noqa: BLE001 - drivers of databases and of artifact stores have errors of their own
        # The run is complete on disk; an MLflow that cannot take its record must not make it fail.
        return LogResult(None, f"{without_secrets(params.uri)} did not take the record: {_one_line(error)}")


def tracked_runs(params: TrackingParams) -> list[TrackedRun]:
    """Return the finished and complete runs of an experiment, oldest first; of one folder only the latest record.

    Raises:
        InputError: The store or the experiment does not exist.
        EnvironmentFault: The store cannot be read.
    """
    database = _database(params.uri)
    if database is not None and not database.exists():
        raise InputError("there is no such MLflow store", "name an existing one with --uri", path=database)
    with _readable(params) as client:
        experiment = client.get_experiment_by_name(params.experiment)
        if experiment is None:
            known = ", ".join(sorted(one.name for one in client.search_experiments()))
            cause = f"{without_secrets(params.uri)} has no experiment {params.experiment!r}"
            raise InputError(cause, f"name one of: {known}; or folders of finished runs")
        runs = [_tracked_run(run) for run in _all_runs(client, experiment.experiment_id, _COMPLETE)]
    # A folder whose scores changed (a slide was added, an outline was corrected) has a record of each state.
    return list({run.tags.get("wsiflow.folder", run.run_id): run for run in runs}.values())


def download(params: TrackingParams, run_id: str, name: str, folder: Path) -> Path:
    """Download one artifact of a run into a folder and return its path.

    Raises:
        EnvironmentFault: The artifact does not exist, or the store cannot be read.
    """
    with _readable(params) as client:
        return Path(client.download_artifacts(run_id, name, str(folder)))


def log_comparison(params: TrackingParams, record: ComparisonRecord) -> LogResult:
    """Tag the runs of a sweep with ``wsiflow.pareto`` (``yes`` or ``no``), and log the comparison to its parent run.

    The record of an earlier comparison is replaced. Faults of the store raise nothing.
    """
    sweep = params.sweep
    if params.kind == "off" or sweep is None:
        return LogResult(None, "tracking is off" if params.kind == "off" else "the runs are of no sweep")
    return _with_store(params, lambda client: _log_comparison(client, params, sweep, record))


def _one_line(error: Exception) -> str:
    if isinstance(error, OSError) and faults.number(error):
        error = faults.fault(error)
    text = without_secrets(" ".join(str(error).split()))
    return text[:300] if isinstance(error, EnvironmentFault) else f"{type(error).__name__}: {text}"[:300]


def _set_environment(params: TrackingParams) -> None:
    """Configure mlflow before it is imported: no telemetry, no pickles, few messages, and timeouts of a server."""
    os.environ |= {
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "DO_NOT_TRACK": "true",
        "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
        "MLFLOW_HTTP_REQUEST_TIMEOUT": str(params.timeout_s),
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": str(params.retries),
    }
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")


def _whole(uri: str) -> str:
    """Return an address with the secrets that were removed from it, taken from the environment.

    The folder of a run stores no secrets, so `wsiflow retry` reads an address without them.

    Raises:
        EnvironmentFault: The environment does not have the secrets.
    """
    known = os.environ.get("MLFLOW_TRACKING_URI", "")
    if REDACTED not in uri or without_secrets(known) == uri:
        return known if REDACTED in uri else uri
    if "MLFLOW_TRACKING_PASSWORD" in os.environ or "MLFLOW_TRACKING_TOKEN" in os.environ:
        bare = uri.replace(f"//{REDACTED}@", "//")
        if REDACTED not in bare:
            return bare
    cause = "the password of the MLflow store is not stored in the run's folder"
    raise EnvironmentFault(cause, "set MLFLOW_TRACKING_URI to the whole address, then run the same command again")


def _database(uri: str) -> Path | None:
    """Return the absolute path of a SQLite store, None for a server."""
    if not uri.startswith(SQLITE):
        return None
    return Path(uri.removeprefix(SQLITE).partition("?")[0]).resolve()


@contextmanager
def _only_writer(params: TrackingParams) -> Iterator[None]:
    """Hold the lock file beside a SQLite store, so that one process writes at a time; a server needs no lock."""
    database = _database(params.uri)
    if database is None:
        yield
        return
    database.parent.mkdir(parents=True, exist_ok=True)
    with database.with_name(f"{database.name}.lock").open("a") as handle:
        try:
            _lock(handle.fileno(), params.lock_wait_s)
        except OSError as error:
            if isinstance(error, TimeoutError):
                raise
            cause = f"the lock beside the store cannot be taken ({faults.cause(error)})"
            remedy = "name a store on a disk with a lock service, or a server, as tracking.uri"
            raise EnvironmentFault(cause, remedy, path=handle.name) from error
        yield


def _lock(descriptor: int, wait_s: float) -> None:
    """Take an exclusive lock on an open file; the system releases it when the file is closed or the process dies.

    Raises:
        TimeoutError: The lock was not free within ``wait_s`` seconds.
    """
    end = time.monotonic() + wait_s
    while True:
        try:
            return fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            if time.monotonic() > end:
                raise TimeoutError(f"another run has kept it locked for {wait_s:g} s") from error
            time.sleep(0.1)


_COMPLETE = "tags.`wsiflow.role` = 'run' and tags.`wsiflow.partial` = 'no' and attributes.status = 'FINISHED'"


@contextmanager
def _readable(params: TrackingParams) -> Iterator["MlflowClient"]:
    """Yield a client that reads the store, and raise any error of the store as an `EnvironmentFault`."""
    _set_environment(params)
    from mlflow import MlflowClient

    try:
        params = params.model_copy(update={"uri": _whole(params.uri)})
        with _only_writer(params):
            yield MlflowClient(tracking_uri=params.uri)
    except WsiflowError:
        raise
    except Exception as error:
        cause = f"{without_secrets(params.uri)} cannot be read: {_one_line(error)}"
        raise EnvironmentFault(cause, "check that the store exists and try again", stage="tracking") from error


def _all_runs(client: "MlflowClient", experiment_id: str, which: str) -> list[Any]:
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


def _log_comparison(client: "MlflowClient", params: TrackingParams, sweep: str, record: ComparisonRecord) -> str:
    """Replace the comparison of a sweep and return the id of its parent run."""
    from mlflow.entities import Metric, RunTag

    experiment_id = _experiment(client, params)
    parent = _parent(client, experiment_id, sweep)
    for run in _all_runs(client, experiment_id, f"tags.`mlflow.parentRunId` = '{parent}'"):
        run_id = run.info.run_id
        if run_id in record.pareto:
            client.set_tag(run_id, _PARETO, _yes_no(record.pareto[run_id]))
        elif _PARETO in run.data.tags:
            client.delete_tag(run_id, _PARETO)
    common = {f"common.{key}": str(value) for key, value in redacted(record.common).items()}
    texts = {**record.tags, **common, "mlflow.note.content": record.description}
    for key in client.get_run(parent).data.tags:
        if key.startswith("common.") and _name(key) not in map(_name, common):
            client.delete_tag(parent, key)
    tags = [RunTag(_name(key), text[:_TAG_CHARS]) for key, text in texts.items()]
    now_ms = int(time.time() * 1000)
    metrics = [Metric(_name(key), value, now_ms, 0) for key, value in _finite(record.metrics).items()]
    for first in range(0, len(tags), _PARAMS_PER_CALL):
        client.log_batch(parent, tags=tags[first : first + _PARAMS_PER_CALL])
    client.log_batch(parent, metrics=metrics)
    _log_bytes(client, parent, record.files)
    return parent


def _log_once(client: "MlflowClient", params: TrackingParams, record: RunRecord) -> str:
    experiment_id = _experiment(client, params)
    existing = _finished(client, experiment_id, record.key, partial=record.partial)
    if existing is not None:
        return existing
    _delete_unfinished(client, experiment_id, record)
    tags = _tags(record)
    if params.sweep is not None:
        tags |= {"wsiflow.sweep": params.sweep, "mlflow.parentRunId": _parent(client, experiment_id, params.sweep)}
    run_id: str = client.create_run(experiment_id, tags=tags, run_name=record.name).info.run_id
    _log_numbers(client, run_id, record)
    _log_files(client, run_id, record)
    client.set_terminated(run_id, "FINISHED")
    return run_id


def _experiment(client: "MlflowClient", params: TrackingParams) -> str:
    """Return the id of the experiment, created if absent; in SQLite its artifacts lie beside the database."""
    experiment = client.get_experiment_by_name(params.experiment)
    if experiment is not None:
        return str(experiment.experiment_id)
    database = _database(params.uri)
    location = None if database is None else (database.parent / "mlflow-artifacts").as_uri()
    return str(client.create_experiment(params.experiment, artifact_location=location))


def _finished(client: "MlflowClient", experiment_id: str, key: str, *, partial: bool) -> str | None:
    same = f"tags.`wsiflow.key` = '{key}' and tags.`wsiflow.partial` = '{_yes_no(partial)}'"
    runs = client.search_runs([experiment_id], f"{same} and attributes.status = 'FINISHED'", max_results=1)
    return str(runs[0].info.run_id) if runs else None


def _delete_unfinished(client: "MlflowClient", experiment_id: str, record: RunRecord) -> None:
    """Delete the unfinished MLflow runs of earlier attempts to record the same run."""
    unfinished = f"tags.`wsiflow.key` = '{record.key}' and attributes.status != 'FINISHED'"
    for run in client.search_runs([experiment_id], unfinished):
        client.delete_run(run.info.run_id)


def _parent(client: "MlflowClient", experiment_id: str, sweep: str) -> str:
    """Return the id of the sweep's parent run, created if absent."""
    for run in client.search_runs([experiment_id], "tags.`wsiflow.role` = 'sweep'"):
        if run.data.tags["wsiflow.sweep"] == sweep:
            return str(run.info.run_id)
    tags = {"wsiflow.role": "sweep", "wsiflow.sweep": sweep}
    run_id: str = client.create_run(experiment_id, tags=tags, run_name=sweep).info.run_id
    client.set_terminated(run_id, "FINISHED")
    return run_id


def _tags(record: RunRecord) -> dict[str, str]:
    own = {
        "wsiflow.role": "run",
        "wsiflow.key": record.key,
        "wsiflow.plan_hash": record.plan_hash,
        "wsiflow.partial": _yes_no(record.partial),
        "wsiflow.version": version("wsiflow"),
        "wsiflow.metrics_without_value": ", ".join(sorted(set(record.metrics) - set(_finite(record.metrics)))),
    }
    commit = _git_commit(Path(__file__).parents[2])
    own |= {"mlflow.source.git.commit": commit} if commit else {}
    return {name: text[:_TAG_CHARS] for name, text in {**redacted(record.tags), **own}.items()}


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


def _log_numbers(client: "MlflowClient", run_id: str, record: RunRecord) -> None:
    from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param

    name, digest = record.dataset
    # MLflow cannot read slides: as for such data in its own client, the source is only a name.
    slides = Dataset(_name(name), digest, "wsiflow", "{}")
    client.log_inputs(run_id, [DatasetInput(slides, [InputTag("mlflow.data.context", "test")])])
    now_ms = int(time.time() * 1000)
    params = [Param(_name(key), str(value)[:_PARAM_CHARS]) for key, value in redacted(record.params).items()]
    metrics = [Metric(_name(key), value, now_ms, 0) for key, value in _finite(record.metrics).items()]
    for first in range(0, len(params), _PARAMS_PER_CALL):
        client.log_batch(run_id, params=params[first : first + _PARAMS_PER_CALL])
    for first in range(0, len(metrics), _METRICS_PER_CALL):
        client.log_batch(run_id, metrics=metrics[first : first + _METRICS_PER_CALL])


def _log_files(client: "MlflowClient", run_id: str, record: RunRecord) -> None:
    for path in record.artifacts:
        if path.is_dir():
            client.log_artifacts(run_id, str(path), path.name)
        else:
            client.log_artifact(run_id, str(path))
    for name, columns in record.tables.items():
        client.log_table(run_id, dict(columns), name)
    _log_bytes(client, run_id, record.figures, "figures")


def _log_bytes(client: "MlflowClient", run_id: str, files: Mapping[str, bytes], folder: str | None = None) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        for name, data in files.items():
            (Path(scratch) / name).write_bytes(data)
        client.log_artifacts(run_id, scratch, folder)
