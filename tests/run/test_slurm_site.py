"""Array jobs at a site: a real Slurm of several nodes that keeps accounts, whose jobs are preempted and nodes fail."""

import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from array_runs import (
    Running,
    began,
    call,
    events,
    job_of,
    pairs,
    pieces_of,
    settings,
    squares,
    wait_for,
    write_source,
)
from small_runs import wsiflow
from test_arrays import SLURM, line, published

from wsiflow.run.executor import jobs, lifetime

HERE = socket.gethostname().partition(".")[0]


@pytest.fixture(autouse=True)
def site(slurm_site: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the commands of Slurm talk to the site."""
    for name, value in {**slurm_site, "PYTHONPATH": str(Path(__file__).parents[1])}.items():
        monkeypatch.setenv(name, value)


def charged(root: Path) -> list[int]:
    """Return the core-seconds that Slurm's accounts have of each start of an element of a run."""
    ids = ",".join(line["job"] for line in events(root, "job"))
    wait_for(lambda: not call("squeue", "--noheader", "--jobs", ids))
    about = ["--noheader", "--allocations", "--duplicates", "--parsable2", "--format=State,CPUTimeRAW"]
    wait_for(lambda: "RUNNING" not in call("sacct", *about, f"--jobs={ids}"))
    return [int(line.split("|")[1]) for line in call("sacct", *about, f"--jobs={ids}").splitlines()]


def restart_now(job: str, count: int) -> None:
    """Have requeued elements start at once, else after two minutes."""
    wait_for(lambda: len(call("squeue", "-h", "-r", "-t", "PENDING", "-j", job).splitlines()) == count)
    time.sleep(2)  # Slurm does not launch a job again in the second in which it was stopped
    for element in call("squeue", "-h", "-r", "-t", "PENDING", "-j", job, "-o", "%i").split():
        call("scontrol", "update", f"jobid={element}", "starttime=now")


def is_up(node: str) -> bool:
    """Tell whether a node that was down is up again, which this asks for."""
    subprocess.run(["scontrol", "update", f"nodename={node}", "state=resume"], check=False, capture_output=True)
    return f"{node} idle\n" in call("sinfo", "-h", "-N", "-p", "main", "-o", "%N %T")


def preempt(count: int) -> str:
    """Submit urgent jobs, one for each core of the two nodes, and return their id."""
    options = ["--parsable", "--partition=urgent", f"--array=1-{count}", "--mem=50", "--time=1", "--output=/dev/null"]
    return call("sbatch", *options, "--wrap=sleep 1").strip()


def test_the_bill_is_that_of_the_accounts(tmp_path: Path) -> None:
    """Elements that are killed, cancelled or dead before Python starts are charged too, each to the second."""
    dies = f'[ "$SLURM_ARRAY_TASK_ID" = 3 ] && mkdir {tmp_path}/died && sleep 6 && exit 9'
    source = write_source(tmp_path, wait=[0, 2, 4, 8], exit={"5": 137})
    running = Running(settings("slurm", prologue=[dies, ":"], grace_s=2, idle_s=3), source, pairs(10))
    for task in (0, 2, 4, 8):
        wait_for(began(tmp_path, task))
    job = job_of(tmp_path)
    time.sleep(8)  # what they cost has to be more than what whole seconds hide
    call("scancel", f"{job}_0")
    (tmp_path / "go").touch()
    outcomes = running.end()
    assert len(squares(outcomes)) == 8, "all but those of the element that was cancelled"
    bills = charged(tmp_path)
    assert sum(bills) > 40
    lives = lifetime.read(tmp_path)
    assert {life.cores for life in lives} == {1}
    assert lifetime.allocated_core_s(lives) == pytest.approx(sum(bills), rel=0.03, abs=0.6 * len(bills))
    (dead,) = (life for life in lives if re.fullmatch(r".*\.3", life.job))
    assert dead.charged
    assert dead.lived_s == pytest.approx(6, abs=3)


def test_elements_that_are_stopped_go_on_when_slurm_starts_them_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """One node fails, then jobs on the other are preempted: it is said, nothing is submitted again or done twice."""
    source = write_source(tmp_path, wait=[1, 3, 5, 7])
    running = Running(settings("slurm", partition="spare", retries=0, idle_s=60), source, pairs(8))
    for task in (1, 3, 5, 7):
        wait_for(began(tmp_path, task))
    job = job_of(tmp_path)
    call("scontrol", "update", f"nodename={HERE}-2", "state=down", "reason=test")
    wait_for(lambda: caplog.text.count("was stopped by its scheduler and waits to be started again") == 2)
    wait_for(lambda: is_up(f"{HERE}-2"))
    urgent = preempt(4)
    wait_for(lambda: caplog.text.count("was preempted by other jobs and waits to be started again") == 2)
    wait_for(lambda: not call("squeue", "-h", "-j", urgent))
    restart_now(job, 4)
    (tmp_path / "go").touch()
    outcomes = running.end()
    assert squares(outcomes) == {task: task**2 for task in range(8)}
    lost = [(outcome.usage or {})["exit_class"] for outcome in outcomes if outcome.retried]
    assert sorted(lost) == ["node", "node", "preempted", "preempted"]
    assert len(events(tmp_path, "intent")) == 1
    bills = charged(tmp_path)
    assert lifetime.allocated_core_s(lifetime.read(tmp_path)) == pytest.approx(sum(bills), rel=0.03, abs=0.6 * 8)


def test_elements_that_are_preempted_for_good_are_replaced(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """They get what they had, however often it happens: it is no failure of the task, nor of its memory or time."""
    source = write_source(tmp_path, wait=[1, 3, 5, 7])
    running = Running(settings("slurm", partition="spot", retries=0, idle_s=60), source, pairs(8))
    for task in (1, 3, 5, 7):
        wait_for(began(tmp_path, task))
    preempt(4)
    outcomes = running.end()
    assert squares(outcomes) == {task: task**2 for task in range(8)}
    lost = [outcome for outcome in outcomes if outcome.retried]
    assert [(outcome.usage or {})["exit_class"] for outcome in lost] == ["preempted"] * 4
    assert "died of preemption by other jobs: JobState=PREEMPTED" in (lost[0].failure or "").cause
    assert {(line["memory_mb"], line["minutes"]) for line in events(tmp_path, "intent")} == {(200, 5)}
    assert caplog.text.count("was lost (preempted: JobState=PREEMPTED") == 4
    assert not jobs.JobLog(tmp_path).read().jobs


@pytest.mark.slow
@pytest.mark.skipif("WSIFLOW_ARRAY_SLIDES" not in os.environ, reason="two minutes: make test-full")
def test_a_preempted_run_publishes_the_same_bytes(small_slides: Path, tmp_path: Path) -> None:
    """The whole line, whose elements are cancelled for other jobs while they predict."""
    assert wsiflow(*line(small_slides, tmp_path / "inline")) == 0
    out = tmp_path / "run"
    more = [*SLURM, "executor.array.partition=spot", "executor.array.retries=0"]
    driver = subprocess.Popen([sys.executable, "-m", "wsiflow.flows", "run", *line(small_slides, out, *more)])
    wait_for(lambda: len(pieces_of(out, "predict")) > 2)
    preempt(4)
    assert driver.wait(500) == 0
    assert published(out) == published(tmp_path / "inline")
    assert '"exit_class": "preempted"' in (out / "attempts.jsonl").read_text()
