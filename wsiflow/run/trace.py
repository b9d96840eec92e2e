"""Trace every attempt at a task, and compute the timing statistics of Li, Mikailov and Chen from the trace.

The process that drives the run appends each attempt to ``attempts.jsonl`` when it learns of it. ``trace.csv`` is
written from that file, so it contains the attempts of every start of the run. No published result depends on either.
"""

import json
import os
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from wsiflow.run.executor import driver
from wsiflow.run.executor.protocol import Outcome
from wsiflow.system import publish, tables

COLUMNS = (
    "task",
    "stage",
    "slide",
    "group",
    "attempt",
    "native_id",
    "host",
    "pid",
    "submit",
    "start",
    "end",
    "queue_s",
    "wall_s",
    "cpu_user_s",
    "cpu_sys_s",
    "warmup_s",
    "core_s",
    "max_rss_bytes",
    "bytes_read",
    "bytes_written",
    "exit_code",
    "exit_class",
    "error",
)
_CLASSES = {0: "ok", 20: "input", 30: "environment", 40: "integrity", 50: "bug"}
_LOG = "attempts.jsonl"
_END_BYTES = 8_000_000  # more than ten thousand attempts
_lock = threading.Lock()
_before: dict[Path, tuple[str, set[tuple[Any, ...]]]] = {}  # by run: when its driver began, what was noted before


def note(root: Path, stage: str, slide: str, group: int, outcome: Outcome) -> None:
    """Append an attempt to the run's log, unless the task was already done and nothing was executed.

    An outcome that an earlier driver has noted, and that a restarted one reads again where elements wrote it, is not
    noted twice.

    Args:
        root: The run's folder.
        stage: Name of the stage.
        slide: The slide's id; empty for a task that a run does once.
        group: The group or part, counted from 1; 0 for a whole slide.
        outcome: How the attempt ended.
    """
    if not outcome.executed:
        return
    used = outcome.usage or {}
    failure = "" if outcome.failure is None or outcome.retried else str(outcome.failure)
    row = {"stage": stage, "slide": slide, "group": group, "index": outcome.task, **used, "error": failure}
    row["exit_code"], row["driver"] = outcome.exit_code, driver.since(root)
    row["exit_class"] = used.get("exit_class") or _CLASSES.get(outcome.exit_code, "")
    with _lock:
        if outcome.retried and _identity(row) in _noted_before(root):
            return
        publish.append_line(root / _LOG, json.dumps(row))


