"""Run one element of an array job: it takes one piece of work after another, while there is work and time left.

The array's table is ``arrays/<name>.json`` in the run's folder. Each attempt of an element writes one file of JSON
lines, ``arrays/<name>/<index>.<time>.jsonl``; the names of later attempts sort behind those of earlier ones. The first
line identifies the process. Each task has a line before it begins, and a line with its outcome; the last line says why
the element ended. Every line is on disk before the next step, so that the finished tasks of a killed element are known.
An element may run again at any time, because it was requeued or was taken for lost: published tasks do nothing.
"""

import importlib
import json
import math
import os
import sys
import time
from collections import deque
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple

from wsiflow.errors import InputError
from wsiflow.run.executor import lifetime, pieces
from wsiflow.run.executor.protocol import Work
from wsiflow.system import processes
from wsiflow.system.machine import ISA_PINS, limit_threads
from wsiflow.system.usage import now

# Variables for finding programs, libraries and caches, for encoding texts, and those that decide last bits of scores.
_PASSED = (
    *("PATH", "LD_LIBRARY_PATH", "LD_PRELOAD", "HOME", "USER", "LOGNAME", "SHELL", "TZ", "XDG_CACHE_HOME"),
    *("PYTHONPATH", "PYTHONHOME", "PYTHONUTF8", "PYTHONNOUSERSITE", "PYTHONDONTWRITEBYTECODE", "VIRTUAL_ENV"),
    *("CONDA_PREFIX", "CONDA_DEFAULT_ENV", "LANG", "LANGUAGE", "LC_ALL", "LC_CTYPE"),
    *("HDF5_USE_FILE_LOCKING", "HDF5_PLUGIN_PATH", "APPTAINER_BIND", "SINGULARITY_BIND"),
    *ISA_PINS,
)
_NOT_PASSED = {"WSIFLOW_SWEEP"}  # the overrides as they were typed, which may hold secrets

#: The job script of every array of every run; its arguments are the command to start.
SCRIPT = """\
#!/bin/bash
# One element of an array job. The arguments are a command and the array's table; the element's index is in
# the environment, and is its name among the elements that take work from the run's folder.
exec "$@"
"""

_LOOK_S, _LONGEST_LOOK_S = 0.5, 5.0  # between two looks for more work
_SPARE_S = 60.0  # of the requested time: for the start before this process knew of it, and the end
_SLOWER = 1.5  # times as long as the longest piece so far may the next one take


class _Own(NamedTuple):
    """This element: its place, what it got from the scheduler, and for how long it may be idle."""

    root: Path
    array: str
    number: int
    request: pieces.Request
    idle_s: float


def run(table: Path) -> int:
    """Do pieces of work until there are none or no time is left, and return the worst exit code of their tasks.

    Args:
        table: The array's table.

    Raises:
        InputError: The index is not in the environment.
    """
    began_s, root = time.monotonic(), table.parents[1]
    job = json.loads(table.read_text(encoding="utf-8"))
    index = _index(job["index"])
    if index - job["base"] >= job["elements"]:  # some schedulers have no arrays of one element
        return 0
    limit_threads(job["threads"])  # before anything imports torch
    own = _Own(root, table.stem, index, pieces.Request(**job["request"]), job["idle_s"])
    end_s = began_s + own.request.minutes * 60 - _SPARE_S
    life = lifetime.Recorder(root, threads=job["threads"])
    with life, (table.with_suffix("") / f"{index}.{time.time_ns()}.jsonl").open("x", encoding="utf-8") as stream:
        _note(stream, {"started": now(), **processes.current()._asdict()})
        left = deque(pieces.of_element(*own[:3]))  # the scheduler has restarted this element
        worst, longest_s, until_s = 0, 0.0, math.inf
        while name := left.popleft() if left else _next(own, until_s):
            taken_s = time.monotonic()
            worst = max(worst, _do(own, name, stream))
            longest_s = max(longest_s, time.monotonic() - taken_s)
            until_s = end_s - _SLOWER * longest_s
        _note(stream, {"ended": now()})
    return worst


def _next(own: _Own, until_s: float) -> str:
    """Take a piece, and wait for one as long as an element may be idle, but not beyond a moment of its clock.

    It does not wait where other pieces need an element with more, which may need the place of this one.

    Returns:
        The name of the piece; empty where the element is to end.
    """
    idle_until_s, pause_s = time.monotonic() + own.idle_s, _LOOK_S
    while time.monotonic() < until_s:
        posted = pieces.posted(own.root)
        fitting = [name for name in posted if pieces.fits(name, own.request)]
        if name := pieces.take(own.root, own.array, own.number, fitting):
            return name
        left_s = min(until_s, idle_until_s) - time.monotonic()
        if left_s <= 0 or len(fitting) < len(posted) or (own.root / pieces.CLOSED).exists():
            break
        time.sleep(min(pause_s, left_s))
        pause_s = min(2 * pause_s, _LONGEST_LOOK_S)
    return ""


def _do(own: _Own, name: str, stream: IO[str]) -> int:
    """Do the tasks of a piece, and return the worst exit code of them."""
    piece, worst = pieces.read(*own[:3], name), 0
    _note(stream, {"piece": name, "taken": piece})
    work = resolve(piece.call.work)
    _note(stream, {"begun": piece.lo, "piece": name})
    for outcome in work(own.root / piece.call.source, piece.call.stage, piece.lo, piece.hi):
        worst = max(worst, outcome.exit_code)
        _note(stream, {"outcome": outcome._asdict(), "piece": name})
        if outcome.task + 1 < piece.hi:
            _note(stream, {"begun": outcome.task + 1, "piece": name})
    pieces.finish(*own[:3], name)
    return worst


def variables(environ: Mapping[str, str], more: Iterable[str] = ()) -> list[str]:
    """Return the names of the environment variables that an element needs, of those that are set.

    No others are passed on: some schedulers show the variables of a job to every user of the cluster, and environments
    contain passwords and keys.

    Args:
        environ: The environment of the run.
        more: Names of more variables that the user adds.
    """
    own = (name for name in environ if name.startswith("WSIFLOW_") and name not in _NOT_PASSED)
    return sorted({name for name in (*_PASSED, *own, *more) if name in environ})


def starter() -> list[str]:
    """Return the command that starts an element with this Python; the path of the table is its last argument."""
    return [sys.executable, "-m", "wsiflow.flows", "element"]


def dotted(work: Work) -> str:
    """Return the name by which an element imports a function, ``module:function``."""
    return f"{work.__module__}:{work.__qualname__}"


def resolve(name: str) -> Work:
    """Import the function with a name of `dotted`."""
    module, _, function = name.partition(":")
    work: Work = getattr(importlib.import_module(module), function)
    return work


def _index(variable: str) -> int:
    value = os.environ.get(variable, "")
    if not value.isdecimal():  # Grid Engine sets "undefined" outside of arrays
        cause = f"{variable} is {value!r}, it must be the index of an element of an array job"
        raise InputError(cause, "this command is for array jobs; wsiflow run submits them")
    return int(value)


def _note(stream: IO[str], line: dict[str, Any]) -> None:
    stream.write(json.dumps(line) + "\n")
    stream.flush()
    os.fsync(stream.fileno())
