"""The arrays of a run in the queue of a scheduler: which elements are there, and what they have written so far."""

import logging
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from wsiflow.errors import EnvironmentFault
from wsiflow.run.executor import jobs
from wsiflow.run.executor.dialect import ArrayParams, Place, Seen
from wsiflow.run.executor.pieces import FOLDER, Piece, Request, from_values, taken
from wsiflow.run.executor.protocol import Outcome, closed
from wsiflow.system import processes
from wsiflow.system.processes import Process

_logger = logging.getLogger(__name__)

LOGS = "logs"
"""Folder of the logs of elements: one for each array, and a link to it by the scheduler's id of the job."""

_WINDOW_PARTS = 8  # while pieces wait, no array is smaller than such a part: elements are not submitted singly
_LONGEST_POLL_S = 300.0


def link_logs(root: Path, name: str, job: str) -> Path:
    """Link the folder of an array's logs by its job's id, and return the link; the folder where disks have none."""
    with suppress(OSError):
        (root / LOGS / job).symlink_to(name)
    return logs_of(root, name, job)


def logs_of(root: Path, name: str, job: str) -> Path:
    """Return the folder of an array's logs, by its job's id where there is such a link."""
    link = root / LOGS / job
    with suppress(OSError):  # no link, or one that another scheduler's job of the same number has
        if job and str(link.readlink()) == name:
            return link
    return root / LOGS / name


class Poll(NamedTuple):
    """The state of the queue at one moment.

    Attributes:
        taken_s: When the scheduler was asked, seconds of the monotonic clock.
        places: The elements of the run; None where the scheduler did not answer.
    """

    taken_s: float
    places: Mapping[Place, Seen] | None


