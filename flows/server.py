"""Which Prefect server a run reports to."""

import fcntl
import os
import tempfile
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from prefect.settings import PREFECT_API_URL, PREFECT_HOME, temporary_settings

_HEALTH_TIMEOUT_S = 2.0


@contextmanager
def chosen_server() -> Iterator[str]:
    """Make sure that Prefect can record a flow, and say in one line where.

    Without a server that answers, Prefect starts a temporary one for this process: the run works the same and its
    history stays in Prefect's own database, but there is no page to look at while it runs.
    """
    url = PREFECT_API_URL.value()
    if url and answers(url):
        yield f"Prefect server: {url}"
        return
    os.environ.setdefault("PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS", "120")
    found = f"no Prefect server answers at {url}" if url else "no Prefect server is set"
    with temporary_settings(restore_defaults={PREFECT_API_URL}), _own_database() as where:
        yield f"{found}: going on with a temporary one{where} (make prefect starts a lasting one)"


@contextmanager
def shared_server() -> Iterator[str]:
    """Make sure that there is one server for all trials of a sweep that run at once, and say which in one line.

    A temporary one is handed to them in the environment; those on other machines cannot reach it and start their own.
    """
    with chosen_server() as said:
        if PREFECT_API_URL.value():
            yield said
            return
        from prefect.server.api.server import SubprocessASGIServer

        before = os.environ.get("PREFECT_API_URL")
        with SubprocessASGIServer() as server:
            os.environ["PREFECT_API_URL"] = server.api_url
            yield f"{said}, for all trials"
        del os.environ["PREFECT_API_URL"]
        if before is not None:
            os.environ["PREFECT_API_URL"] = before


@contextmanager
def _own_database() -> Iterator[str]:
    """Keep temporary servers out of each other's database: one at a time has Prefect's home, others a passing one."""
    home = Path(PREFECT_HOME.value())
    home.mkdir(parents=True, exist_ok=True)
    with (home / "wsiflow.lock").open("a") as lock, tempfile.TemporaryDirectory(prefix="wsiflow-prefect-") as passing:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            with temporary_settings({PREFECT_HOME: Path(passing)}):
                yield " that leaves no history, since another run has Prefect's home"
        else:
            yield ""


def answers(url: str) -> bool:
    """Tell whether a Prefect server is there."""
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=_HEALTH_TIMEOUT_S) as answer:
            return bool(answer.status == 200)
    except (OSError, ValueError):
        return False
