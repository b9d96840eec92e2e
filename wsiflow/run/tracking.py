"""One MLflow run per pipeline run, and what is found by comparing them. The only module that uses mlflow.

Input: a finished run's numbers, figures, tables and files. Output: the id of its MLflow run, or why there is none; and
the records of an experiment.

Conventions:

* MLflow is a view. Nothing is decided from it, workers never talk to it, and a store that cannot be reached costs
  seconds and one warning: the run's own files stay the truth, and logging again later gives the same record once.
* Only a SQLite store beside its artifacts, or a server. Whoever writes to a SQLite store holds a lock file beside it:
  several first starts would otherwise create the tables at the same time.
* A metric without a finite value is left out and named in the tag ``wsiflow.metrics_without_value``.
* What looks like a secret is replaced before it is sent, see `wsiflow.redaction`.
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
    """Where runs are recorded.

    Attributes:
        kind: ``mlflow``, or ``off`` to record nothing.
        uri: ``sqlite:///`` with the path of a database, which is made when absent, or the address of a server.
        experiment: Name of the MLflow experiment; it is made when absent.
        sweep: Runs of one sweep are children of one parent run of this name; None for a single run.
        timeout_s: Seconds a server has to answer a request.
        retries: How often a request is sent again.
        lock_wait_s: Seconds to wait for another run that writes to the same SQLite store.
    """

    kind: Literal["mlflow", "off"]
    uri: StoreAddress = Field(min_length=1)
    experiment: str = Field(min_length=1, max_length=500)
    sweep: str | None
    timeout_s: int = Field(ge=1, le=600)
    retries: int = Field(ge=0, le=7)
    lock_wait_s: float = Field(ge=0, le=3600)

    @field_serializer("uri", when_used="json")
    def _without_secrets(self, uri: str) -> str:
        """Return the address as files and servers may have it: whoever reads it there must not learn a password."""
        return without_secrets(uri)


@dataclass(frozen=True)
class RunRecord:
    """What is told about one run.

    Attributes:
        name: Name of the run in MLflow's lists.
        key: What makes two runs the same, letters and digits: the plan's hash. A run is recorded once per key, so
            repeats made to measure time need a key each.
        plan_hash: The plan's hash.
        partial: Whether slides are missing from the scores.
        params: Settings by dotted name.
        metrics: Numbers by name.
        tags: More tags.
        dataset: Name and digest of the slides, at most 36 characters.
        artifacts: Files, and folders with all they hold.
        figures: PNG bytes by file name.
        tables: Columns by file name, which ends in ``.json``; the columns of a table are equally long.
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
    """What is told about the runs of a sweep together.

    Attributes:
        pareto: Whether a run belongs to the Pareto set, by run id.
        metrics: Numbers of the comparison by name.
        tags: Texts about it by name.
        common: What all runs have in common by name; it becomes tags that begin with ``common.``.
        description: Markdown that the page of the parent run shows.
        files: Bytes of the artifacts by name.
    """

    pareto: Mapping[str, bool]
    metrics: Mapping[str, float]
    tags: Mapping[str, str]
    common: Mapping[str, Any]
    description: str
    files: Mapping[str, bytes]


class Recorded(NamedTuple):
    """A complete run as MLflow has it.

    Attributes:
        run_id: Its id.
        name: Its name.
        sweep: Name of its sweep, or empty.
        params, metrics, tags: By name.
    """

    run_id: str
    name: str
    sweep: str
    params: Mapping[str, str]
    metrics: Mapping[str, float]
    tags: Mapping[str, str]


class Logged(NamedTuple):
    """The id of the MLflow run, or None and the reason in one line."""

    run_id: str | None
    reason: str


def log_run(params: TrackingParams, record: RunRecord) -> Logged:
    """Record a run, unless a finished record with its key and completeness is there; never raises for the store.

    Returns:
        The id of the new or existing record; or None and the reason when tracking is off or the store failed.
    """
    if params.kind == "off":
        return Logged(None, "tracking is off")
    known = _known_to_sqlite(params, record)
    logged = Logged(known, "") if known else _with_store(params, lambda client: _log_once(client, params, record))
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
    """Return the id of the finished record in a SQLite store, None where MLflow has to be asked.

    To import MLflow takes seconds, and a run that is looked at again, complete, has nothing to tell it. What this
    version of MLflow's tables does not answer, MLflow does.
    """
    database = _database(params.uri)
    if database is None or not database.exists():
        return None
    wanted = (params.experiment, record.key, _yes_no(record.partial))
    try:
        with closing(sqlite3.connect(f"{database.as_uri()}?mode=ro", uri=True)) as opened:
            found = opened.execute(_KNOWN, wanted).fetchone()
    except sqlite3.Error:
        return None
    return str(found[0]) if found else None


def begin_sweep(params: TrackingParams) -> str:
    """Make the store and the sweep's parent, before runs that are recorded at the same time would all make them.

    Returns:
        Why the store did not take it, else nothing.
    """
    sweep = params.sweep
    if params.kind == "off" or sweep is None:
        return ""
    return _with_store(params, lambda client: _parent(client, _experiment(client, params), sweep)).reason


