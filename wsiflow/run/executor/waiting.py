"""What a run has in the queue of its scheduler, as the driver saw it last: a file that every process can read."""

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from wsiflow.run.executor.pieces import FOLDER
from wsiflow.system import publish

_VIEW = f"{FOLDER}/queue.json"
_UNKNOWN = "reason unknown"


class Queued(NamedTuple):
    """The elements of an array that wait or run.

    Attributes:
        job: The scheduler's id of the array.
        waiting: Number of elements that wait, by the scheduler's reason.
        running: Number of elements that run.
        memory_mb, minutes: What each of them requested.
        logs: Folder of their logs in the run's folder; empty where a former version has not recorded it.
    """

    job: str
    waiting: Mapping[str, int]
    running: int
    memory_mb: int
    minutes: int
    logs: str = ""

    def as_text(self) -> str:
        """Return the array in words."""
        about = f"{self.memory_mb:,} MB, {self.minutes:,} min each" + f"; logs in {self.logs}" * bool(self.logs)
        return f"array job {self.job}: {counts([self])} ({about})"


class View(NamedTuple):
    """All arrays of a run that are in the queue.

    Attributes:
        at: When the driver saw them, ISO 8601, UTC.
        arrays: The arrays.
        refused: Why the scheduler does not take another one at present; empty where it does.
    """

    at: str
    arrays: Sequence[Queued]
    refused: str = ""


def counts(arrays: Iterable[Queued]) -> str:
    """Return how many elements wait, with the reasons, and how many run: ``12 wait (Resources), 3 run``."""
    waiting, running = Counter[str](), 0
    for array in arrays:
        waiting.update(array.waiting)
        running += array.running
    texts = []
    if n_waiting := sum(waiting.values()):
        texts.append(f"{n_waiting:,} wait ({', '.join(reason or _UNKNOWN for reason in waiting)})")
    if running:
        texts.append(f"{running:,} run")
    return ", ".join(texts)


def write(root: Path, view: View) -> None:
    """Write what is in the queue; a disk that refuses is reported by the next file that matters."""
    values = {**view._asdict(), "arrays": [array._asdict() for array in view.arrays]}
    with suppress(OSError):
        publish.write_view(root, _VIEW, json.dumps(values).encode())


def read(root: Path) -> View | None:
    """Return what was in the queue; None for runs that have no array jobs."""
    try:
        values = json.loads((root / _VIEW).read_bytes())
        return View(values["at"], [Queued(**array) for array in values["arrays"]], values["refused"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def describe(root: Path) -> list[str]:
    """Return a line for each array that is in the queue, as the driver saw it last."""
    view = read(root)
    if view is None:
        return []
    refused = [f"{_refused(view)}, as of {view.at}"] if view.refused else []
    return [*refused, *(f"{array.as_text()}, as of {view.at}" for array in view.arrays)]


def text(root: Path) -> str:
    """Return what is in the queue of the scheduler in words: ``elements: 12 wait (Resources), 3 run``; or nothing."""
    view = read(root)
    if view is None:
        return ""
    words = "; ".join(filter(None, (counts(view.arrays), _refused(view))))
    return f"elements: {words}" if words else ""


def _refused(view: View) -> str:
    return f"no more are taken at present ({view.refused})" if view.refused else ""
