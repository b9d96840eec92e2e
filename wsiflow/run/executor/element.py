"""Run one element of an array job: it finds its slice in the table by its index, and writes the outcome of each task.

The table is ``arrays/<name>.json`` in the run's folder, written before the array is submitted. Each attempt of an
element writes one file of JSON lines, ``arrays/<name>/<index>.<time>.jsonl``; the names of later attempts sort behind
those of earlier ones. The first line identifies the process. Each task has a line before it begins, and a line with its
outcome. Every line is on disk before the next step, so that the finished tasks of a killed element are known. An
element may run again at any time, because it was requeued or was taken for lost: published tasks do nothing.
"""

import importlib
import json
import os
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO, Any

from wsiflow.errors import InputError
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
# the environment, and says which slice of the table is its own.
exec "$@"
"""


def run(table: Path) -> int:
    """Do the slice of this element, and return the worst exit code of its tasks.

    Args:
        table: The array's table.

    Raises:
        InputError: The index is not in the environment.
    """
    job = json.loads(table.read_text(encoding="utf-8"))
    index = _index(job["index"])
    place = index - job["base"]
    if place >= len(job["slices"]):  # some schedulers have no arrays of one element
        return 0
    limit_threads(job["threads"])  # before anything imports torch
    lo, hi = job["slices"][place]
    with (table.with_suffix("") / f"{index}.{time.time_ns()}.jsonl").open("x", encoding="utf-8") as stream:
        _note(stream, {"started": now(), **processes.current()._asdict()})
        work = resolve(job["work"])
        _note(stream, {"begun": lo})
        worst = 0
        for outcome in work(table.parents[1] / job["source"], job["stage"], lo, hi):
            worst = max(worst, outcome.exit_code)
            _note(stream, {"outcome": outcome._asdict()})
            if outcome.task + 1 < hi:
                _note(stream, {"begun": outcome.task + 1})
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
