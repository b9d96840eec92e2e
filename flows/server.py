"""Which Prefect server a run reports to."""

import fcntl
import os
import re
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from http import HTTPStatus
from pathlib import Path
from typing import IO

import httpx
from prefect.client.orchestration import get_client
from prefect.events.worker import EventsWorker
from prefect.exceptions import PrefectHTTPStatusError
from prefect.logging.handlers import APILogHandler
from prefect.settings import (
    PREFECT_API_REQUEST_TIMEOUT,
    PREFECT_API_URL,
    PREFECT_CLIENT_MAX_RETRIES,
    PREFECT_HOME,
    get_current_settings,
    temporary_settings,
)

from wsiflow.errors import EnvironmentFault

_HEALTH_TIMEOUT_S = 10.0  # of a server that is there and busy; where there is none the answer comes at once
_START_TIMEOUT_S = 120.0
_END_S = 10.0
_ERROR = re.compile(r"(?:[\w.]+\.)?\w*(?:Error|Exception)\b")
_REFUSED = {HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN}


@contextmanager
def chosen_server() -> Iterator[str]:
    """Make sure that Prefect can record a flow, and say in one line where.

    Without a server that answers, a temporary one is started for this process, and for trials that it starts, which
    find its address in the environment. The run works the same and its history stays in Prefect's own database, but
    there is no page to look at while it runs.

    Raises:
        EnvironmentFault: The server that is set refuses this user, or a temporary one does not start.
    """
    url = PREFECT_API_URL.value()
    if url and answers(url):
        yield f"Prefect server: {url}"
        return
    found = f"no Prefect server answers at {url}" if url else "no Prefect server is set"
    with (
        _own_database() as (where, lock),
        _temporary_server(lock) as api,
        _environment("PREFECT_API_URL", api),
        temporary_settings({PREFECT_API_URL: api}),
    ):
        try:
            yield f"{found}: going on with a temporary one{where} (make prefect starts a lasting one)"
        finally:
            _send_what_waits()


def answers(url: str) -> bool:
    """Tell whether a Prefect server is there; it is asked as Prefect's own client asks, with key and certificates.

    Raises:
        EnvironmentFault: It is there and refuses this user.
    """
    if not url:
        return False
    asked = {PREFECT_API_URL: url, PREFECT_API_REQUEST_TIMEOUT: _HEALTH_TIMEOUT_S, PREFECT_CLIENT_MAX_RETRIES: 0}
    try:
        with temporary_settings(asked), get_client(sync_client=True) as client:
            client.read_flows(limit=1)  # the health of a server is told to anybody
    except (httpx.HTTPError, PrefectHTTPStatusError, OSError, RuntimeError, ValueError) as error:
        answer = getattr(error, "response", None)
        if answer is not None and answer.status_code in _REFUSED:
            remedy = "set PREFECT_API_KEY or PREFECT_API_AUTH_STRING, or unset PREFECT_API_URL"
            cause = f"the Prefect server at {url} refuses this user ({answer.status_code})"
            raise EnvironmentFault(cause, remedy, stage="Prefect") from error
        return False
    return True


@contextmanager
def _own_database() -> Iterator[tuple[str, IO[str] | None]]:
    """Keep temporary servers out of each other's database: one at a time has Prefect's home, others a passing one.

    Yields:
        What there is to say of it, and the file whose lock the server has to hold: a server that outlives its run for
        a moment still has the database.
    """
    with ExitStack() as held:
        home = Path(PREFECT_HOME.value())
        try:
            home.mkdir(parents=True, exist_ok=True)
            lock = held.enter_context((home / "wsiflow.lock").open("a"))
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            reason = "another run has Prefect's home"
        except OSError as error:
            reason = f"Prefect's home {home} cannot be used ({error.strerror})"
        else:
            yield "", lock
            return
        passing = held.enter_context(tempfile.TemporaryDirectory(prefix="wsiflow-prefect-", ignore_cleanup_errors=True))
        with temporary_settings({PREFECT_HOME: Path(passing)}):
            yield f" that leaves no history, since {reason}", None


@contextmanager
def _temporary_server(lock: IO[str] | None) -> Iterator[str]:
    """Keep a server running during the body, and yield the address of its API.

    It has a session of its own: what a terminal sends to this process and its workers does not end it before they have
    told it how they ended.

    Raises:
        EnvironmentFault: It does not start.
    """
    with tempfile.TemporaryFile() as told:
        with socket.create_server(("127.0.0.1", 0)) as listening:
            api = f"http://127.0.0.1:{listening.getsockname()[1]}/api"
            kept = [listening.fileno(), *([lock.fileno()] if lock is not None else [])]
            server = subprocess.Popen(
                [sys.executable, "-m", "wsiflow.flows.temporary_server", str(listening.fileno()), str(os.getpid())],
                env=_server_environment(),
                pass_fds=kept,
                start_new_session=True,
                stdin=subprocess.DEVNULL,
                stdout=told,
                stderr=told,
            )
        try:
            _wait_for(server, api, told)
            yield api
        finally:
            _end(server)


def _server_environment() -> dict[str, str]:
    """Return the environment of a temporary server, as Prefect starts its own: without pages, and without blocks.

    To register the types of blocks takes as long as all else that a new database needs, and no run uses them. A lasting
    server registers them when it starts: it must not find noted that it was done.
    """
    settings = get_current_settings().to_environment_variables(exclude_unset=True)
    own = {"PREFECT_UI_ENABLED": "0", "PREFECT__SERVER_EPHEMERAL": "1", "PREFECT__SERVER_FINAL": "1"}
    own |= dict.fromkeys(
        ("PREFECT_SERVER_REGISTER_BLOCKS_ON_START", "PREFECT_SERVER_MEMOIZE_BLOCK_AUTO_REGISTRATION"), "0"
    )
    own["PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL"] = "ERROR"  # to the file that says why it does not start
    kept = {**os.environ, **settings, **own}
    kept.pop("PREFECT_API_URL", None)  # it is the server
    return kept


def _wait_for(server: subprocess.Popen[bytes], api: str, told: IO[bytes]) -> None:
    """Wait until the server answers: it has been given a socket that listens already, so one question is enough."""
    try:
        httpx.get(f"{api}/health", timeout=_START_TIMEOUT_S, trust_env=False).raise_for_status()
    except httpx.HTTPError as error:
        server.kill()
        server.wait()
        told.seek(0)
        cause = f"the temporary Prefect server does not start ({_last_error(told.read()) or error})"
        remedy = "see to space and permissions for PREFECT_HOME and TMPDIR, set PREFECT_API_URL to a lasting server"
        raise EnvironmentFault(cause, f"{remedy} (make prefect), or set orchestrator=none", stage="Prefect") from error


def _last_error(told: bytes) -> str:
    """Return the line that ends the last traceback, else the last line; a server goes on to say that it ends."""
    lines = told.decode(errors="replace").strip().splitlines()
    return next((line for line in reversed(lines) if _ERROR.match(line)), lines[-1] if lines else "")


def _send_what_waits() -> None:
    """Have Prefect's threads send the logs and events that they hold, while there is a server to take them."""
    APILogHandler().flush()
    EventsWorker.drain_all(timeout=_END_S)


def _end(server: subprocess.Popen[bytes]) -> None:
    server.terminate()
    try:
        server.wait(timeout=_END_S)
    except subprocess.TimeoutExpired:
        server.kill()
        server.wait()


@contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    """Set a variable of the environment during the body."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = before
