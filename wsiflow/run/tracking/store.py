"""The MLflow store: where it is, how it is opened, and what is said of one that cannot be used.

The store is a SQLite database with its artifacts beside it, or a server. A writer of a SQLite store holds a lock file
beside it, since several first starts would otherwise create the tables at the same time.
"""

import fcntl
import logging
import os
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import unquote, urlsplit

from pydantic import BaseModel, Field, field_serializer

from wsiflow.errors import EnvironmentFault, InputError, WsiflowError
from wsiflow.redaction import REDACTED, without_secrets
from wsiflow.run.tracking.records import LogResult
from wsiflow.system import faults
from wsiflow.system.paths import SQLITE, StoreAddress, is_same

if TYPE_CHECKING:
    from mlflow import MlflowClient

_DEFAULT = f"{SQLITE}runs/mlflow.db"
_ARTIFACTS = "mlflow-artifacts"  # beside the database
# Loggers of MLflow that write a traceback for each try at a database that is locked: one line of ours says as much.
_LOUD = ("mlflow.store.db.utils", "mlflow.store.tracking.sqlalchemy_store", "alembic")


class TrackingParams(BaseModel, frozen=True, extra="forbid"):
    """Where runs are recorded."""

    kind: Literal["mlflow", "off"] = Field(
        description="Where runs are recorded. mlflow: in an MLflow store. off: nowhere."
    )
    uri: StoreAddress = Field(
        min_length=1,
        description="Address of the MLflow store: sqlite:/// with the path of a database, which is made when absent, "
        "or that of a server. Without it that of MLFLOW_TRACKING_URI, else runs/mlflow.db in the working folder.",
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
        ge=0, le=3600, description="Seconds to wait for another program that writes to the same SQLite store."
    )

    @field_serializer("uri", when_used="json")
    def _without_secrets(self, uri: str) -> str:
        """Return the address without secrets, for files and servers: their readers must not learn a password."""
        return without_secrets(uri)


def default_uri() -> str:
    """Return the address of the store where none is given; ``conf/tracking/mlflow.yaml`` asks for it."""
    return os.environ.get("MLFLOW_TRACKING_URI") or _DEFAULT


def database(uri: str) -> Path | None:
    """Return the absolute path of a SQLite store, None for a server.

    Raises:
        EnvironmentFault: The path has a question mark, after which SQLite's addresses have options.
    """
    if not uri.startswith(SQLITE):
        return None
    path, _, options = uri.removeprefix(SQLITE).partition("?")
    if "/" in options:
        cause = f"a path with a question mark cannot be the address of a SQLite store ({uri.removeprefix(SQLITE)})"
        raise EnvironmentFault(cause, "name another as tracking.uri, or a server", stage="tracking")
    return Path(path).resolve()


def with_store(params: TrackingParams, record: Callable[["MlflowClient"], LogResult]) -> LogResult:
    """Call ``record`` with a client of the store while holding its lock; faults become the reason of the result."""
    try:
        with _opened(params) as client:
            return record(client)
    except Exception as error:  # noqa: BLE001 - drivers of databases and of artifact stores have errors of their own
        # The run is complete on disk; an MLflow that cannot take its record must not make it fail.
        return LogResult(None, f"{without_secrets(params.uri)} did not take the record: {one_line(error)}")


@contextmanager
def readable(params: TrackingParams) -> Iterator["MlflowClient"]:
    """Yield a client that reads the store, and raise any error of the store as an `EnvironmentFault`."""
    try:
        with _opened(params) as client:
            yield client
    except WsiflowError:
        raise
    except Exception as error:
        cause = f"{without_secrets(params.uri)} cannot be read: {one_line(error)}"
        raise EnvironmentFault(cause, "check that the store exists and try again", stage="tracking") from error


@contextmanager
def _opened(params: TrackingParams) -> Iterator["MlflowClient"]:
    _set_environment(params)
    from mlflow import MlflowClient

    params = params.model_copy(update={"uri": whole(params.uri)})
    with only_writer(params), _quiet():
        _create_whole(database(params.uri))
        yield MlflowClient(tracking_uri=_patient(params))


