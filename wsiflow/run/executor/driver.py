"""The log of the drivers of a run, with any executor: a line when a driver starts, and a line when it ends.

A driver that executed tasks adds a line with the core-seconds of all its processes. A driver that was killed leaves
neither. Whether its process still runs is asked of the kernel, which does not
know processes on other machines or in other containers.
"""

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from wsiflow.errors import WsiflowError
from wsiflow.redaction import without_secrets
from wsiflow.run.executor.jobs import LOG as JOBS
from wsiflow.run.executor.jobs import identity, parse
from wsiflow.system import processes, publish
from wsiflow.system.usage import now

LOG = f"{publish.RECEIPTS}/drivers.jsonl"


class Spent(NamedTuple):
    """What a driver cost.

    Attributes:
        since: When it started, ISO 8601, UTC.
        core_s: Core-seconds of the driver and its descendants, with its start; None where it has not recorded them.
        local: Whether these are all of the run's processes, and no workers elsewhere.
        start_s: Core-seconds of the start, which a process with several runs charges to each of them.
        cores: Number of cores that workers here have; None where a former version has not recorded it.
        elapsed_s: Wall seconds of the driver, with its start; None where it has not recorded them.
    """

    since: str
    core_s: float | None
    local: bool
    start_s: float = 0.0
    cores: int | None = None
    elapsed_s: float | None = None


class _Beginning(NamedTuple):
    """When this process began to drive a run, ISO 8601, UTC, and in seconds of the monotonic clock."""

    since: str
    at_s: float


_beginnings: dict[Path, _Beginning] = {}  # by the run's folder


def since(root: Path) -> str:
    """Return when this process began to drive a run, which names the driver among those of the run; empty for none."""
    return _beginnings[root].since if root in _beginnings else ""


@contextmanager
def recorded(root: Path, *, cores: int) -> Iterator[dict[str, Any]]:
    """Record that this process drives the run during the body, which may set ``exit_code`` in the yielded values.

    Args:
        root: The run's folder.
        cores: Number of cores of workers that descend from this process; 0 where workers are elsewhere.
    """
    who = identity()
    _beginnings[root] = _Beginning(now(), time.monotonic())
    ended: dict[str, Any] = {"exit_code": WsiflowError.exit_code}
    _note(root, {"at": since(root), "event": "driver", **who, "local": cores > 0, "cores": cores})
    try:
        yield ended
    except BaseException as error:
        ended["exit_code"] = getattr(error, "exit_code", WsiflowError.exit_code)
        ended["error"] = without_secrets(" ".join(f"{type(error).__name__}: {error}".split()))
        raise
    finally:
        _note(root, {"event": "left", **who, **ended})


def _note(root: Path, line: Mapping[str, Any]) -> None:
    path = root / LOG
    with suppress(OSError):  # the next file that is published there reports what is wrong with the disk
        path.parent.mkdir(parents=True, exist_ok=True)
        publish.append_line(path, json.dumps({"at": now(), **line}), sync=True)


def note_spent(root: Path, core_s: float, start_s: float = 0.0) -> None:
    """Record the core-seconds of this driver and its descendants, how many of them are its start, and its time."""
    began_s = _beginnings[root].at_s if root in _beginnings else time.monotonic()
    elapsed_s = start_s + time.monotonic() - began_s  # a start keeps one core busy
    numbers = {"core_s": round(core_s, 2), "start_s": round(start_s, 2), "elapsed_s": round(elapsed_s, 2)}
    _note(root, {"event": "spent", **identity(), **numbers})


def spent(root: Path) -> list[Spent]:
    """Return what every driver cost, in the order in which they started.

    There are none where a driver of a former version, which recorded no cost, has had a part in the run.
    """
    drivers: list[Spent] = []
    for line in _lines(root):
        if line["event"] == "driver":
            if "local" not in line:
                return []
            drivers.append(Spent(line["at"], None, line["local"], cores=line.get("cores")))
        elif line["event"] == "spent" and drivers:
            known = {name: line[name] for name in ("core_s", "start_s", "elapsed_s") if name in line}
            drivers[-1] = drivers[-1]._replace(**known)
    return drivers


def running_since(root: Path) -> str | None:
    """Return when the latest driver that may still run started, or None where all drivers are known to have ended."""
    began = [line["at"] for line in _started_and_last(root)[0] if _lives(line) is not False]
    return max(began, default=None)


def describe_drivers(root: Path) -> list[str]:
    """Return a sentence for each driver that may still run; where there is none, how the last one ended."""
    started, last = _started_and_last(root)
    open_ones = [(line, _lives(line)) for line in started]
    sentences = [_sentence(line, lives=lives) for line, lives in open_ones if lives is not False]
    if sentences:
        return sentences
    if open_ones and open_ones[-1][0]["at"] > last.get("at", ""):
        return [_sentence(open_ones[-1][0], lives=False)]
    if not last:
        return ["it is not known which process ran it"]
    code, why = last.get("exit_code"), last.get("error", "")
    how = "" if code is None else f" with exit code {code}" + (f" ({why})" if why else "")
    return [f"no process runs it now: process {last['pid']} on {last['host']} ended at {last['at']}{how}"]


def _started_and_last(root: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Return the start lines of drivers without an end line, and the last end line; empty where there is none."""
    started: dict[tuple[Any, ...], dict[str, Any]] = {}
    last: dict[str, Any] = {}
    for line in _lines(root):
        process = (line.get("host"), line.get("pid"), line.get("born"))
        if line["event"] == "driver":
            started[process] = line
        elif line["event"] == "left":
            started.pop(process, None)
            last = line
    return list(started.values()), last


def _lines(root: Path) -> list[dict[str, Any]]:
    """Return the lines of the log; for runs of versions without this log, those of the array jobs."""
    for name in (LOG, JOBS):
        with suppress(FileNotFoundError):
            return parse((root / name).read_bytes())
    return []


def _sentence(line: Mapping[str, Any], *, lives: bool | None) -> str:
    who = f"process {line['pid']} on {line['host']}"
    if lives:
        return f"{who} has been running it since {line['at']}"
    if lives is None:
        return f"{who} started to run it at {line['at']}: whether it still does cannot be determined from here"
    return f"no process runs it now: {who}, started at {line['at']}, left no record of its end, as if it was killed"


def _lives(line: Mapping[str, Any]) -> bool | None:
    """Tell whether the process of a line runs; None where its number means nothing on this machine."""
    process = processes.from_record(line)
    return not processes.has_ended(process) if processes.is_observable(process) else None
