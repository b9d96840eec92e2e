"""The work of array jobs as files: each piece of work is posted once, and exactly one element takes it.

A posted piece is a file in ``arrays/open``. An element takes it by renaming the file into the folder of its array,
which succeeds for one element only, and removes it there when all tasks of the piece have ended. So the pieces that an
element had when it died are the files with its number. The driver withdraws what nobody has taken by removing it.

The name of a piece begins with the memory and the minutes that it needs, then come its place in the order of posting,
its stage and a random text: an element knows from the names alone which pieces it can do.
"""

import json
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from wsiflow.system import publish

FOLDER = "arrays"
CLOSED = f"{FOLDER}/closed"
"""Elements end where this file exists in the run's folder: no more work follows."""

_OPEN = f"{FOLDER}/open"
_TAKEN = ".taken"
_SPREAD = 16  # elements that look at the same moment begin at different ones of the first pieces


class Tries(NamedTuple):
    """The number of earlier attempts that were lost, and how many of them for lack of memory and of time."""

    lost: int = 0
    memory: int = 0
    time: int = 0

    def after(self, cause: str) -> "Tries":
        """Return the numbers after one more attempt was lost for a cause."""
        return Tries(self.lost + 1, self.memory + (cause == "memory"), self.time + (cause == "time"))


class Request(NamedTuple):
    """What is requested of the scheduler for an element: memory in MB, and minutes."""

    memory_mb: int
    minutes: int


class Call(NamedTuple):
    """What is done with the tasks of a piece: the work's dotted name, the file that lists the tasks, and the stage."""

    work: str
    source: str
    stage: str


class Piece(NamedTuple):
    """The tasks ``lo`` to ``hi - 1`` of a stage, which one element does.

    Attributes:
        call: What is done with the tasks.
        lo: Index of the first task.
        hi: Index behind the last task.
        tries: Earlier attempts at them.
        posted: When the piece was posted, ISO 8601; empty before.
    """

    call: Call
    lo: int
    hi: int
    tries: Tries = Tries()
    posted: str = ""

    @property
    def tasks(self) -> range:
        """The indices of its tasks."""
        return range(self.lo, self.hi)


def post(root: Path, piece: Piece, request: Request, number: int) -> str:
    """Post a piece, and return its name.

    Args:
        root: The run's folder.
        piece: The piece.
        request: What an element needs to do it.
        number: Its place in the order of posting.
    """
    name = f"{request.memory_mb}-{request.minutes}-{number:07}-{piece.call.stage}-{uuid.uuid4().hex[:12]}"
    publish.write_view(root, f"{_OPEN}/{name}", json.dumps(piece).encode())
    return name


def posted(root: Path) -> list[str]:
    """Return the names of the pieces that nobody has taken, the first posted one first."""
    with suppress(FileNotFoundError):
        return sorted((path.name for path in (root / _OPEN).iterdir()), key=lambda name: name.split("-", 3)[2])
    return []


def request_of(name: str) -> Request:
    """Return what an element needs to do a piece, by the piece's name."""
    memory_mb, minutes = name.split("-", 2)[:2]
    return Request(int(memory_mb), int(minutes))


def fits(name: str, given: Request) -> bool:
    """Tell whether an element with so much memory and time can do a piece."""
    needed = request_of(name)
    return needed.memory_mb <= given.memory_mb and needed.minutes <= given.minutes


def withdraw(root: Path, names: Iterable[str]) -> list[str]:
    """Withdraw pieces, and return the names of those that nobody had taken before."""
    withdrawn = []
    for name in names:
        with suppress(FileNotFoundError):
            (root / _OPEN / name).unlink()
            withdrawn.append(name)
    return withdrawn


def close(root: Path) -> None:
    """Withdraw all pieces, and let elements end that have none."""
    publish.write_view(root, CLOSED, b"")
    withdraw(root, posted(root))


def take(root: Path, array: str, index: int, names: Sequence[str]) -> str:
    """Take one of the first of some posted pieces, and return its name; empty where others were quicker.

    Args:
        root: The run's folder.
        array: Name of the element's array.
        index: Its index there.
        names: Names of posted pieces that the element can do.
    """
    first = index % min(_SPREAD, len(names)) if names else 0
    for name in (*names[first:], *names[:first]):
        target = _taken(root, array, index, name)
        try:
            (root / _OPEN / name).rename(target)
        except FileNotFoundError:
            if not target.exists():  # it does where a network file system lost its first answer
                continue
        return name
    return ""


def read(root: Path, array: str, index: int, name: str) -> Piece:
    """Return a piece that an element has taken."""
    return from_values(json.loads(_taken(root, array, index, name).read_text(encoding="utf-8")))


def from_values(values: Sequence[Any]) -> Piece:
    """Return the piece that was written as JSON."""
    call, lo, hi, tries, posted_at = values
    return Piece(Call(*call), lo, hi, Tries(*tries), posted_at)


def finish(root: Path, array: str, index: int, name: str) -> None:
    """Remove a piece that an element had taken, because its tasks have ended or others do them."""
    _taken(root, array, index, name).unlink(missing_ok=True)


def taken(names: Iterable[str]) -> Mapping[int, list[str]]:
    """Return the pieces that each element has, by its index, from the names of the files in its array's folder."""
    found: dict[int, list[str]] = {}
    for name in names:
        index, _, piece = name.removesuffix(_TAKEN).partition(".")
        if name.endswith(_TAKEN) and index.isascii() and index.isdecimal():
            found.setdefault(int(index), []).append(piece)
    return found


def of_element(root: Path, array: str, index: int) -> Iterator[str]:
    """Yield the pieces that an element has: those it had when it was stopped, where the scheduler restarts it."""
    names = (path.name for path in (root / FOLDER / array).glob(f"{index}.*{_TAKEN}"))
    yield from sorted(taken(names).get(index, ()))


def _taken(root: Path, array: str, index: int, name: str) -> Path:
    return root / FOLDER / array / f"{index}.{name}{_TAKEN}"