def _create_whole(path: Path | None) -> None:
    """Create a SQLite store that is not there under another name: of half a one MLflow could make nothing any more."""
    if path is None or path.exists():
        return
    from mlflow import MlflowClient

    draft = path.with_name(f".{path.name}.new")
    for left in (draft, draft.with_name(f"{draft.name}-journal")):  # by a process that was killed
        left.unlink(missing_ok=True)
    draft.touch()  # who may write to it follows from the umask; of a file that SQLite makes, only its owner may
    MlflowClient(tracking_uri=f"{SQLITE}{draft}").search_experiments(max_results=1)
    draft.replace(path)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep MLflow from writing the tracebacks of errors that are raised as well."""
    loggers = [logging.getLogger(name) for name in _LOUD]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _set_environment(params: TrackingParams) -> None:
    """Configure mlflow before it is imported: no telemetry, no pickles, few messages, and timeouts of a server."""
    os.environ |= {
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "DO_NOT_TRACK": "true",
        "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
        "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
        "MLFLOW_HTTP_REQUEST_TIMEOUT": str(params.timeout_s),
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": str(params.retries),
    }
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")


def whole(uri: str) -> str:
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


def one_line(error: Exception) -> str:
    """Return an error in one line of at most 300 characters, without secrets."""
    if isinstance(error, OSError) and faults.number(error):
        error = faults.fault(error)
    text = without_secrets(" ".join(str(error).split()))
    return text[:300] if isinstance(error, WsiflowError) else f"{type(error).__name__}: {text}"[:300]


# --- the locks of a SQLite store


@contextmanager
def only_writer(params: TrackingParams) -> Iterator[None]:
    """Hold the lock file beside a SQLite store, so that one process writes at a time; a server needs no lock."""
    path = database(params.uri)
    if path is None:
        yield
        return
    end = time.monotonic() + params.lock_wait_s
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(f"{path.name}.lock").open("a") as handle:
        try:
            _lock(handle.fileno(), end, params.lock_wait_s)
        except OSError as error:
            cause = f"the lock beside the store cannot be taken ({faults.cause(error)})"
            remedy = "name a store on a disk with a lock service, or a server, as tracking.uri"
            raise EnvironmentFault(cause, remedy, path=handle.name) from error
        if path.exists():
            _wait_until_free(path, end, params.lock_wait_s)
        yield


def _lock(descriptor: int, end: float, wait_s: float) -> None:
    """Take an exclusive lock on an open file; the system releases it when the file is closed or the process dies.

    Raises:
        EnvironmentFault: The lock was not free in time.
    """
    while True:
        try:
            return fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            if time.monotonic() > end:
                raise _locked(wait_s) from error
            time.sleep(0.1)


def _wait_until_free(path: Path, end: float, wait_s: float) -> None:
    """Wait until no other program holds SQLite's own lock of a database: MLflow waits for seconds alone.

    Raises:
        EnvironmentFault: The database was not free in time.
    """
    try:
        with closing(sqlite3.connect(path, timeout=max(0.0, end - time.monotonic()))) as opened:
            opened.execute("begin immediate")
            opened.rollback()
    except sqlite3.OperationalError as error:
        if "locked" in str(error):
            raise _locked(wait_s) from error
    except sqlite3.Error:  # MLflow says what is wrong with the file
        return


def _locked(wait_s: float) -> EnvironmentFault:
    cause = f"another program has kept it locked for {wait_s:g} s (tracking.lock_wait_s)"
    return EnvironmentFault(cause, "run the same command again to record it")


def _patient(params: TrackingParams) -> str:
    """Return the address with the time that SQLite waits for a lock, unless it has options of its own."""
    is_plain = params.uri.startswith(SQLITE) and "?" not in params.uri
    return f"{params.uri}?timeout={params.lock_wait_s:g}" if is_plain else params.uri


# --- experiments


def experiment_id(client: "MlflowClient", params: TrackingParams) -> str:
    """Return the id of the experiment, created if absent; in SQLite its artifacts lie beside the database.

    Raises:
        InputError: The experiment was deleted, or its artifacts do not lie beside the database any more.
    """
    found = client.get_experiment_by_name(params.experiment)
    if found is not None:
        return usable(found, params)
    path = database(params.uri)
    location = None if path is None else (path.parent / _ARTIFACTS).as_uri()
    return str(client.create_experiment(params.experiment, artifact_location=location))


def usable(found: Any, params: TrackingParams) -> str:
    """Return the id of an experiment that can be used.

    Raises:
        InputError: The experiment was deleted, or its artifacts do not lie beside the database any more.
    """
    if found.lifecycle_stage != "active":
        restore = f"MLFLOW_TRACKING_URI={without_secrets(params.uri)} mlflow experiments restore --experiment-id"
        cause = f"the experiment {params.experiment!r} was deleted"
        raise InputError(cause, f"restore it ({restore} {found.experiment_id}), or name another experiment")
    path, location = database(params.uri), _local(found.artifact_location)
    if path and location and location.name == _ARTIFACTS and not _is_beside(location, path):
        cause = f"the experiment {params.experiment!r} keeps its files in {location}, which is not beside {path}"
        raise InputError(cause, "move the store and its files back together, or name another experiment")
    return str(found.experiment_id)


def _local(location: str) -> Path | None:
    """Return the folder that the address of artifacts names; None for one that is not a local folder."""
    parts = urlsplit(location)
    return Path(unquote(parts.path)) if parts.scheme in {"", "file"} else None


def _is_beside(location: Path, path: Path) -> bool:
    return location.parent.resolve() == path.parent or is_same(location.parent, path.parent)
