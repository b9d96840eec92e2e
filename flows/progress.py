"""Show how far a run is while it runs.

A terminal shows a display that is drawn anew every second, other outputs get a line on standard error every half a
minute. One thread reads the run's folder, and the less often the longer that takes.
"""

import contextvars
import math
import os
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from wsiflow.errors import InputError, WsiflowError
from wsiflow.run.progress import Follower, Snapshot

from . import logs, stopping, sweep, terminal

if TYPE_CHECKING:
    from rich.console import Console, Group
    from rich.live import Live

#: Seconds from one line to the next; Prefect's page is updated every ten seconds at the latest. 0: no progress at all.
VARIABLE = "WSIFLOW_PROGRESS_S"

_LINE_S = 30.0
_DISPLAY_S = 1.0
_EARLY_S = 1.0  # from one try to the next where the slides are not listed yet
_SHARE = 0.05  # of the time of one core that reading the folder may take
_PATIENCE_S = 10.0  # for a server that is sent the last snapshot
_BAR_CHARS = 32


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

    def close(self) -> None:
        """Show nothing more; any thread may call this, more than once."""
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
def shown(root: Path, more: Sequence[View] = ()) -> Iterator[None]:
    """Show how far the run in a folder is, as long as the body runs.

    Args:
        root: The run's folder.
        more: Views besides those of the user.
    """
    views = [*_user_views(root), *more] if interval_s() else []
    if not views:
        yield
        return
    ended = threading.Event()
    # Prefect finds the flow run, and the address of its server, in the context.
    context = contextvars.copy_context()
    thread = threading.Thread(
        target=context.run, args=(_follow, Follower(root), views, ended), daemon=True, name="progress"
    )
    with ExitStack() as stack:
        stack.callback(thread.join, _PATIENCE_S)
        for view in views:
            stack.enter_context(stopping.at_stop(view.close))
            stack.callback(view.close)
        stack.callback(ended.set)
        thread.start()
        yield


def _user_views(root: Path) -> list[View]:
    """Return the views for the user who started the command."""
    if logs.is_quiet():
        return []
    if sys.stdout.isatty() and sys.stderr.isatty() and not sweep.is_of_another_process():
        console = _terminal()
        if console.is_interactive:
            return [_Display(root, console)]
        console.file.close()
    return [_Lines(f"{root.name}: " if sweep.is_on() else "")]


def _follow(follower: Follower, views: Sequence[View], ended: threading.Event) -> None:
    """Show snapshots in the views that are due, until the run has ended; a snapshot that fails is skipped."""
    due = {id(view): time.monotonic() + view.first_s for view in views}
    pause_s = 0.0
    while not ended.wait(max(pause_s, min(due.values()) - time.monotonic())):
        start_s = time.monotonic()
        waiting = [view for view in views if due[id(view)] <= start_s]
        is_early = not _show(follower, waiting)
        due |= {id(one): start_s + min(one.interval_s, _EARLY_S if is_early else math.inf) for one in waiting}
        pause_s = (time.monotonic() - start_s) / _SHARE
    _show(follower, [view for view in views if view.shows_end])


def _show(follower: Follower, views: Sequence[View]) -> bool:
    """Show a snapshot in some views, and tell whether there was one to show."""
    with suppress(OSError, ValueError, WsiflowError):  # a disk that is away for a while, a terminal that is gone
        if views and (snapshot := follower.snapshot()) is not None:
            for view in views:
                view.show(snapshot)
            return True
    return False


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
