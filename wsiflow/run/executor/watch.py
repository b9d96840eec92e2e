"""What a run has in a scheduler's queue: which elements are there, and what their files have said so far."""

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

_WINDOW_PARTS = 8  # no array is smaller than such a part while more wait, or each element would be a submission
_LONGEST_POLL_S = 300.0


class Tries(NamedTuple):
    """What became of earlier attempts: how many were lost, and how many of those to memory and to time."""

    lost: int = 0
    memory: int = 0
    time: int = 0

    def after(self, cause: str) -> "Tries":
        """Return the tries with one more."""
        return Tries(self.lost + 1, self.memory + (cause == "memory"), self.time + (cause == "time"))


class Piece(NamedTuple):
    """Tasks that wait for an element."""

    lo: int
    hi: int
    tries: Tries


class Poll(NamedTuple):
    """The queue at a moment of the monotonic clock; None where the scheduler did not answer."""

    taken_s: float
    places: Mapping[Place, Seen] | None


class Queue:
    """What the run has in the scheduler's queue: looked at by one thread for all, and never more than the window."""

    def __init__(self, params: ArrayParams, *, workers: int) -> None:
        """Begin with nothing; no window is wider than the number of ``workers``, 0: any number."""
        self._params, self._window = params, min(params.window, workers or params.window)
        self._held: dict[Place, bool] = {}
        self._state, self._asking = threading.Lock(), threading.Lock()
        self._closed = threading.Event()
        self._last = Poll(float("-inf"), {})
        self._pause_s = params.poll_s

    def take(self, name: str, wanted: int, *, longest: int) -> int:
        """Make room for elements of a new array.

        Returns:
            For how many there is room; 0 where waiting is better.
        """
        with self._state:
            room = self._window - len(self._held)
            most = min(wanted, longest)
            if room < min(most, max(1, self._window // _WINDOW_PARTS)):
                return 0
            size = min(most, room)
            self._held.update(dict.fromkeys(self._places(name, size), False))
            return size

    def close(self) -> None:
        """Let nobody wait for the queue any more."""
        self._closed.set()

    def drop(self, name: str) -> None:
        """Count an array no more that was never submitted."""
        with self._state:
            self._held = {place: finished for place, finished in self._held.items() if place.name != name}

    def give_back(self, name: str) -> bool:
        """Count an array no more that was refused, and keep to half the window, or to what was accepted of it.

        Returns:
            Whether the run has more in the queue, whose end may make room at the scheduler.
        """
        self.drop(name)
        with self._state:
            places = self._last.places or {}
            accepted = sum(self._is_alive(places, place) for place in self._held)
            self._window = max(1, self._window // 2, accepted)
            return bool(self._held)

    def hold(self, places: Iterable[Place], *, finished: bool) -> None:
        """Count elements that are in the queue already."""
        with self._state:
            self._held.update(dict.fromkeys(places, finished))

    def holds(self, place: Place) -> bool:
        """Tell whether an element is still counted."""
        with self._state:
            return place in self._held

    def finish(self, places: Iterable[Place]) -> None:
        """Expect nothing more of elements: they count until the scheduler has let them go."""
        with self._state:
            self._held.update({place: True for place in places if place in self._held})

    def release(self, places: Iterable[Place]) -> None:
        """Count elements no more."""
        with self._state:
            for place in places:
                self._held.pop(place, None)

    def poll(self) -> Poll:
        """Return the queue as it is now or was found by another thread since this call began.

        A scheduler that does not answer is asked less and less often.

        Raises:
            EnvironmentFault: The queue was closed.
        """
        asked = time.monotonic()
        with self._asking:
            if self._last.taken_s < asked:
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
            _logger.warning("%s does not answer, it is asked again", self._params.dialect.name)
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
    """One element that is watched: its slice, and what its files have said so far."""

    def __init__(self, place: Place, piece: Piece) -> None:
        """Begin with nothing known."""
        self.place, self.piece = place, piece
        self.missing = dict.fromkeys(range(piece.lo, piece.hi))  # in order
        self.seen = Seen("", "")
        self.gone_since: float | None = None
        self._files: dict[Path, tuple[int, dict[str, Any], int | None]] = {}

    @property
    def began(self) -> bool:
        """Whether any attempt left a file."""
        return bool(self._files)

    def read(self, files: Iterable[Path]) -> Iterator[Outcome]:
        """Yield what the element's files have to say that is new, and the attempt that ended with each but the last."""
        for path in sorted(files):
            at = self.under_way()
            if path not in self._files and at is not None:  # its scheduler requeued and restarted it
                _logger.warning("element %d of %s was restarted by its scheduler", self.place.number, self.place.name)
                usage = {**self.about(), "exit_class": "node"}
                yield Outcome(at, None, executed=True, failure=_REQUEUED, usage=usage, retried=True)
            offset, about, begun = self._files.get(path, (0, {}, None))
            with path.open("rb") as stream:
                stream.seek(offset)
                data = stream.read()
            whole = data.rfind(b"\n") + 1
            for line in jobs.parse(data[:whole]):
                if "started" in line:
                    about = {key: line[key] for key in ("started", *Process._fields) if key in line}
                elif "begun" in line:
                    begun = line["begun"]
                elif isinstance(line["outcome"], dict):  # an earlier version wrote lists; its receipts still count
                    outcome = Outcome.from_values(line["outcome"])
                    begun = None
                    if outcome.task in self.missing:
                        del self.missing[outcome.task]
                        yield outcome
            self._files[path] = offset + whole, about, begun

    def under_way(self) -> int | None:
        """Return the task that the latest attempt was at, where it is still missing."""
        begun = self._latest()[2]
        return begun if begun in self.missing else None

    def about(self) -> dict[str, Any]:
        """Return who the latest attempt was, as the trace tells it."""
        return {key: value for key, value in self._latest()[1].items() if key in {"started", "host", "pid"}}

    def process(self) -> Process | None:
        """Return the process of the latest attempt, None where none began."""
        about = self._latest()[1]
        return processes.from_record(about) if about else None

    def _latest(self) -> tuple[int, dict[str, Any], int | None]:
        """Return how far the latest attempt's file was read, who wrote it, and the task it was at."""
        return self._files[max(self._files)] if self._files else (0, {}, None)


class Array:
    """An array that is watched."""

    def __init__(self, root: Path, name: str, job: str, table: Mapping[str, Any]) -> None:
        """Take what the table says: all elements are open until their tasks have ended or they are lost."""
        self.name, self.job, self.table = name, job, table
        self.folder, self.logs = root / FOLDER / name, root / LOGS / name
        self.since = time.monotonic()
        self.open = [
            Element(Place(name, table["base"] + i), Piece(lo, hi, Tries(*tries)))
            for i, ((lo, hi), tries) in enumerate(zip(table["slices"], table["tries"], strict=True))
        ]

    def files(self) -> dict[int, list[Path]]:
        """Return the files of every element that has begun, by index."""
        found: dict[int, list[Path]] = {}
        for path in self.folder.glob("[0-9]*.jsonl"):  # what else lies there is not ours
            index = path.name.partition(".")[0]
            if index.isascii() and index.isdecimal():
                found.setdefault(int(index), []).append(path)
        return found
