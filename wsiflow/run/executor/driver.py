"""Who runs the line of a folder, whatever runs its tasks: a line as a process starts, and one as it ends.

A process that was killed leaves no second line; whether it lives is asked of the kernel, as far as that can be seen
from here: a process on another machine or in another container cannot be.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from wsiflow.errors import WsiflowError
from wsiflow.redaction import without_secrets
from wsiflow.run.executor.jobs import LOG as JOBS
from wsiflow.run.executor.jobs import identity, parse
from wsiflow.system import processes, publish
from wsiflow.system.usage import now

LOG = f"{publish.RECEIPTS}/drivers.jsonl"


@contextmanager
def noted(root: Path) -> Iterator[dict[str, Any]]:
    """Note that this process runs the line during the body, which may say its exit code in what it is given."""
    who = identity()
    ended: dict[str, Any] = {"exit_code": WsiflowError.exit_code}
    _note(root, {"event": "driver", **who})
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
    with suppress(OSError):  # whoever publishes there next tells what is wrong with the disk
        path.parent.mkdir(parents=True, exist_ok=True)
        publish.append_line(path, json.dumps({"at": now(), **line}), sync=True)


def running_since(root: Path) -> str | None:
    """Return when the last of the processes that may run the line now began; None where all are known to have ended."""
    began = [line["at"] for line in _started_and_last(root)[0] if _lives(line) is not False]
    return max(began, default=None)


def describe_drivers(root: Path) -> list[str]:
    """Say which processes run the line now, or when the last one ended."""
    started, last = _started_and_last(root)
    open_ones = [(line, _lives(line)) for line in started]
    said = [_sentence(line, lives=lives) for line, lives in open_ones if lives is not False]
    if said:
        return said
    if open_ones and open_ones[-1][0]["at"] > last.get("at", ""):
        return [_sentence(open_ones[-1][0], lives=False)]
    if not last:
        return ["it is not known who ran it"]
    code, why = last.get("exit_code"), last.get("error", "")
    how = "" if code is None else f" with exit code {code}" + (f" ({why})" if why else "")
    return [f"nobody runs it now: process {last['pid']} on {last['host']} ended at {last['at']}{how}"]


def _started_and_last(root: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Return what processes noted that left no word of their end, and the last word of an end; empty where none is."""
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
    """Return what is noted here; of runs that noted nothing, what their array jobs did."""
    for name in (LOG, JOBS):
        with suppress(FileNotFoundError):
            return parse((root / name).read_bytes())
    return []


def _sentence(line: Mapping[str, Any], *, lives: bool | None) -> str:
    who = f"process {line['pid']} on {line['host']}"
    if lives:
        return f"{who} runs it now, since {line['at']}"
    if lives is None:
        return f"{who} has run it since {line['at']}: whether it still does cannot be told from here"
    return f"nobody runs it now: {who}, started at {line['at']}, is gone without a word, as if it was killed"


def _lives(line: Mapping[str, Any]) -> bool | None:
    """Tell whether a process runs; None where its number means nothing here."""
    process = processes.from_record(line)
    return not processes.has_ended(process) if processes.is_observable(process) else None