def _with_store(params: TrackingParams, record: Callable[["MlflowClient"], str]) -> Logged:
    """Record something, whose id ``record`` returns."""
    _set_environment(params)
    from mlflow import MlflowClient

    try:
        params = params.model_copy(update={"uri": _whole(params.uri)})
        with _only_writer(params):
            return Logged(record(MlflowClient(tracking_uri=params.uri)), "")
    except Exception as error:  # noqa: BLE001 - drivers of databases and of artifact stores have errors of their own
        # The run is complete on disk; an MLflow that cannot take its record must not make it fail.
        return Logged(None, f"{without_secrets(params.uri)} did not take the record: {_one_line(error)}")


def find_run(params: TrackingParams, key: str, *, partial: bool) -> str | None:
    """Return the id of the finished record with this key and completeness, or None.

    Raises:
        MlflowException: The store cannot be read.
        TimeoutError: Another run kept the SQLite store locked for longer than ``lock_wait_s``.
    """
    _set_environment(params)
    from mlflow import MlflowClient

    with _only_writer(params):
        client = MlflowClient(tracking_uri=params.uri)
        experiment = client.get_experiment_by_name(params.experiment)
        return None if experiment is None else _finished(client, experiment.experiment_id, key, partial=partial)


def recorded(params: TrackingParams) -> list[Recorded]:
    """Return the finished and complete runs of an experiment, oldest first; of a folder's runs the latest alone.

    Raises:
        InputError: There is no such store or experiment.
        EnvironmentFault: The store cannot be read.
    """
    database = _database(params.uri)
    if database is not None and not database.exists():
        raise InputError("there is no such file", "name an MLflow store with --uri", path=database)
    with _readable(params) as client:
        experiment = client.get_experiment_by_name(params.experiment)
        if experiment is None:
            known = ", ".join(sorted(one.name for one in client.search_experiments()))
            cause = f"{without_secrets(params.uri)} has no experiment {params.experiment!r}"
            raise InputError(cause, f"name one of: {known}; or folders of finished runs")
        runs = [_recorded(run) for run in _all_runs(client, experiment.experiment_id, _COMPLETE)]
    # A folder whose scores changed (a slide joined, an outline was corrected) has a record of each state.
    return list({run.tags.get("wsiflow.folder", run.run_id): run for run in runs}.values())


def download(params: TrackingParams, run_id: str, name: str, folder: Path) -> Path:
    """Fetch one artifact of a run into a folder and return its path.

    Raises:
        EnvironmentFault: The store has no such artifact, or cannot be read.
    """
    with _readable(params) as client:
        return Path(client.download_artifacts(run_id, name, str(folder)))


def log_comparison(params: TrackingParams, record: ComparisonRecord) -> Logged:
    """Tell a sweep's runs whether they belong to the Pareto set, and its parent the rest; never raises for the store.

    What an earlier comparison said is replaced. The tag ``wsiflow.pareto`` is ``yes`` or ``no``.
    """
    sweep = params.sweep
    if params.kind == "off" or sweep is None:
        return Logged(None, "tracking is off" if params.kind == "off" else "the runs are of no sweep")
    return _with_store(params, lambda client: _log_comparison(client, params, sweep, record))


def _one_line(error: Exception) -> str:
    if isinstance(error, OSError) and faults.number(error):
        error = faults.fault(error)
    text = without_secrets(" ".join(str(error).split()))
    return text[:300] if isinstance(error, EnvironmentFault) else f"{type(error).__name__}: {text}"[:300]


def _set_environment(params: TrackingParams) -> None:
    """Tell mlflow, before it is imported: no telemetry, no pickles, no chatter, and when to give up on a server."""
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
    """Return an address with the secrets that were taken out of it, where the environment has them.

    The folder of a run keeps none, so that `wsiflow retry` finds none there.

    Raises:
        EnvironmentFault: It has not.
    """
    known = os.environ.get("MLFLOW_TRACKING_URI", "")
    if REDACTED not in uri or without_secrets(known) == uri:
        return known if REDACTED in uri else uri
    if "MLFLOW_TRACKING_PASSWORD" in os.environ or "MLFLOW_TRACKING_TOKEN" in os.environ:
        bare = uri.replace(f"//{REDACTED}@", "//")
        if REDACTED not in bare:
            return bare
    cause = "its password is not kept in the run's folder"
    raise EnvironmentFault(cause, "set MLFLOW_TRACKING_URI to the whole address, then run the same command again")


def _database(uri: str) -> Path | None:
    """Return the absolute path of a SQLite store, None for a server."""
    if not uri.startswith(SQLITE):
        return None
    return Path(uri.removeprefix(SQLITE).partition("?")[0]).resolve()


