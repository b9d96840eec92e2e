"""Which Prefect server a run reports to."""

import os
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager

from prefect.settings import PREFECT_API_URL, temporary_settings

_HEALTH_TIMEOUT_S = 2.0


@contextmanager
def chosen_server() -> Iterator[str]:
    """Make sure that Prefect can record a flow, and say in one line where.

    Without a server that answers, Prefect starts a temporary one for this process: the run works the same and its
    history stays in Prefect's own database, but there is no page to look at while it runs.
    """
    url = PREFECT_API_URL.value()
    if url and _answers(url):
        yield f"Prefect server: {url}"
        return
    os.environ.setdefault("PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS", "120")
    found = f"no Prefect server answers at {url}" if url else "no Prefect server is set"
    with temporary_settings(restore_defaults={PREFECT_API_URL}):
        yield f"{found}: going on with a temporary one (make prefect starts a lasting one)"


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=_HEALTH_TIMEOUT_S) as answer:
            return bool(answer.status == 200)
    except (OSError, ValueError):
        return False
