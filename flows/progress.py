"""How far a run has come, shown while it runs.

On a terminal as a display that is drawn anew every second, elsewhere as a line on standard error every half a minute.
One thread looks at the run's folder, and the less often the longer that takes.
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

#: Seconds from one line to the next, and between updates of Prefect's page; 0: no progress is shown at all.
VARIABLE = "WSIFLOW_PROGRESS_S"

_LINE_S = 30.0
_DISPLAY_S = 1.0
_SHARE = 0.05  # of the time of one core that looking may take
_PATIENCE_S = 10.0  # for a server that is shown the end
_BAR_CHARS = 32


class View(Protocol):
    """Somebody who is shown snapshots.

    Attributes:
        first_s, interval_s: Seconds until the first one is shown, and from one to the next.
        wants_end: Whether how it ended is to be shown too.
    """

    first_s: float
    interval_s: float
    wants_end: bool

    def show(self, snapshot: Snapshot) -> None:
        """Show how far the run is."""
        ...

    def close(self) -> None:
        """Show nothing more; may be called from any thread, and again."""
        ...


def interval_s() -> float:
    """Return the seconds from one line to the next, 0 where none is wanted.

    Raises:
        InputError: The environment says something else than seconds.
    """
    text = os.environ.get(VARIABLE, "")
    with suppress(ValueError):
        seconds = float(text) if text else _LINE_S
        if seconds >= 0 and math.isfinite(seconds):
            return seconds
    raise InputError(f"{VARIABLE} is {text!r}", "set it to seconds, 0 for no progress, or unset it")


@contextmanager
def shown(root: Path, more: Sequence[View] = ()) -> Iterator[None]:
    """Show during the body how far the run in a folder is.

    Args:
        root: The run's folder.
        more: Who is shown it besides the user.
    """
    views = [*_of_user(root), *more] if interval_s() else []
    if not views:
        yield
        return
    over = threading.Event()
    # Prefect finds the flow run, and the address of its server, in the context.
    inside = contextvars.copy_context()
    thread = threading.Thread(
        target=inside.run, args=(_follow, Follower(root), views, over), daemon=True, name="progress"
    )
    with ExitStack() as stack:
        stack.callback(thread.join, _PATIENCE_S)
        for view in views:
            stack.enter_context(stopping.at_stop(view.close))
            stack.callback(view.close)
        stack.callback(over.set)
        thread.start()
        yield


def _of_user(root: Path) -> list[View]:
    """Return what shows the progress to whoever started the command."""
    if logs.is_quiet():
        return []
    if sys.stdout.isatty() and sys.stderr.isatty() and not sweep.is_of_another_process():
        console = _terminal()
        if console.is_interactive:
            return [_Display(root, console)]
        console.file.close()
    return [_Lines(f"{root.name}: " if sweep.is_on() else "")]


def _follow(follower: Follower, views: Sequence[View], over: threading.Event) -> None:
    """Look and show until it is over; what cannot be looked at or shown now may be the next time."""
    due = {id(view): time.monotonic() + view.first_s for view in views}
    pause_s = 0.0
    while not over.wait(max(pause_s, min(due.values()) - time.monotonic())):
        began = time.monotonic()
        _show(follower, [view for view in views if due[id(view)] <= began])
        due |= {id(view): began + view.interval_s for view in views if due[id(view)] <= began}
        pause_s = (time.monotonic() - began) / _SHARE
    _show(follower, [view for view in views if view.wants_end])


def _show(follower: Follower, views: Sequence[View]) -> None:
    with suppress(OSError, ValueError, WsiflowError):  # a disk that is away for a while, a terminal that is gone
        if views and (snapshot := follower.snapshot()) is not None:
            for view in views:
                view.show(snapshot)


class _Lines:
    """A line on standard error now and then."""

    wants_end = False

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
    """A table of the stages that stays in its place on the terminal; what else is printed goes above it."""

    first_s, interval_s, wants_end = 0.5, _DISPLAY_S, False

    def __init__(self, root: Path, console: "Console") -> None:
        self._root, self._console = root, console
        self._live: Live | None = None
        self._lock, self._closed = threading.Lock(), False

    def show(self, snapshot: Snapshot) -> None:
        with self._lock:
            if self._closed:
                return
            if self._live is None:
                self._live = _started(self._console)
            self._live.update(_drawn(self._root, snapshot), refresh=True)

    def close(self) -> None:
        """Leave the terminal as it was, also while what else is printed leads nowhere already."""
        with self._lock, suppress(OSError):  # the terminal is gone
            if not self._closed:
                self._closed = True
                if self._live is not None:
                    self._live.stop()
                self._console.file.close()


def _started(console: "Console") -> "Live":
    from rich.live import Live

    live = Live(console=console, auto_refresh=False, transient=True)
    live.start()
    return live


def _drawn(root: Path, snapshot: Snapshot) -> "Group":
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
    """Return a console that writes to the terminal of standard error, whatever becomes of that."""
    from rich.console import Console

    stream = os.fdopen(os.dup(sys.stderr.fileno()), "w", encoding=sys.stderr.encoding, errors="backslashreplace")
    return Console(file=stream, highlight=False)
