"""Show how far a run is while it runs.

A terminal shows a display that is drawn anew every second, other outputs get a line on standard error every half a
minute. One thread reads the run's folder, and the less often the longer that takes. A view that waits for a server has
a thread of its own, in which it shows the latest snapshot, so that nothing else waits for the server.
"""

import contextvars
import logging
import math
import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeVar

from wsiflow.errors import InputError
from wsiflow.run.progress import Follower, Snapshot

from . import logs, stopping, terminal, trial

if TYPE_CHECKING:
    from rich.console import Console, Group
    from rich.live import Live

#: Seconds from one line to the next; Prefect's page is updated every ten seconds at the latest. 0: no progress at all.
VARIABLE = "WSIFLOW_PROGRESS_S"

_LINE_S = 30.0
_DISPLAY_S = 1.0
_EARLY_S = 1.0  # from one try to the next where the slides are not listed yet
_SHARE = 0.05  # of the time of one core that reading the folder may take
_LONGEST_PAUSE_S = 60.0  # all the same: on a busy machine reading takes long without costing much
_PATIENCE_S = 10.0  # for a server that is sent the last snapshot
_BAR_CHARS = 32

_logger = logging.getLogger(__name__)
_Returned = TypeVar("_Returned")


class View(Protocol):
    """A place that shows snapshots of a run's progress.

    Attributes:
        first_s, interval_s: Seconds until the first one is shown, and from one to the next.
        shows_end: Whether it shows a last snapshot when the run has ended.
    """

    first_s: float
    interval_s: float
    shows_end: bool

    def show(self, snapshot: Snapshot) -> None:
        """Show a snapshot."""
        ...


def interval_s() -> float:
    """Return the seconds from one line to the next, or 0 where no progress is shown.

    Raises:
        InputError: The value in the environment is no number of seconds.
    """
    text = os.environ.get(VARIABLE, "")
    with suppress(ValueError):
        seconds = float(text) if text else _LINE_S
        if seconds >= 0 and math.isfinite(seconds):
            return seconds
    raise InputError(f"{VARIABLE} is {text!r}", "set it to seconds, 0 for no progress, or unset it")


@contextmanager
def shown(root: Path, pages: Sequence[View] = ()) -> Iterator[None]:
    """Show how far the run in a folder is, as long as the body runs.

    Args:
        root: The run's folder.
        pages: Views besides those of the user, which may be slow.
    """
    of_user = _user_views(root) if interval_s() else []
    of_pages = [_Page(page) for page in pages] if interval_s() else []
    if not of_user + of_pages:
        yield
        return
    ended = threading.Event()
    thread = threading.Thread(
        target=_follow, args=(Follower(root), [*of_user, *of_pages], ended), daemon=True, name="progress"
    )
    with ExitStack() as stack:
        for page in of_pages:
            stack.callback(page.finish)
        stack.callback(thread.join, _PATIENCE_S)
        for view in of_user:
            stack.enter_context(stopping.at_stop(view.close))
            stack.callback(view.close)
        stack.callback(ended.set)
        thread.start()
        yield


def _user_views(root: Path) -> "list[_Lines | _Display]":
    """Return the views for the user who started the command."""
    if logs.is_quiet():
        return []
    if sys.stdout.isatty() and sys.stderr.isatty() and not trial.is_of_another_process():
        console = _terminal()
        if console.is_interactive:
            return [_Display(root, console)]
        console.file.close()
    return [_Lines(f"{root.name}: " if trial.is_on() else "")]


def _follow(follower: Follower, views: Sequence[View], ended: threading.Event) -> None:
    """Show snapshots in the views that are due, until the run has ended; a snapshot that fails is skipped."""
    due = {id(view): time.monotonic() + view.first_s for view in views}
    pause_s = 0.0
    while not ended.wait(max(pause_s, min(due.values()) - time.monotonic())):
        start_s = time.monotonic()
        snapshot = _tried(follower.snapshot)
        pause_s = min((time.monotonic() - start_s) / _SHARE, _LONGEST_PAUSE_S)
        waiting = [view for view in views if due[id(view)] <= start_s]
        _show(snapshot, waiting)
        is_early = snapshot is None
        due |= {id(one): start_s + min(one.interval_s, _EARLY_S if is_early else math.inf) for one in waiting}
    at_end = [view for view in views if view.shows_end]
    if at_end:
        _show(_tried(follower.snapshot), at_end)


