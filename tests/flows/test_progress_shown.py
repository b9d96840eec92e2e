"""The progress of a run as lines, and none where none is requested; the display is tested in test_stopping."""

import queue
import threading
import time
from pathlib import Path

import pytest

from flows import logs, progress, terminal
from wsiflow.errors import InputError
from wsiflow.run.progress import Follower, Snapshot

PATIENCE_S = 60


class Watching:
    """A view besides those of the user."""

    first_s, interval_s, shows_end = 1e9, 1e9, True

    def __init__(self) -> None:
        self.seen: list[Snapshot] = []

    def show(self, snapshot: Snapshot) -> None:
        self.seen.append(snapshot)


class Slow(Watching):
    """The page of a server that takes the first snapshot late, and refuses the second."""

    first_s, interval_s = 0.0, 0.01

    def __init__(self) -> None:
        super().__init__()
        self.answers = threading.Event()

    def show(self, snapshot: Snapshot) -> None:
        assert self.answers.wait(PATIENCE_S)
        super().show(snapshot)
        if len(self.seen) == 2:
            raise KeyError("of a server's answer")


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name in {"progress", "page"}]


def test_a_log_has_a_line_now_and_then(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines come at the requested interval until the run ends, and views that show the end get a last snapshot."""
    lines: queue.SimpleQueue[str] = queue.SimpleQueue()
    monkeypatch.setattr(terminal, "remark", lines.put)
    monkeypatch.setenv(progress.VARIABLE, "0.01")
    expected, other = Follower(finished).snapshot(), Watching()
    assert expected is not None
    shown_lines = []

    def body() -> None:
        shown_lines.extend(lines.get(timeout=PATIENCE_S) for _ in range(2))
        raise OSError("the disk is full")

    with pytest.raises(OSError, match="full"), progress.shown(finished, [other]):
        body()
    assert shown_lines == [expected.as_text()] * 2
    assert threads() == []
    assert other.seen == [expected]


def test_nobody_waits_for_a_slow_page(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines come while a server does not answer; what it missed it is not sent, and an error ends nothing."""
    lines: queue.SimpleQueue[str] = queue.SimpleQueue()
    monkeypatch.setattr(terminal, "remark", lines.put)
    monkeypatch.setenv(progress.VARIABLE, "0.01")
    monkeypatch.setattr(progress, "_SHARE", 1.0)  # so that no pause follows from a busy machine
    page, expected = Slow(), Follower(finished).snapshot()
    with progress.shown(finished, [page]):
        texts = [lines.get(timeout=PATIENCE_S) for _ in range(4)]
        assert page.seen == []
        page.answers.set()
        end_s = time.monotonic() + PATIENCE_S
        while len(page.seen) < 3 and time.monotonic() < end_s:
            time.sleep(0.01)
    assert expected is not None
    assert texts == [expected.as_text()] * 4
    assert len(page.seen) > 2
    assert threads() == []


@pytest.mark.parametrize("quiet", ["by its option", "by its interval"])
def test_nothing_is_shown_where_nothing_is_wanted(finished: Path, monkeypatch: pytest.MonkeyPatch, quiet: str) -> None:
    """No thread reads the folder either."""
    monkeypatch.setenv(progress.VARIABLE, "0" if quiet == "by its interval" else "0.01")
    with logs.shown("ERROR" if quiet == "by its option" else ""), progress.shown(finished):
        assert threads() == []


@pytest.mark.parametrize("text", ["often", "-1", "nan", "inf"])
def test_an_interval_that_is_none_is_refused(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv(progress.VARIABLE, text)
    with pytest.raises(InputError, match=f"WSIFLOW_PROGRESS_S is '{text}'; set it to seconds"):
        progress.interval_s()
