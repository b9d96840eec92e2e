"""``wsiflow status``, from the files of a run alone."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from flows import cli
from wsiflow.run.executor import driver, jobs, waiting
from wsiflow.run.progress import Follower
from wsiflow.system import publish


def said(root: Path, capsys) -> str:
    capsys.readouterr()
    assert cli.main(["status", str(root)]) == 0
    return capsys.readouterr().out


@pytest.fixture
def copied(two_settings: tuple[Path, Path], tmp_path: Path) -> Path:
    """Return the folder of a finished run that a test may change."""
    return Path(shutil.copytree(two_settings[0], tmp_path / "run"))


def test_every_stage_has_a_line(two_settings: tuple[Path, Path], capsys) -> None:
    """Every stage has done and planned tasks, and the last driver its exit code."""
    output = said(two_settings[0], capsys)
    for stage in ("ingest", "index", "certify", "stitch", "detect"):
        assert f"  {stage} 6 of 6\n" in output
    assert "  evaluation 1 of 1\ncomplete\nno process runs it now: process " in output
    assert "with exit code 0" in output


@pytest.mark.parametrize("lost", ["evaluation/summary.json", "report.html", "evaluation"])
def test_a_run_without_its_scores_is_not_complete(copied: Path, capsys, lost: str) -> None:
    """A run without scores is not complete, although every task is done."""
    path = copied / lost
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert "  evaluation 0 of 1\nnot complete: it lacks 1 of evaluation\n" in said(copied, capsys)


def test_missing_files_are_counted_by_stage(copied: Path, capsys) -> None:
    """A deleted receipt and a deleted picture are counted; deleted pixels are not."""
    name = next((copied / "heatmaps").glob("*.tif")).name
    publish.receipt_path(copied, f"heatmaps/{name}").unlink()
    for part in (copied / "receipts/patches").rglob("*.json"):
        part.unlink()
    next((copied / "heatmaps").glob("*.preview.tif")).unlink()
    output = said(copied, capsys)
    assert "  stitch 5 of 6\n" in output
    assert "not complete: it lacks 1 of stitch, 1 of detect\n" in output


def test_before_there_is_a_plan_the_slides_are_counted(copied: Path, capsys) -> None:
    """Before there is a plan, the ingested slides are counted."""
    (copied / "plan.json").unlink()
    (publish.receipt_path(copied, f"tissue/{next((copied / 'tissue').glob('*.json')).stem}.json")).unlink()
    assert said(copied, capsys).startswith("there is no plan yet\ningest 5 of 6\nnot complete: it lacks a plan\n")


def test_what_waits_in_a_queue_is_shown_before_there_is_a_plan(copied: Path, capsys) -> None:
    """The arrays that the driver saw last, with the scheduler's reasons; ``explain`` shows them too, and progress."""
    (copied / "plan.json").unlink()
    queued = waiting.Queued("17", {"Resources": 2, "Priority": 3}, 4, 4000, 60, "logs/17")
    (copied / "arrays").mkdir()
    waiting.write(copied, waiting.View("2026-01-02T03:04:05+00:00", [queued]))
    line = "array job 17: 5 wait (Resources, Priority), 4 run "
    line += "(4,000 MB, 60 min each; logs in logs/17), as of 2026-01-02T03:04:05+00:00"
    assert line in said(copied, capsys)
    assert cli.main(["explain", str(copied), "normal_001"]) == 20
    assert line in capsys.readouterr().out
    snapshot = Follower(copied).snapshot()
    assert snapshot is not None
    assert snapshot.as_text() == "ingest 6 of 6 slides; elements: 5 wait (Resources, Priority), 4 run"


def test_a_folder_of_runs_names_them(two_settings: tuple[Path, Path], tmp_path: Path, capsys) -> None:
    """The folder of a sweep, and a missing folder, are refused by name."""
    for name, run in zip(("fp32", "other"), two_settings, strict=True):
        (tmp_path / name).symlink_to(run)
    assert cli.main(["status", str(tmp_path)]) == 20
    assert "it holds no run itself but 2 in folders: fp32, other; name the out= folder" in capsys.readouterr().err
    assert cli.main(["status", str(tmp_path / "absent")]) == 20
    assert "there is no such folder" in capsys.readouterr().err


def test_running_and_killed_drivers_are_distinguished(tmp_path: Path) -> None:
    """A running, a killed and a failed driver are distinguished."""
    code = "import sys, time; from pathlib import Path; from wsiflow.run.executor import driver\n"
    code += "with driver.recorded(Path(sys.argv[1]), cores=2): print('on', flush=True); time.sleep(600)"
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "on\n"
        assert driver.describe_drivers(tmp_path)[0].startswith(
            f"process {process.pid} on {os.uname().nodename} has been running it since"
        )
    finally:
        process.kill()
        process.communicate()
    assert f"no process runs it now: process {process.pid} on" in driver.describe_drivers(tmp_path)[0]
    assert "left no record of its end" in driver.describe_drivers(tmp_path)[0]
    time.sleep(0.01)  # a later time is noted
    with pytest.raises(ValueError, match="canary"), driver.recorded(tmp_path, cores=2):
        raise ValueError("no answer from http://bob:canary@host/")
    assert "canary" not in (tmp_path / driver.LOG).read_text()
    with pytest.raises(ValueError, match="odd"), driver.recorded(tmp_path, cores=2):
        raise ValueError("odd")
    assert driver.describe_drivers(tmp_path)[0].endswith("with exit code 50 (ValueError: odd)")


def test_a_process_elsewhere_cannot_be_judged(tmp_path: Path) -> None:
    """Process numbers of another host or container say nothing about processes here."""
    (tmp_path / "receipts").mkdir()
    for known in ({"host": "elsewhere"}, {"space": "another"}):
        line = {"event": "driver", "at": "2026-01-01", **jobs.identity(), **known}
        (tmp_path / driver.LOG).write_text(json.dumps(line) + "\n")
        assert "whether it still does cannot be determined from here" in driver.describe_drivers(tmp_path)[0]


def test_the_driver_of_an_earlier_version_is_found(tmp_path: Path) -> None:
    """The driver of an earlier version is found in its log of jobs."""
    log = jobs.JobLog(tmp_path)
    log.append("driver", **jobs.identity(), dialect={})
    assert "has been running it since" in driver.describe_drivers(tmp_path)[0]
    log.append("left", **jobs.identity())
    assert driver.describe_drivers(tmp_path)[0].startswith(f"no process runs it now: process {os.getpid()}")
    (tmp_path / jobs.LOG).unlink()
    assert driver.describe_drivers(tmp_path) == ["it is not known which process ran it"]
