"""The trace: every attempt once, and the timing statistics of the reference."""

import csv
import json
import os
from pathlib import Path

import pytest
from small_runs import attempts, over

from flows import cli as command
from wsiflow.run import trace
from wsiflow.run.executor import driver
from wsiflow.run.executor.protocol import Outcome
from wsiflow.run.stages.work import run_slice
from wsiflow.system.usage import Meter


def used(start: str, end: str, *, pid: int = 1, cpu_s: float = 1.0, **more: object) -> dict:
    stamp = "2026-01-01T00:{}+00:00".format
    wall = int(end[3:]) + 60 * int(end[:2]) - int(start[3:]) - 60 * int(start[:2])
    known = {"submitted": stamp("00:00"), "started": stamp(start), "ended": stamp(end), "host": "n1", "pid": pid}
    return {**known, "wall_s": wall, "cpu_user_s": cpu_s, "cpu_sys_s": 0.5, "max_rss_bytes": 7} | more


def fine(task: int, usage: dict) -> Outcome:
    return Outcome(task, {"attempt": "a"}, executed=True, usage=usage)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder with the attempts of two slides; one task was killed and done again."""
    trace.note(tmp_path, "extract", "b", 1, fine(1, used("00:01", "00:05")))
    trace.note(tmp_path, "extract", "b", 2, fine(2, used("00:02", "00:03", pid=2)))
    trace.note(tmp_path, "extract", "a", 1, fine(0, used("00:05", "00:06")))
    lost = Outcome(0, None, executed=True, usage={"exit_class": "memory", "native_id": "9_0"}, retried=True)
    trace.note(tmp_path, "predict", "a", 1, lost)
    trace.note(tmp_path, "predict", "a", 1, fine(0, used("00:10", "00:40", cpu_s=29.0)))
    trace.note(tmp_path, "predict", "b", 1, fine(1, used("00:10", "00:20", pid=2, cpu_s=9.0)))
    trace.note(tmp_path, "predict", "b", 2, fine(2, used("00:20", "01:20", pid=2, cpu_s=50.0)))
    trace.note(tmp_path, "predict", "b", 2, Outcome(2, {"attempt": "a"}, executed=False, usage=used("02:00", "02:01")))
    return tmp_path


def test_every_attempt_is_a_row_and_found_work_is_none(root: Path) -> None:
    """A lost attempt counts, and the one after it is the second; work that was found done is not an attempt."""
    rows = trace.attempts(root)
    assert len(rows) == 7
    tries = [(row["attempt"], row["exit_class"]) for row in rows if row["task"] == "predict a 1"]
    assert tries == [(1, "memory"), (2, "ok")]
    assert rows[0]["queue_s"] == 1.0


def test_what_is_heard_of_twice_is_one_row(root: Path) -> None:
    """A driver that was started again reads the same attempts again; half a line of a killed one is passed over."""
    before = trace.attempts(root)
    trace.note(root, "predict", "b", 1, fine(1, used("00:10", "00:20", pid=2, cpu_s=9.0)))
    with (root / "attempts.jsonl").open("a") as stream:
        stream.write('{"stage": "pre')
    assert trace.attempts(root) == before


def test_what_an_earlier_driver_noted_is_not_noted_again(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A restarted driver reads again what elements wrote of arrays that are open; what is new of it is noted."""
    monkeypatch.setattr(driver, "since", lambda _root: "2026-01-02")
    noted = (root / "attempts.jsonl").read_text()
    again = fine(2, used("00:20", "01:20", pid=2, cpu_s=50.0))._replace(retried=True)
    trace.note(root, "predict", "b", 2, again)
    assert (root / "attempts.jsonl").read_text() == noted
    trace.note(root, "predict", "b", 3, again._replace(task=3))
    assert len((root / "attempts.jsonl").read_text().splitlines()) == len(noted.splitlines()) + 1


