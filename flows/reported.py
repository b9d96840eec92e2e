"""Show on the page of a flow run, while it runs, the log records of the run and how far it is."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast
from uuid import UUID

import httpx
from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.context import FlowRunContext, TaskRunContext
from prefect.logging.handlers import APILogHandler

from wsiflow.run.progress import Snapshot

from . import logs
from .progress import interval_s

_KEY = "wsiflow-progress"


@contextmanager
def records() -> Iterator[None]:
    """Send what is logged during the body to Prefect, as if its settings named this package's logger.

    Records from outside of a flow run, such as those of a library's thread, are left out: Prefect would complain of
    them.
    """
    known = [handler for handler in logs.PACKAGE.handlers if isinstance(handler, APILogHandler)]
    handlers = known or [APILogHandler(logging.INFO)]  # the user may have named this package in Prefect's settings
    level = logs.PACKAGE.level
    for handler in handlers:
        handler.addFilter(_is_of_run)
        handler.addFilter(logs.redact)
        logs.PACKAGE.addHandler(handler)
    if level == logging.NOTSET:  # a deployment, where no command line sets a level
        logs.PACKAGE.setLevel(logging.INFO)
    try:
        yield
    finally:
        logs.PACKAGE.setLevel(level)
        if not known:
            logs.PACKAGE.removeHandler(handlers[0])


def _is_of_run(_record: logging.LogRecord) -> bool:
    return FlowRunContext.get() is not None or TaskRunContext.get() is not None


class PageView:
    """A progress artifact of the flow run in whose context it is shown first."""

    first_s, shows_end = 0.0, True

    def __init__(self, name: str) -> None:
        """Start without an artifact, which the first snapshot creates.

        Args:
            name: Name of the run.
        """
        self.interval_s, self._name = interval_s(), name
        self._artifact: UUID | None = None

    def show(self, snapshot: Snapshot) -> None:
        """Create the artifact, or update it; a server that does not answer gets the next snapshot."""
        percent, text = 100 * snapshot.share, f"{self._name}: {snapshot.as_text()}"
        try:
            if self._artifact is None:
                self._artifact = cast("UUID", create_progress_artifact(percent, key=_KEY, description=text))
            else:
                update_progress_artifact(self._artifact, percent, description=text)
        except (httpx.HTTPError, RuntimeError):
            return

    def close(self) -> None:
        """Leave the last snapshot on the page."""
