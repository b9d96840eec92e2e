"""The arrays of a run in the queue of a scheduler: which elements are there, and what they have written so far."""

import logging
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from wsiflow.errors import EnvironmentFault
from wsiflow.run.executor import jobs
from wsiflow.run.executor.dialect import ArrayParams, Place, Seen
from wsiflow.run.executor.protocol import Outcome, closed
from wsiflow.system import processes
from wsiflow.system.processes import Process

_logger = logging.getLogger(__name__)

FOLDER, LOGS = "arrays", "logs"

_WINDOW_PARTS = 8  # while pieces wait, no array is smaller than such a part: elements are not submitted singly
_LONGEST_POLL_S = 300.0


class Tries(NamedTuple):
    """The number of earlier attempts that were lost, and how many of them for lack of memory and of time."""

    lost: int = 0
    memory: int = 0
    time: int = 0

    def after(self, cause: str) -> "Tries":
        """Return the numbers after one more attempt was lost for a cause."""
        return Tries(self.lost + 1, self.memory + (cause == "memory"), self.time + (cause == "time"))


class Piece(NamedTuple):
    """The tasks ``lo`` to ``hi - 1``, which wait for an element."""

    lo: int
    hi: int
    tries: Tries


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

    def give_back(self, name: str) -> bool:
        """Free the room of an array that was refused, and halve the window, but not below what was accepted.

        Returns:
            Whether the run has other elements in the queue, which make room at the scheduler when they end.
        """
        self.drop(name)
        with self._state:
            places = self._last.places or {}
            accepted = sum(self._is_alive(places, place) for place in self._held)
            self._window = max(1, self._window // 2, accepted)
            return bool(self._held)

    def hold(self, places: Iterable[Place], *, finished: bool) -> None:
        """Count elements that are in the queue already; ``finished`` ones until the scheduler no longer lists them."""
        with self._state:
            self._held.update(dict.fromkeys(places, finished))

    def holds(self, place: Place) -> bool:
        """Tell whether an element is still counted."""
        with self._state:
            return place in self._held

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

    def _ask(self) -> Poll:
        with self._state:
            names = {place.name for place in self._held}
        taken = time.monotonic()
        places = jobs.listing(self._params.dialect, names)
        if places is None:
            _logger.warning("%s does not answer and is asked again", self._params.dialect.name)
            self._pause_s = max(self._params.poll_s, min(2 * self._pause_s, _LONGEST_POLL_S))
            return Poll(taken, None)
        self._pause_s = self._params.poll_s
        with self._state:
            gone = [place for place, finished in self._held.items() if finished and not self._is_alive(places, place)]
            for place in gone:
                del self._held[place]
        return Poll(taken, places)

    def _is_alive(self, places: Mapping[Place, Seen], place: Place) -> bool:
        return place in places and self._params.dialect.is_alive(places[place].state)

    def _places(self, name: str, size: int) -> list[Place]:
        base = self._params.dialect.base
        return [Place(name, base + i) for i in range(size)]


_REQUEUED = EnvironmentFault("its element was requeued by the scheduler", "nothing to do: it starts again").failure


class Element:
    """One element that is watched: its slice, and what was read of its files so far."""

    def __init__(self, place: Place, piece: Piece) -> None:
        """Begin with all tasks missing, and no file read."""
        self.place, self.piece = place, piece
        self.missing = dict.fromkeys(range(piece.lo, piece.hi))  # a set in order
        self.seen = Seen("", "")
        self.gone_since: float | None = None
        self._files: dict[Path, tuple[int, dict[str, Any], int | None]] = {}

    @property
    def began(self) -> bool:
        """Whether any attempt has written a file."""
        return bool(self._files)

    def read(self, files: Iterable[Path]) -> Iterator[Outcome]:
        """Yield the new outcomes in the element's files, and a lost attempt where a later file has appeared."""
        for path in sorted(files):
            running = self.running_task()
            if path not in self._files and running is not None:  # the scheduler requeued and restarted the element
                _logger.warning("element %d of %s was restarted by its scheduler", self.place.number, self.place.name)
                usage = {**self.about(), "exit_class": "node"}
                yield Outcome(running, None, executed=True, failure=_REQUEUED, usage=usage, retried=True)
            offset, about, task = self._files.get(path, (0, {}, None))
            with path.open("rb") as stream:
                stream.seek(offset)
                data = stream.read()
            whole = data.rfind(b"\n") + 1
            for line in jobs.parse(data[:whole]):
                if "started" in line:
                    about = {key: line[key] for key in ("started", *Process._fields) if key in line}
                elif "begun" in line:
                    task = line["begun"]
                elif isinstance(line["outcome"], dict):  # earlier versions wrote lists; their receipts still count
                    outcome = Outcome.from_values(line["outcome"])
                    task = None
                    if outcome.task in self.missing:
                        del self.missing[outcome.task]
                        yield outcome
            self._files[path] = offset + whole, about, task

    def running_task(self) -> int | None:
        """Return the task that the latest attempt began and did not finish, or None."""
        task = self._latest()[2]
        return task if task in self.missing else None

    def about(self) -> dict[str, Any]:
        """Return the start, the host and the process number of the latest attempt, as the trace has them."""
        return {key: value for key, value in self._latest()[1].items() if key in {"started", "host", "pid"}}

    def process(self) -> Process | None:
        """Return the process of the latest attempt, or None where none began."""
        about = self._latest()[1]
        return processes.from_record(about) if about else None

    def _latest(self) -> tuple[int, dict[str, Any], int | None]:
        """Return the offset to which the latest file was read, the process that wrote it, and the task it has begun."""
        return self._files[max(self._files)] if self._files else (0, {}, None)


class Array:
    """An array that is watched."""

    def __init__(self, root: Path, name: str, job: str, table: Mapping[str, Any]) -> None:
        """Take the elements from the table; each is open until its tasks have ended or it is lost."""
        self.name, self.job, self.table = name, job, table
        self.folder, self.logs = root / FOLDER / name, root / LOGS / name
        self.since = time.monotonic()
        self.open = [
            Element(Place(name, table["base"] + i), Piece(lo, hi, Tries(*tries)))
            for i, ((lo, hi), tries) in enumerate(zip(table["slices"], table["tries"], strict=True))
        ]

    def files(self) -> dict[int, list[Path]]:
        """Return the files of every element that has begun, by index."""
        files: dict[int, list[Path]] = {}
        for path in self.folder.glob("[0-9]*.jsonl"):  # other files there are not the executor's
            index = path.name.partition(".")[0]
            if index.isascii() and index.isdecimal():
                files.setdefault(int(index), []).append(path)
        return files