def test_the_three_statistics_of_the_reference(root: Path) -> None:
    """CPU seconds by slide rising with their total, wall seconds by group rising, extraction by slide falling."""
    found = trace.statistics(trace.attempts(root))
    assert list(found.cpu_s.items()) == [("a", 29.5), ("b", 60.0)]
    assert found.cpu_total_s == 89.5
    assert list(found.group_wall_s.items()) == [("b t1", 10), ("a t1", 30), ("b t2", 60)]
    assert list(found.extract_wall_s.items()) == [("b", 5), ("a", 1)]
    assert found.makespan_s == 79.0


def test_a_clock_that_is_set_during_the_run_does_not_change_the_makespan(tmp_path: Path) -> None:
    """It goes back two hours in an attempt of one machine; the clock of the other one stays."""
    for task, (start, end, clock) in enumerate([("20:01", "20:05", 900.0), ("20:05", "00:11", -300.0)]):
        wall_s = 6 if task else 4
        trace.note(
            tmp_path, "extract", "a", task, fine(task, used(start, end) | {"clock": ["x", clock], "wall_s": wall_s})
        )
    trace.note(tmp_path, "extract", "b", 1, fine(2, used("20:02", "20:03", pid=2) | {"clock": ["y", 5.0]}))
    assert trace.statistics(trace.attempts(tmp_path)).makespan_s == 10.0
    assert Meter().usage()["clock"][0]


def test_the_most_workers_at_a_time_are_counted(root: Path) -> None:
    """Two processes overlap."""
    assert trace.peak_workers(trace.attempts(root)) == 2


def test_the_views_hold_the_columns_and_the_statistics(root: Path) -> None:
    """``trace.csv`` in the manner of Nextflow, ``timing.json`` beside it."""
    trace.write_views(root, trace.attempts(root))
    with (root / "trace.csv").open(newline="") as stream:
        reader = csv.DictReader(stream)
        rows = list(reader)
    assert tuple(reader.fieldnames or ()) == trace.COLUMNS
    assert len(rows) == 7
    assert json.loads((root / "timing.json").read_text())["makespan_s"] == 79.0


def test_a_meter_counts_what_the_process_does(tmp_path: Path) -> None:
    """Seconds, CPU and bytes of the work between start and reading."""
    meter = Meter()
    (tmp_path / "file").write_bytes(os.urandom(3_000_000))
    assert len((tmp_path / "file").read_bytes()) == 3_000_000
    total = sum(len(str(i)) for i in range(600_000))
    found = meter.usage()
    assert total > 0
    assert found["bytes_written"] >= 3_000_000
    assert found["bytes_read"] >= 3_000_000
    assert 0 < found["cpu_user_s"] + found["cpu_sys_s"] <= found["wall_s"] + 0.05
    assert found["pid"] == os.getpid()
    assert found["max_rss_bytes"] > 10_000_000


def test_a_slice_tells_what_each_task_used(tmp_path: Path) -> None:
    """Also of tasks that fail."""
    outcomes = list(run_slice(tmp_path / "plan.json", "predict", 3, 5))
    assert [outcome.task for outcome in outcomes] == [3, 4]
    assert all(outcome.exit_code == 20 and outcome.usage["ended"] for outcome in outcomes)


@pytest.mark.parametrize("kind", ["inline", "process"])
def test_a_trace_that_cannot_be_written_ends_the_run(tiny_slides: Path, tmp_path: Path, kind: str, capsys) -> None:
    """One line names the file; no shard waits, and what was published stays and is not done again."""
    (tmp_path / "run").mkdir()
    log = tmp_path / "run/attempts.jsonl"
    log.symlink_to("/dev/full")
    line = over(tiny_slides, tmp_path / "run", f"executor={kind}", "executor.workers=1", "shard_slides=1")
    assert command.main(["run", *line]) == 30
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert f"{log}: the file system refused: No space left on device; free space" in said
    before = attempts(tmp_path / "run")
    assert before
    log.unlink()
    assert command.main(["run", *line, "executor=inline"]) == 0
    assert before.items() <= attempts(tmp_path / "run").items()