class Queue:
    """The elements of a run in the scheduler's queue: never more than the window, and polled by one thread for all."""

    def __init__(self, params: ArrayParams, *, workers: int) -> None:
        """Begin with an empty queue; the window is at most the number of ``workers``, where that is not 0."""
        self._params, self._window = params, min(params.window, workers or params.window)
        self._widest = self._window
        self._held: dict[Place, bool] = {}
        self._state, self._asking = threading.Lock(), threading.Lock()
        self._closed = threading.Event()
        self._last = Poll(float("-inf"), {})
        self._pause_s = params.poll_s

    def take(self, name: str, waiting: int, *, longest: int) -> int:
        """Reserve room for the elements of a new array.

        Args:
            name: Name of the array.
            waiting: Number of elements to submit.
            longest: Largest number of elements of an array.

        Returns:
            The number of elements that there is room for; 0 where it is better to wait for more room.
        """
        with self._state:
            room = self._window - len(self._held)
            most = min(waiting, longest)
            if room < min(most, max(1, self._window // _WINDOW_PARTS)):
                return 0
            size = min(most, room)
            self._held.update(dict.fromkeys(self._places(name, size), False))
            return size

    def close(self) -> None:
        """End every `poll` that waits, and refuse later ones."""
        self._closed.set()

    def drop(self, name: str) -> None:
        """Free the room of an array that was not submitted."""
        with self._state:
            self._held = {place: finished for place, finished in self._held.items() if place.name != name}

    def give_back(self, name: str, size: int) -> bool:
        """Free the room of an array that was refused, and narrow the window to half of what was tried.

        It is never narrower than what was accepted.

        Args:
            name: Name of the array.
            size: Number of its elements.

        Returns:
            Whether the run has other elements in the queue, which make room at the scheduler when they end.
        """
        self.drop(name)
        with self._state:
            places = self._last.places or {}
            accepted = sum(self._is_alive(places, place) for place in self._held)
            self._window = max(1, (accepted + size) // 2, accepted)
            return bool(self._held)

    def widen(self) -> None:
        """Double the window, up to what the settings allow, since an array was accepted."""
        with self._state:
            self._window = min(2 * self._window, self._widest)

    def hold(self, places: Iterable[Place]) -> None:
        """Count elements that are in the queue already."""
        with self._state:
            self._held.update(dict.fromkeys(places, False))

    def finish(self, places: Iterable[Place]) -> None:
        """Mark elements as finished: they count until the scheduler no longer lists them."""
        with self._state:
            self._held.update({place: True for place in places if place in self._held})

    def release(self, places: Iterable[Place]) -> None:
        """Stop counting elements."""
        with self._state:
            for place in places:
                self._held.pop(place, None)

    def poll(self) -> Poll:
        """Return the state of the queue, from a call of the scheduler that began after this call did.

        One thread asks for all that wait. A scheduler that does not answer is asked less and less often.

        Raises:
            EnvironmentFault: The queue was closed.
        """
        began_s = time.monotonic()
        with self._asking:
            if self._last.taken_s < began_s:
                if self._closed.wait(max(0.0, self._last.taken_s + self._pause_s - time.monotonic())):
                    raise closed()
                self._last = self._ask()
            return self._last

    def latest(self) -> Poll:
        """Return the state of the queue as it was last seen; where that was long ago, the scheduler is asked again."""
        with self._asking:
            if self._last.taken_s + self._pause_s <= time.monotonic():
                self._last = self._ask()
            return self._last

    def pause(self, seconds: float) -> None:
        """Wait.

        Raises:
            EnvironmentFault: The queue was closed.
        """
        if self._closed.wait(max(0.0, seconds)):
            raise closed()

    def _ask(self) -> Poll:
        with self._state:
            names = {place.name for place in self._held}
        taken_s = time.monotonic()
        places = jobs.listing(self._params.dialect, names)
        if places is None:
            _logger.warning("%s does not answer and is asked again", self._params.dialect.name)
            self._pause_s = max(self._params.poll_s, min(2 * self._pause_s, _LONGEST_POLL_S))
            return Poll(taken_s, None)
        self._pause_s = self._params.poll_s
        with self._state:
            gone = [place for place, finished in self._held.items() if finished and not self._is_alive(places, place)]
            for place in gone:
                del self._held[place]
        return Poll(taken_s, places)

    def _is_alive(self, places: Mapping[Place, Seen], place: Place) -> bool:
        return place in places and self._params.dialect.is_alive(places[place].state)

    def _places(self, name: str, size: int) -> list[Place]:
        base = self._params.dialect.base
        return [Place(name, base + i) for i in range(size)]


_REQUEUED = {
    "node": "its element was requeued by the scheduler",
    "preempted": "its element was preempted by other jobs, and requeued",
}


class _File(NamedTuple):
    """What was read of a file: up to which byte, its process, the piece and task that this has begun, and its end.

    It also has why the process could do nothing there, and after how many seconds the scheduler announced its end.
    """

    offset: int = 0
    about: Mapping[str, Any] = {}
    piece: str = ""
    task: int | None = None
    ended: bool = False
    unfit: str = ""
    warned_s: float | None = None


class Element:
    """One element that is watched, and what was read of its files so far."""

    def __init__(self, place: Place) -> None:
        """Begin with no file read."""
        self.place = place
        self.seen = Seen("", "")
        self.gone_since: float | None = None
        self.running_since: float | None = None
        self.requeued_for = "node"  # why the scheduler stopped it when it last did so to start it again
        self.taken: dict[str, Piece] = {}  # by name
        self._files: dict[Path, _File] = {}

    @property
    def began(self) -> bool:
        """Whether any attempt has written a file."""
        return bool(self._files)

    @property
    def latest(self) -> Path | None:
        """The file of the latest attempt; None where none has written one."""
        return max(self._files, default=None)

    @property
    def ran_s(self) -> float:
        """For how many seconds the queue listed it as running, before it was gone."""
        if self.gone_since is None or self.running_since is None:
            return 0.0
        return self.gone_since - self.running_since

    @property
    def ended(self) -> bool:
        """Whether the latest attempt has said that it ended, with nothing left to do."""
        return self._latest().ended

    def read(self, files: Iterable[Path]) -> Iterator[tuple[str, Outcome]]:
        """Yield the new outcomes in the element's files with the names of their pieces.

        Where a later file has appeared, the task that the earlier attempt had begun has a lost attempt.
        """
        for path in sorted(files):
            piece, running = self.running()
            if path not in self._files and running is not None:  # the scheduler requeued and restarted the element
                _logger.warning("element %d of %s was restarted by its scheduler", self.place.number, self.place.name)
                fault = EnvironmentFault(_REQUEUED[self.requeued_for], "nothing to do: it starts again")
                usage = {**self.about(), "exit_class": self.requeued_for}
                yield piece, Outcome(running, None, executed=True, failure=fault.failure, usage=usage, retried=True)
            file = self._files.get(path, _File())
            with path.open("rb") as stream:
                stream.seek(file.offset)
                data = stream.read()
            whole = data.rfind(b"\n") + 1
            for line in jobs.parse(data[:whole]):
                file = _after(file, line)
                if "taken" in line:
                    self.taken[line["piece"]] = from_values(line["taken"])
                if isinstance(line.get("outcome"), dict):  # earlier versions wrote lists; their receipts still count
                    yield line.get("piece", ""), Outcome.from_values(line["outcome"])
            self._files[path] = file._replace(offset=file.offset + whole)

    def running(self) -> tuple[str, int | None]:
        """Return the piece and the task that the latest attempt began and did not finish, or None as the task."""
        latest = self._latest()
        return latest.piece, latest.task

    def about(self) -> dict[str, Any]:
        """Return the start, the host and the process number of the latest attempt, as the trace has them."""
        return {key: value for key, value in self._latest().about.items() if key in {"started", "host", "pid"}}

    @property
    def unfit(self) -> str:
        """Why the latest attempt could do nothing where it ran; empty where it could."""
        return self._latest().unfit

    @property
    def warned_s(self) -> float | None:
        """After how many seconds the scheduler announced the end of the latest attempt; None where it did not."""
        return self._latest().warned_s

    def node(self) -> Mapping[str, Any]:
        """Return the host of the latest attempt, its instruction set and the number of its cores, where known."""
        return {key: value for key, value in self._latest().about.items() if key in {"host", "isa", "cores"}}

    def process(self) -> Process | None:
        """Return the process of the latest attempt, or None where none began."""
        about = self._latest().about
        return processes.from_record(about) if about else None

    def _latest(self) -> _File:
        """Return what was read of the latest file."""
        return self._files[max(self._files)] if self._files else _File()


def _after(file: _File, line: Mapping[str, Any]) -> _File:
    """Return what is known of a file after one more line of it."""
    if "started" in line:
        about = {key: line[key] for key in ("started", *Process._fields, "isa", "cores") if key in line}
        return file._replace(about=about, unfit=line.get("unfit", ""))
    if "warned_s" in line:
        return file._replace(warned_s=line["warned_s"])
    if "begun" in line:
        return file._replace(piece=line.get("piece", ""), task=line["begun"])
    if "outcome" in line:
        return file._replace(task=None)
    return file._replace(ended=True) if "ended" in line else file


class Array:
    """An array that is watched."""

    def __init__(self, root: Path, name: str, job: str, table: Mapping[str, Any]) -> None:
        """Take the elements from the table; each is open until it has ended or is lost."""
        self.name, self.job, self.table = name, job, table
        self.request = Request(**table["request"])
        self.logs, self._folder = logs_of(root, name, job), root / FOLDER / name
        self.since = time.monotonic()
        size = table["elements"] if "elements" in table else len(table["slices"])  # the latter in older folders
        self.open = [Element(Place(name, table["base"] + i)) for i in range(size)]

    def look(self) -> "Files":
        """Return the files that its elements have now."""
        listed = [path for path in self._folder.iterdir() if path.is_file()] if self._folder.is_dir() else []
        written: dict[int, list[Path]] = {}
        for path in listed:
            index = path.name.partition(".")[0]
            if path.suffix == ".jsonl" and index.isascii() and index.isdecimal():  # others are not the executor's
                written.setdefault(int(index), []).append(path)
        return Files(written, taken(path.name for path in listed))


class Files(NamedTuple):
    """The files of an array's elements by index: what they have written, and the names of the pieces they have."""

    written: Mapping[int, list[Path]]
    taken: Mapping[int, list[str]]