@contextmanager
def _only_writer(params: TrackingParams) -> Iterator[None]:
    """Hold the lock beside a SQLite store; a server does its own locking."""
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
    """Take an exclusive lock, which the system returns when the file is closed or the process dies.

    Raises:
        TimeoutError: It was not free within ``wait_s`` seconds.
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
    """Give a client that reads; what the store refuses becomes a fault of the environment."""
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
        raise EnvironmentFault(cause, "see that it is there and try again", stage="tracking") from error


def _all_runs(client: "MlflowClient", experiment_id: str, which: str) -> list[Any]:
    """Return every run that a filter finds, oldest first."""
    found: list[Any] = []
    token = None
    while True:
        page = client.search_runs(
            [experiment_id], which, order_by=["attributes.start_time ASC"], max_results=1000, page_token=token
        )
        found += page
        token = page.token
        if not token:
            return found


def _recorded(run: Any) -> Recorded:
    tags = dict(run.data.tags)
    sweep = tags.get("wsiflow.sweep", "")
    return Recorded(run.info.run_id, run.info.run_name, sweep, dict(run.data.params), dict(run.data.metrics), tags)


def _log_comparison(client: "MlflowClient", params: TrackingParams, sweep: str, record: ComparisonRecord) -> str:
    """Replace what is said of a sweep and return the id of its parent."""
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
    told = {**record.tags, **common, "mlflow.note.content": record.description}
    for key in client.get_run(parent).data.tags:
        if key.startswith("common.") and _name(key) not in map(_name, common):
            client.delete_tag(parent, key)
    tags = [RunTag(_name(key), text[:_TAG_CHARS]) for key, text in told.items()]
    now_ms = int(time.time() * 1000)
    metrics = [Metric(_name(key), value, now_ms, 0) for key, value in _finite(record.metrics).items()]
    for first in range(0, len(tags), _PARAMS_PER_CALL):
        client.log_batch(parent, tags=tags[first : first + _PARAMS_PER_CALL])
    client.log_batch(parent, metrics=metrics)
    _log_bytes(client, parent, record.files)
    return parent


def _log_once(client: "MlflowClient", params: TrackingParams, record: RunRecord) -> str:
    experiment_id = _experiment(client, params)
    found = _finished(client, experiment_id, record.key, partial=record.partial)
    if found is not None:
        return found
    _drop_remains(client, experiment_id, record)
    tags = _tags(record)
    if params.sweep is not None:
        tags |= {"wsiflow.sweep": params.sweep, "mlflow.parentRunId": _parent(client, experiment_id, params.sweep)}
    run_id: str = client.create_run(experiment_id, tags=tags, run_name=record.name).info.run_id
    _log_numbers(client, run_id, record)
    _log_files(client, run_id, record)
    client.set_terminated(run_id, "FINISHED")
    return run_id


def _experiment(client: "MlflowClient", params: TrackingParams) -> str:
    """Return the id of the experiment; a new one on SQLite keeps its artifacts beside the database."""
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


def _drop_remains(client: "MlflowClient", experiment_id: str, record: RunRecord) -> None:
    """Delete what an earlier attempt to record the same run left unfinished."""
    unfinished = f"tags.`wsiflow.key` = '{record.key}' and attributes.status != 'FINISHED'"
    for run in client.search_runs([experiment_id], unfinished):
        client.delete_run(run.info.run_id)


def _parent(client: "MlflowClient", experiment_id: str, sweep: str) -> str:
    """Return the id of the sweep's parent run, made when absent."""
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
    """Return the commit of a source checkout; empty for an installed package, and where git does not tell."""
    command = ["git", "-C", str(checkout), "rev-parse", "--verify", "HEAD"]
    quiet = {**os.environ, "GIT_TERMINAL_PROMPT": "0", "GIT_OPTIONAL_LOCKS": "0"}
    try:
        if not (checkout / ".git").exists():
            return ""
        told = subprocess.run(
            command, capture_output=True, stdin=subprocess.DEVNULL, env=quiet, timeout=_GIT_S, check=True
        )
    except (OSError, subprocess.SubprocessError):  # a record without a commit is better than none
        return ""
    commit = told.stdout.decode("ascii", "replace").strip()
    return commit if re.fullmatch(r"[0-9a-f]{40,64}", commit) else ""


def _yes_no(flag: bool) -> str:  # noqa: FBT001 - the text of a flag
    return "yes" if flag else "no"


def _finite(metrics: Mapping[str, float]) -> dict[str, float]:
    return {name: float(value) for name, value in metrics.items() if math.isfinite(value)}


def _name(text: str) -> str:
    """Return a name with the characters and the length that MLflow takes."""
    return _NOT_IN_NAMES.sub("_", text)[:_KEY_CHARS]


def _log_numbers(client: "MlflowClient", run_id: str, record: RunRecord) -> None:
    from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param

    name, digest = record.dataset
    # What MLflow's own client sends for slides it cannot read: a source that is a name and nothing more.
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
    with tempfile.TemporaryDirectory() as passing:
        for name, data in files.items():
            (Path(passing) / name).write_bytes(data)
        client.log_artifacts(run_id, passing, folder)
