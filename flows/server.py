"""Choose the Prefect server that a run reports to, and start a temporary one where there is none."""

import fcntl
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
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

_HEALTH_TIMEOUT_S = 10.0  # for a server that is busy; where there is none the connection is refused at once
_START_TIMEOUT_S = 120.0
_LOST_TIMEOUT_S, _LOST_TRIES, _LOST_PAUSE_S = 5.0, 3, 0.5  # the first only where it is there and does not answer
_END_S = 10.0
_ERROR = re.compile(r"(?:[\w.]+\.)?\w*(?:Error|Exception)\b")
_REFUSED = {HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN}


@contextmanager
def chosen_server() -> Iterator[str]:
    """Make sure that Prefect can record a flow, and yield one line that says where it does.

    Where no server answers, a temporary one is started for this process and for the trials that it starts, which read
    its address from the environment. The run works the same, and its history stays in Prefect's own database, but there
    is no page to look at while it runs.

    Raises:
        EnvironmentFault: The server that is set refuses this user, or a temporary one does not start.
    """
    url = set_url()
    if url and answers(url):
        yield f"Prefect server: {url}"
        return
    reason = f"no Prefect server answers at {url}" if url else "no Prefect server is set"
    with (
        _own_database() as (where, lock),
        _temporary_server(lock) as api,
        _environment("PREFECT_API_URL", api),
        temporary_settings({PREFECT_API_URL: api}),
    ):
        try:
            yield f"{reason}: going on with a temporary one{where} (make prefect starts a lasting one)"
        finally:
            _send_buffered_records()


def set_url() -> str:
    """Return the address of the Prefect server that the environment or a profile sets; empty where none is."""
    return PREFECT_API_URL.value() or ""


def is_lost(url: str) -> bool:
    """Tell whether a server that has answered does not any more, not even a moment later.

    Whatever it answers, it is there: nothing is sent to it that a certificate would have to protect.
    """
    for attempt in range(_LOST_TRIES):
        if attempt:
            time.sleep(_LOST_PAUSE_S)
        with suppress(httpx.HTTPError):
            httpx.get(f"{url}/health", timeout=_LOST_TIMEOUT_S, verify=False)
            return False
    return True


def answers(url: str) -> bool:
    """Tell whether a Prefect server answers a request of Prefect's own client, with its key and certificates.

    Raises:
        EnvironmentFault: The server answers, but refuses this user.
    """
    if not url:
        return False
    settings = {PREFECT_API_URL: url, PREFECT_API_REQUEST_TIMEOUT: _HEALTH_TIMEOUT_S, PREFECT_CLIENT_MAX_RETRIES: 0}
    try:
        with temporary_settings(settings), get_client(sync_client=True) as client:
            client.read_flows(limit=1)  # a server tells its health to anybody, so another request is needed
    except (httpx.HTTPError, PrefectHTTPStatusError, OSError, RuntimeError, ValueError) as error:
        response = getattr(error, "response", None)
        if response is not None and response.status_code in _REFUSED:
            remedy = "set PREFECT_API_KEY or PREFECT_API_AUTH_STRING, or unset PREFECT_API_URL"
            cause = f"the Prefect server at {url} refuses this user ({response.status_code})"
            raise EnvironmentFault(cause, remedy, stage="Prefect") from error
        return False
    return True


@contextmanager
def _own_database() -> Iterator[tuple[str, IO[str] | None]]:
    """Keep temporary servers out of each other's database: one has Prefect's home, others a temporary folder.

    Yields:
        Words that say so for the user, and the file whose lock the server has to hold, since a server that outlives its
        run for a moment still uses the database.
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
        temporary = held.enter_context(
            tempfile.TemporaryDirectory(prefix="wsiflow-prefect-", ignore_cleanup_errors=True)
        )
        with temporary_settings({PREFECT_HOME: Path(temporary)}):
            yield f" that leaves no history, since {reason}", None


@contextmanager
def _temporary_server(lock: IO[str] | None) -> Iterator[str]:
    """Keep a server running during the body, and yield the address of its API.

    The server has a session of its own, so that a signal from the terminal, which ends this process and its workers,
    does not end it before they have reported to it how they ended.

    Raises:
        EnvironmentFault: The server does not start.
    """
    with tempfile.TemporaryFile() as output:
        with socket.create_server(("127.0.0.1", 0)) as listening:
            api = f"http://127.0.0.1:{listening.getsockname()[1]}/api"
            kept = [listening.fileno(), *([lock.fileno()] if lock is not None else [])]
            server = subprocess.Popen(
                [sys.executable, "-m", "wsiflow.flows.temporary_server", str(listening.fileno()), str(os.getpid())],
                env=_server_environment(),
                pass_fds=kept,
                start_new_session=True,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )
        try:
            _wait_for(server, api, output)
            yield api
        finally:
            _end(server)


def _server_environment() -> dict[str, str]:
    """Return the environment of a temporary server, which has neither pages nor types of blocks.

    Registering the types of blocks takes as long as all else that a new database needs, and no run uses them. A lasting
    server registers them when it starts, so the database must not record that it was done.
    """
    settings = get_current_settings().to_environment_variables(exclude_unset=True)
    own = {"PREFECT_UI_ENABLED": "0", "PREFECT__SERVER_EPHEMERAL": "1", "PREFECT__SERVER_FINAL": "1"}
    own |= dict.fromkeys(
        ("PREFECT_SERVER_REGISTER_BLOCKS_ON_START", "PREFECT_SERVER_MEMOIZE_BLOCK_AUTO_REGISTRATION"), "0"
    )
    own["PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL"] = "ERROR"  # into the file that says why it does not start
    kept = {**os.environ, **settings, **own}
    kept.pop("PREFECT_API_URL", None)  # it is the server itself
    return kept


def _wait_for(server: subprocess.Popen[bytes], api: str, output: IO[bytes]) -> None:
    """Wait until the server answers: its socket listens already, so that one request is enough."""
    try:
        httpx.get(f"{api}/health", timeout=_START_TIMEOUT_S, trust_env=False).raise_for_status()
    except httpx.HTTPError as error:
        server.kill()
        server.wait()
        output.seek(0)
        cause = f"the temporary Prefect server does not start ({_last_error(output.read()) or error})"
        remedy = "check space and permissions of PREFECT_HOME and TMPDIR, set PREFECT_API_URL to a lasting server"
        raise EnvironmentFault(cause, f"{remedy} (make prefect), or set orchestrator=none", stage="Prefect") from error


def _last_error(output: bytes) -> str:
    """Return the line that ends the last traceback, behind which a server logs that it ends; else the last line."""
    lines = output.decode(errors="replace").strip().splitlines()
    return next((line for line in reversed(lines) if _ERROR.match(line)), lines[-1] if lines else "")


def _send_buffered_records() -> None:
    """Make Prefect's threads send the logs and events that they hold, while the server still runs."""
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
