"""Run one element of an array job: it takes one piece of work after another, while there is work and time left.

It first checks what every task needs of the node. The array's table is ``arrays/<name>.json`` in the run's folder. Each
attempt of an element writes one file of JSON
lines, ``arrays/<name>/<index>.<time>.jsonl``; the names of later attempts sort behind those of earlier ones. The first
line identifies the process and says what is unfit here, if anything is. Each task has a line before it begins, and a
line with its outcome; the last line says that the element ended. What it prints, a line for each piece of work, is its
log. Every line is on disk before the next step, so that the finished tasks of a killed element are known.
An element may run again at any time, because it was requeued or was taken for lost: published tasks do nothing.
"""

import importlib
import importlib.metadata
import json
import math
import os
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO, Any, NamedTuple

from wsiflow.errors import EnvironmentFault, InputError
from wsiflow.redaction import without_secrets
from wsiflow.run.executor import lifetime, pieces
from wsiflow.run.executor.protocol import Outcome, Work
from wsiflow.system import processes, publish
from wsiflow.system.machine import ISA_PINS, limit_threads, numeric_class
from wsiflow.system.usage import now

# Variables for finding programs, libraries and caches, for encoding texts, and those that decide last bits of scores.
_PASSED = (
    *("PATH", "LD_LIBRARY_PATH", "LD_PRELOAD", "HOME", "USER", "LOGNAME", "SHELL", "TZ", "XDG_CACHE_HOME"),
    *("PYTHONPATH", "PYTHONHOME", "PYTHONUTF8", "PYTHONNOUSERSITE", "PYTHONDONTWRITEBYTECODE", "VIRTUAL_ENV"),
    *("CONDA_PREFIX", "CONDA_DEFAULT_ENV", "LANG", "LANGUAGE", "LC_ALL", "LC_CTYPE"),
    *("HDF5_USE_FILE_LOCKING", "HDF5_PLUGIN_PATH", "APPTAINER_BIND", "SINGULARITY_BIND"),
    *ISA_PINS,
)
_NOT_PASSED = {"WSIFLOW_SWEEP", publish.SCRATCH}  # the overrides as they were typed, which may hold secrets

_LOOK_S, _LONGEST_LOOK_S = 0.5, 5.0  # between two looks for more work
_SPARE_S = 60.0  # of the requested time: for the start before this process knew of it, and the end
_SLOWER = 1.5  # times as long as the longest piece so far may the next one take
#: What must not differ from node to node, of the numeric class; its versions are those of the same environment.
_KIND = {"machine": "machine type", "vendor": "processor of", "isa": "instruction set"}
_WARNING = signal.SIGUSR2  # by which Grid Engine announces that it is about to kill


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
    path = table.with_suffix("") / f"{index}.{time.time_ns()}.jsonl"
    with (
        lifetime.Recorder(root, threads=job["threads"], job=job_of(path)) as life,
        path.open("x", encoding="utf-8") as stream,
        _warned(stream, began_s, life),
        ExitStack() as until_end,
    ):
        unfit = _unfit(job, until_end)
        node = {"isa": numeric_class(job["threads"])["isa"], "cores": len(os.sched_getaffinity(0))}
        _note(stream, {"started": now(), **processes.current()._asdict(), **node, "unfit": unfit})
        _print(f"element {index} of {table.stem} on {socket.gethostname()}, {node['cores']} cores, {node['isa']}")
        if unfit:
            _print(unfit)
            return EnvironmentFault.exit_code
        worst = _work(own, stream, began_s)
        _note(stream, {"ended": now()})
        _print(f"ended after {time.monotonic() - began_s:.1f} s")
    return worst


def _work(own: _Own, stream: IO[str], began_s: float) -> int:
    """Do pieces until there are none or no time is left, and return the worst exit code."""
    end_s = began_s + own.request.minutes * 60 - _SPARE_S
    left = deque(pieces.of_element(*own[:3]))  # the scheduler has restarted this element
    worst, longest_s, until_s = 0, 0.0, math.inf
    while name := left.popleft() if left else _next(own, until_s):
        taken_s = time.monotonic()
        worst = max(worst, _do(own, name, stream))
        longest_s = max(longest_s, time.monotonic() - taken_s)
        until_s = end_s - _SLOWER * longest_s
    return worst


