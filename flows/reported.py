"""Show on the page of a flow run, while it runs, the log records of the run, how far it is, and what it is about."""

import contextvars
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http import HTTPStatus
from pathlib import PurePath
from typing import cast
from uuid import UUID

import httpx
from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import State
from prefect.context import FlowRunContext, TaskRunContext
from prefect.logging.handlers import APILogHandler
from prefect.settings import PREFECT_CLIENT_MAX_RETRIES, temporary_settings
from prefect.states import Cancelled

from wsiflow.run.config import RunConfig
from wsiflow.run.progress import Snapshot
from wsiflow.slides.kinds import source_of

from . import artifacts, logs, stopping
from .progress import interval_s

# A page that lacks something is no reason to keep a run waiting: Prefect's own five retries take a minute.
_PAGE_S = 10.0  # from one update of the page to the next: it shows the latest alone
_IMPATIENT, _AT_ONCE = {PREFECT_CLIENT_MAX_RETRIES: 1}, {PREFECT_CLIENT_MAX_RETRIES: 0}


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


def tag(config: RunConfig) -> None:
    """Give the present flow run tags by which a run is found: its model, its data set and its sweep."""
    card = PurePath(str(config.model.card).removeprefix("pkg:")).stem
    slides = "synthetic" if config.dataset.kind == "synthetic" else source_of(config.dataset).name
    add_tags(model=card, data=slides, sweep=config.tracking.sweep or "")


def add_tags(**about: str) -> None:
    """Give the present flow run tags that say what it is about; empty values are left out."""
    context = FlowRunContext.get()
    if context is None or context.flow_run is None:
        return
    tags = {"wsiflow", *context.flow_run.tags, *(f"{name}: {value}" for name, value in about.items() if value)}
    try:
        # Tags that a flow run is started with are also those of its tasks, each of which then asks for their limits.
        with temporary_settings(_IMPATIENT), get_client(sync_client=True) as client:
            client.update_flow_run(context.flow_run.id, tags=sorted(tags))
    except (httpx.HTTPError, RuntimeError):
        return


@contextmanager
def cancelled_at_stop() -> Iterator[None]:
    """Have the present flow run shown as cancelled if a signal ends the command: it would stay running for good."""
    context = FlowRunContext.get()
    if context is None or context.flow_run is None:
        yield
        return
    settings = contextvars.copy_context()  # the thread that is called at a signal knows no other address of the server
    with stopping.at_stop(partial(settings.run, cancel, context.flow_run.id)):
        yield


def cancel(flow_run_id: UUID) -> None:
    """Show a flow run as cancelled."""
    state: State[None] = Cancelled(message=f"the command was stopped; {stopping.GOES_ON}")
    try:
        with temporary_settings(_AT_ONCE), get_client(sync_client=True) as client:
            client.set_flow_run_state(flow_run_id, state, force=True)
    except (httpx.HTTPError, RuntimeError):
        return


class PageView:
    """A progress artifact of the flow run in whose context it is shown first."""

    first_s, shows_end = 0.0, True

    def __init__(self, config: RunConfig) -> None:
        """Start without an artifact, which the first snapshot creates."""
        self.interval_s = min(interval_s(), _PAGE_S)
        self._key = artifacts.key(config, "progress")
        self._artifact: UUID | None = None

    def show(self, snapshot: Snapshot) -> None:
        """Create the artifact, or update it; a server that does not answer gets the next snapshot.

        An artifact that somebody has deleted is created again.
        """
        percent, text = round(100 * snapshot.share, 1), snapshot.as_text()
        try:
            with temporary_settings(_IMPATIENT):
                if self._artifact is None:
                    self._artifact = cast("UUID", create_progress_artifact(percent, key=self._key, description=text))
                else:
                    update_progress_artifact(self._artifact, percent, description=text)
        except (httpx.HTTPError, RuntimeError) as error:
            response = getattr(error, "response", None)
            if response is not None and response.status_code == HTTPStatus.NOT_FOUND:
                self._artifact = None