def _identity(entry: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return what tells an attempt from all others: its task, its process and when it started."""
    return tuple(entry.get(name) for name in ("stage", "slide", "group", "host", "pid", "started"))


def _noted_before(root: Path) -> set[tuple[Any, ...]]:
    """Return the attempts that were noted when this driver first asked; the log is read once."""
    since = driver.since(root)
    if root not in _before or _before[root][0] != since:
        _before[root] = since, {_identity(entry) for entry in _lines(root) if entry.get("started")}
    return _before[root][1]


def _lines(root: Path) -> Iterator[dict[str, Any]]:
    """Yield what `note` wrote, in the log's order."""
    with suppress(FileNotFoundError), (root / _LOG).open(encoding="utf-8") as stream:
        yield from _entries(stream)


def attempts(root: Path) -> list[dict[str, Any]]:
    """Return every logged attempt with the columns of `COLUMNS`, its clock and its driver, in the log's order."""
    rows: list[dict[str, Any]] = []
    seen: set[tuple[Any, ...]] = set()
    counts: dict[tuple[str, str, int], int] = {}
    for entry in _lines(root):
        task, attempt = (entry["stage"], entry["slide"], entry["group"]), _identity(entry)
        if entry.get("started") and attempt in seen:  # restarted drivers of former versions noted it again
            continue
        seen.add(attempt)
        counts[task] = counts.get(task, 0) + 1
        rows.append(_row(entry, counts[task]))
    return rows


class LogReader:
    """Reads what is noted in a run's log, as it grows; of a long log that is there already only the end."""

    def __init__(self, root: Path) -> None:
        """Begin with nothing read."""
        self._path, self._offset = root / _LOG, -1

    def rows(self) -> list[dict[str, Any]]:
        """Return what was noted since the last call, as `note` wrote it."""
        try:
            with self._path.open("rb") as stream:
                size = stream.seek(0, os.SEEK_END)
                self._offset = stream.seek(self._offset if self._offset >= 0 else max(0, size - _END_BYTES))
                data = stream.read()
        except FileNotFoundError:
            return []
        whole = data.rfind(b"\n") + 1
        self._offset += whole
        return list(_entries(data[:whole].decode(errors="replace").splitlines()))


def _entries(stream: Iterable[str]) -> Iterator[dict[str, Any]]:
    """Yield the complete lines of the log as JSON values: a killed process may leave half a line."""
    for line in stream:
        try:
            yield json.loads(line)
        except ValueError:
            continue


def _row(entry: Mapping[str, Any], attempt: int) -> dict[str, Any]:
    submit, start, end = (entry.get(name, "") for name in ("submitted", "started", "ended"))
    used = {name: entry[name] for name in COLUMNS if name in entry}
    task = f"{entry['stage']} {entry['slide']}".strip() + (f" {entry['group']}" if entry["group"] else "")
    times = {"submit": submit, "start": start, "end": end, "queue_s": _between(submit, start)}
    known = {"group": entry["group"] or "", "clock": entry.get("clock") or ["", 0.0], "driver": entry.get("driver", "")}
    return {**used, **times, **known, "task": task, "attempt": attempt}


def _between(first: str, second: str) -> float | str:
    """Return the seconds between two ISO times; empty where one is missing, 0 where clocks of two machines disagree."""
    if not first or not second:
        return ""
    return max(0.0, (datetime.fromisoformat(second) - datetime.fromisoformat(first)).total_seconds())


def write_views(root: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write the rows of `attempts` as ``trace.csv``, and their timing statistics as ``timing.json``."""
    table = [{name: row[name] for name in COLUMNS if name in row} for row in rows]
    publish.write_view(root, "trace.csv", tables.csv_text(table, COLUMNS).encode())
    publish.write_view(root, "timing.json", json.dumps(statistics(rows)._asdict(), indent=1).encode())


class Statistics(NamedTuple):
    """The timing statistics of the reference system, over the attempts that succeeded.

    Attributes:
        cpu_s: User and system CPU seconds of prediction by slide, in rising order.
        group_wall_s: Wall seconds of prediction by slide and group, in rising order.
        extract_wall_s: Wall seconds of extraction and grouping by slide, in falling order.
        cpu_total_s: Sum of ``cpu_s``.
        makespan_s: Seconds from the start of the first attempt to the end of the last one, also where a machine's clock
            was set meanwhile.
    """

    cpu_s: dict[str, float]
    group_wall_s: dict[str, float]
    extract_wall_s: dict[str, float]
    cpu_total_s: float
    makespan_s: float


def statistics(rows: Sequence[Mapping[str, Any]]) -> Statistics:
    """Return the timing statistics of a run.

    Args:
        rows: The attempts, see `attempts`.
    """
    good = [row for row in rows if row["exit_class"] == "ok" and row["start"]]
    cpu: dict[str, float] = {}
    wall: dict[str, float] = {}
    read: dict[str, float] = {}
    for row in good:
        slide = row["slide"]
        if row["stage"] == "predict":
            cpu[slide] = cpu.get(slide, 0.0) + row["cpu_user_s"] + row["cpu_sys_s"]
            wall[f"{slide} t{row['group']}"] = row["wall_s"]
        elif row["stage"] == "extract":
            read[slide] = read.get(slide, 0.0) + row["wall_s"]
    return Statistics(_sorted(cpu), _sorted(wall), _sorted(read, falling=True), sum(cpu.values()), _makespan_s(good))


def _makespan_s(rows: Sequence[Mapping[str, Any]]) -> float:
    """Return the seconds from the first start to the last end, as if no clock had been set meanwhile."""
    first: dict[str, float] = {}
    spans = []
    for row in rows:
        boot, clock_s = row["clock"]
        end_s = datetime.fromisoformat(row["end"]).timestamp() - (clock_s - first.setdefault(boot, clock_s))
        spans.append((end_s - row["wall_s"], end_s))
    return max(end_s for _, end_s in spans) - min(start_s for start_s, _ in spans) if spans else 0.0


def _sorted(seconds: Mapping[str, float], *, falling: bool = False) -> dict[str, float]:
    return dict(sorted(seconds.items(), key=lambda item: -item[1] if falling else item[1]))


def warmup_s(rows: Sequence[Mapping[str, Any]]) -> float:
    """Return the core-seconds of warm-up: starting workers, importing, and loading networks."""
    return sum(float(row.get("warmup_s") or 0.0) for row in rows)


def last_busy_s(rows: Sequence[Mapping[str, Any]], starts: Sequence[str]) -> list[tuple[float, float]]:
    """Return begin and end of the attempts of the last start of a run that executed any, s after the first begin.

    Args:
        rows: The attempts, see `attempts`.
        starts: When each driver of the run started, ISO 8601, in order.
    """
    timed = [row for row in rows if row["start"] and row["end"]]
    latest = max((row["start"] for row in timed), default="")
    since = max((start for start in starts if start <= latest), default="")
    spans = [
        tuple(datetime.fromisoformat(row[name]).timestamp() for name in ("start", "end"))
        for row in timed
        if row["start"] >= since
    ]
    first = min((begin for begin, _ in spans), default=0.0)
    return sorted((round(begin - first, 3), round(end - first, 3)) for begin, end in spans)


def peak_workers(rows: Sequence[Mapping[str, Any]]) -> int:
    """Return the largest number of workers active at once; a worker is active from its first to its last attempt."""
    spans: dict[tuple[str, int], list[str]] = {}
    for row in rows:
        if row["start"] and row["end"]:
            spans.setdefault((row["host"], row["pid"]), []).extend([row["start"], row["end"]])
    moments = sorted([(min(span), 1) for span in spans.values()] + [(max(span), -1) for span in spans.values()])
    most = here = 0
    for _, change in moments:
        here += change
        most = max(most, here)
    return most
