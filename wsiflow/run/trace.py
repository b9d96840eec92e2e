"""The trace: a row for every attempt at a task, and the timing statistics of Li, Mikailov and Chen from it.

The process that runs the line appends each attempt to ``attempts.jsonl`` as it hears of it; ``trace.csv`` is made of
that file, so it holds the attempts of every start of the run. Nothing that is published depends on either.
"""

import json
import os
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

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


def note(root: Path, stage: str, slide: str, group: int, outcome: Outcome) -> None:
    """Append an attempt to the run's log; work that was found done is none.

    Args:
        root: The run's folder.
        stage: The stage.
        slide: The slide's id, empty for what is done once for a run.
        group: The group or part, counted from 1; 0 for a whole slide.
        outcome: How the attempt ended.
    """
    if not outcome.executed:
        return
    used = outcome.usage or {}
    failure = "" if outcome.receipt is not None or outcome.retried else outcome.error
    row = {"stage": stage, "slide": slide, "group": group, "index": outcome.task, **used, "error": failure}
    row["exit_code"] = outcome.exit_code
    row["exit_class"] = used.get("exit_class") or _CLASSES.get(outcome.exit_code, "")
    with _lock:
        publish.append_line(root / _LOG, json.dumps(row))


def attempts(root: Path) -> list[dict[str, Any]]:
    """Return every attempt that was noted, with the columns of `COLUMNS`, in the order they were heard of."""
    path = root / _LOG
    if not path.exists():
        return []
    rows: list[dict[str, Any]] = []
    seen: set[tuple[Any, ...]] = set()
    counts: dict[tuple[str, str, int], int] = {}
    with path.open(encoding="utf-8") as stream:
        for found in _lines(stream):
            task = (found["stage"], found["slide"], found["group"])
            attempt = (*task, found.get("host"), found.get("pid"), found.get("started"))
            if found.get("started") and attempt in seen:  # a driver that was started again hears of it again
                continue
            seen.add(attempt)
            counts[task] = counts.get(task, 0) + 1
            rows.append(_row(found, counts[task]))
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
        return list(_lines(data[:whole].decode(errors="replace").splitlines()))


def _lines(stream: Iterable[str]) -> Iterator[dict[str, Any]]:
    """Yield the whole lines of the log: a process that is killed leaves half a line."""
    for line in stream:
        try:
            yield json.loads(line)
        except ValueError:
            continue


def _row(found: Mapping[str, Any], attempt: int) -> dict[str, Any]:
    submit, start, end = (found.get(name, "") for name in ("submitted", "started", "ended"))
    used = {name: found[name] for name in COLUMNS if name in found}
    task = f"{found['stage']} {found['slide']}".strip() + (f" {found['group']}" if found["group"] else "")
    times = {"submit": submit, "start": start, "end": end, "queue_s": _between(submit, start)}
    return {**used, **times, "task": task, "group": found["group"] or "", "attempt": attempt}


def _between(first: str, second: str) -> float | str:
    """Return the seconds from one moment to another; clocks of two machines may make it negative, which is 0."""
    if not first or not second:
        return ""
    return max(0.0, (datetime.fromisoformat(second) - datetime.fromisoformat(first)).total_seconds())


def write_views(root: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write ``trace.csv``, and the timing statistics as ``timing.json``, of what `attempts` returns."""
    publish.write_view(root, "trace.csv", tables.csv_text(rows, COLUMNS).encode())
    publish.write_view(root, "timing.json", json.dumps(statistics(rows)._asdict(), indent=1).encode())


class Statistics(NamedTuple):
    """The three timing statistics of the reference, of attempts that published something.

    Attributes:
        cpu_s: User and system seconds of prediction by slide, rising; their sum is the grand total.
        group_wall_s: Wall seconds of prediction by slide and group, rising.
        extract_wall_s: Wall seconds of extraction and grouping by slide, falling.
        cpu_total_s: Sum of ``cpu_s``.
        makespan_s: From the first start to the end of the last attempt.
    """

    cpu_s: dict[str, float]
    group_wall_s: dict[str, float]
    extract_wall_s: dict[str, float]
    cpu_total_s: float
    makespan_s: float


def statistics(rows: Sequence[Mapping[str, Any]]) -> Statistics:
    """Return the timing statistics of a run.

    Args:
        rows: What `attempts` returns.
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
    moments = [datetime.fromisoformat(row[name]) for row in good for name in ("start", "end")]
    makespan_s = (max(moments) - min(moments)).total_seconds() if moments else 0.0
    return Statistics(_sorted(cpu), _sorted(wall), _sorted(read, falling=True), sum(cpu.values()), makespan_s)


def _sorted(found: Mapping[str, float], *, falling: bool = False) -> dict[str, float]:
    return dict(sorted(found.items(), key=lambda item: -item[1] if falling else item[1]))


def warmup_s(rows: Sequence[Mapping[str, Any]]) -> float:
    """Return the core-seconds that workers took to get ready: to start, to import, to load networks."""
    return sum(float(row.get("warmup_s") or 0.0) for row in rows)


def peak_workers(rows: Sequence[Mapping[str, Any]]) -> int:
    """Return the most processes that had work at a time: hosts and process ids whose spans of work overlap."""
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