def _unfit(job: Mapping[str, Any], until_end: ExitStack) -> str:
    """Return why no task can be done on this node; empty where all that every task needs is here."""
    here = socket.gethostname()
    for path in job.get("needs", ()):
        if not os.access(path, os.R_OK):
            what = "may not read" if os.path.lexists(path) else "does not see"
            return f"node {here} {what} {path}"
    version = importlib.metadata.version("wsiflow")
    if version != job.get("version", version):
        return f"node {here} has wsiflow {version}, and the run is of {job['version']}"
    kind = numeric_class(job["threads"])
    for name in _KIND.keys() & (job.get("kind") or {}).keys():
        if kind[name] != job["kind"][name]:
            differs = f"node {here} has the {_KIND[name]} {kind[name]}, and the run began on {job['kind'][name]}"
            return f"{differs}: scores would have other last bits there"
    if job.get("scratch"):
        try:
            folder = tempfile.mkdtemp(prefix="wsiflow-", dir=os.path.expandvars(job["scratch"]))
        except OSError as error:
            return f"node {here} has no scratch folder {job['scratch']}: {error.strerror}"
        until_end.callback(shutil.rmtree, folder, ignore_errors=True)
        os.environ[publish.SCRATCH] = os.environ["TMPDIR"] = tempfile.tempdir = folder
    return ""


@contextmanager
def _warned(stream: IO[str], began_s: float, life: lifetime.Recorder) -> Iterator[None]:
    """End at once where the scheduler announces that it is about to kill this element, and record that it did."""

    def end(_number: int, _frame: object) -> None:
        line = json.dumps({"warned_s": round(time.monotonic() - began_s, 1)})
        os.write(stream.fileno(), f"\n{line}\n".encode())  # the stream itself may be in the middle of a line
        life.end()
        os._exit(128 + _WARNING)

    before = signal.signal(_WARNING, end)
    try:
        yield
    finally:
        signal.signal(_WARNING, before)


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
    piece, worst, began_s = pieces.read(*own[:3], name), 0, time.monotonic()
    _note(stream, {"piece": name, "taken": piece})
    work = resolve(piece.call.work)
    _note(stream, {"begun": piece.lo, "piece": name})
    for outcome in work(own.root / piece.call.source, piece.call.stage, piece.lo, piece.hi):
        worst = max(worst, outcome.exit_code)
        _print(f"{now()} {piece.call.stage} {_about(outcome)}, {time.monotonic() - began_s:.1f} s")
        began_s = time.monotonic()
        _note(stream, {"outcome": outcome._asdict(), "piece": name})
        if outcome.task + 1 < piece.hi:
            _note(stream, {"begun": outcome.task + 1, "piece": name})
    pieces.finish(*own[:3], name)
    return worst


def _about(outcome: Outcome) -> str:
    """Return what a task published, or why it failed, in words."""
    if outcome.failure:
        return f"task {outcome.task} failed: {outcome.failure}"
    return f"task {outcome.task}: {(outcome.receipt or {}).get('path', 'done')}"


def script(prologue: Iterable[str] = ()) -> str:
    """Return the job script of every array of a run; its arguments are the command to start.

    Args:
        prologue: Lines of shell that run first.
    """
    return "\n".join([*_SCRIPT[:3], *prologue, _SCRIPT[3], ""])


_SCRIPT = (
    "#!/bin/bash",
    "# One element of an array job. The arguments are a command and the array's table; the element's index is in",
    "# the environment, and is its name among the elements that take work from the run's folder.",
    'exec "$@"',
)


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


def job_of(path: Path) -> str:
    """Return the name by which the bill knows an attempt of an element, from the file that the attempt writes."""
    return f"{path.parent.name}.{path.stem}"


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


def _print(text: str) -> None:
    """Print a line of the log; a log that cannot be written is no reason to end."""
    with suppress(OSError):
        sys.stdout.write(f"{without_secrets(text)}\n")
        sys.stdout.flush()


def _note(stream: IO[str], line: dict[str, Any]) -> None:
    stream.write(json.dumps(line) + "\n")
    stream.flush()
    os.fsync(stream.fileno())