def _show(snapshot: Snapshot | None, views: Sequence[View]) -> None:
    if snapshot is not None:
        for view in views:
            _tried(partial(view.show, snapshot))


def _tried(call: Callable[[], _Returned]) -> _Returned | None:
    """Call a function, and return None where it fails: the next snapshot is shown all the same."""
    try:
        return call()
    except Exception as error:  # noqa: BLE001 - a disk that is away for a while, a terminal that is gone, a server's words
        _logger.debug("progress is not shown: %s: %s", type(error).__name__, error)
        return None


class _Page:
    """A view that shows the latest snapshot in another view, which may be slow, in a thread of its own."""

    def __init__(self, view: View) -> None:
        self.first_s, self.interval_s, self.shows_end = view.first_s, view.interval_s, view.shows_end
        self._view = view
        self._given = queue.SimpleQueue[Snapshot | None]()
        # Prefect finds the flow run, and the address of its server, in the context.
        context = contextvars.copy_context()
        self._thread = threading.Thread(target=context.run, args=(self._work,), daemon=True, name="page")
        self._thread.start()

    def show(self, snapshot: Snapshot) -> None:
        self._given.put(snapshot)

    def finish(self) -> None:
        """Wait until the last snapshot is shown, but not for ever."""
        self._given.put(None)
        self._thread.join(_PATIENCE_S)

    def _work(self) -> None:
        given: list[Snapshot | None] = []
        while None not in given:
            given = [self._given.get()]
            while not self._given.empty():
                given.append(self._given.get())
            latest = [snapshot for snapshot in given if snapshot is not None]
            _show(latest[-1] if latest else None, [self._view])


class _Lines:
    """A view that prints a line to standard error at each interval."""

    shows_end = False

    def __init__(self, begin: str) -> None:
        self.first_s = self.interval_s = interval_s()
        self._begin = begin
        self._lock, self._closed = threading.Lock(), False

    def show(self, snapshot: Snapshot) -> None:
        with self._lock:
            if not self._closed:
                terminal.remark(f"{self._begin}{snapshot.as_text()}")

    def close(self) -> None:
        with self._lock:
            self._closed = True


class _Display:
    """A view that draws a table of the stages below everything else that is printed to the terminal."""

    first_s, interval_s, shows_end = 0.5, _DISPLAY_S, False

    def __init__(self, root: Path, console: "Console") -> None:
        self._root, self._console = root, console
        self._live: Live | None = None
        self._lock, self._closed = threading.Lock(), False

    def show(self, snapshot: Snapshot) -> None:
        with self._lock:
            if self._closed:
                return
            if self._live is None:
                self._live = _start_live(self._console)
            self._live.update(_draw(self._root, snapshot), refresh=True)

    def close(self) -> None:
        """Leave the terminal as it was, even where the standard streams lead nowhere already."""
        with self._lock, suppress(OSError):  # the terminal is gone
            if not self._closed:
                self._closed = True
                if self._live is not None:
                    self._live.stop()
                self._console.file.close()


def _start_live(console: "Console") -> "Live":
    from rich.live import Live

    live = Live(console=console, auto_refresh=False, transient=True)
    live.start()
    return live


def _draw(root: Path, snapshot: Snapshot) -> "Group":
    from rich.console import Group
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    stages = Table.grid(padding=(0, 1))
    for name, (done, planned) in snapshot.stages.items():
        bar = ProgressBar(total=planned, completed=done, width=_BAR_CHARS)
        stages.add_row(Text(f"  {name}"), bar, Text(f"{done:,} of {planned:,}"))
    return Group(Text(str(root)), stages, Text(snapshot.as_text()))


def _terminal() -> "Console":
    """Return a console that writes to the terminal of standard error, even after that stream is turned away."""
    from rich.console import Console

    stream = os.fdopen(os.dup(sys.stderr.fileno()), "w", encoding=sys.stderr.encoding, errors="backslashreplace")
    return Console(file=stream, highlight=False)
