"""Array jobs on a real Slurm and a real Grid Engine: the bytes are the same, and no task is lost or done twice."""

import json
import logging
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from array_runs import (
    Running,
    began,
    call,
    charged,
    events,
    job_of,
    pairs,
    pieces_of,
    queued,
    run,
    settings,
    squares,
    taken,
    wait_for,
    write_source,
)
from array_work import work
from small_runs import COARSE, digests, rows, wsiflow
from wsiflow.flows.__main__ import main

from wsiflow.errors import EnvironmentFault
from wsiflow.run import executor
from wsiflow.run.executor import jobs, lifetime, waiting
from wsiflow.run.executor.array import ArrayJobs
from wsiflow.run.executor.dialect import Dialect, Place, Seen
from wsiflow.run.executor.params import ExecutorParams
from wsiflow.run.executor.protocol import Outcome, Slice
from wsiflow.system import publish

SLURM = ["executor=slurm_array", *(f"executor.array.{it}" for it in ("poll_s=0.5", "grace_s=20", "memory_mb=900"))]
MANY_SLIDES = int(os.environ.get("WSIFLOW_ARRAY_SLIDES", "2"))  # of 6, with 40 groups each
# One slide in many groups, an element each: more than an array may have here.
CUT = [
    "dataset.limit=1",
    "inference.precision=fp32",
    "inference.backend=openvino",
    "tiles=patch",
    "tiles.group_tiles=12",
    "executor.slice_s=0",
    "dense.windows=0",
]


@pytest.fixture(params=["slurm", "sge"])
def scheduler(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a scheduler whose commands are in PATH."""
    return use(request.param, request, monkeypatch)


@pytest.fixture
def slurm_here(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of Slurm, whose commands are in PATH."""
    return use("slurm", request, monkeypatch)


def use(name: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    environment = {**request.getfixturevalue(name), "PYTHONPATH": str(Path(__file__).parents[1])}
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    return name


def test_a_killed_element_is_retried_with_more_memory_and_its_neighbours_are_not_charged(
    scheduler: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Task 3 ends its element with 137: it is retried alone with twice the memory, the tasks behind it as before."""
    source = write_source(tmp_path, exit={"3": 137})
    caplog.set_level(logging.INFO, "wsiflow")
    outcomes = run(
        settings(scheduler, grace_s=1.0 if scheduler == "slurm" else 15.0, idle_s=60),
        source,
        [Slice(0, 2), Slice(2, 6), Slice(6, 8)],
    )
    assert squares(outcomes) == {task: task**2 for task in range(8)}
    (lost,) = (outcome for outcome in outcomes if outcome.retried)
    assert (lost.task, lost.usage["exit_class"]) == (3, "memory")
    assert [(line["elements"], line["memory_mb"]) for line in events(tmp_path, "intent")] == [(3, 200), (1, 400)]
    assert {task for task in range(8) if taken(tmp_path, "predict").count(task) > 1} == {3, 4, 5}
    native = {outcome.task: outcome.usage["native_id"] for outcome in outcomes if outcome.receipt}
    assert native[3] not in {lost.usage["native_id"], native[0], native[4], native[6]}, "alone, with more memory"
    told = [message for message in caplog.messages if message.startswith("submitted  ")]
    logged = [line["job"] for line in events(tmp_path, "job")]
    assert [message.partition(";")[0] for message in told] == [
        f"submitted  array job {logged[0]} for predict: 3 elements of 200 MB and 5 min",
        f"submitted  array job {logged[1]} for predict: 1 element of 400 MB and 5 min",
    ]
    logs = [Path(message.partition("; logs in ")[2]) for message in told]
    assert logs == [tmp_path / "logs" / job for job in logged]
    assert all("-predict-" in str(folder.readlink()) and list(folder.glob("*.log")) for folder in logs)
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert f"element {lost.usage['native_id']} was lost (memory: " in warnings[-1]
    assert " and its work is posted again; its log " in warnings[-1]


def test_the_bill_is_that_of_the_scheduler(scheduler: str, tmp_path: Path) -> None:
    """Elements that start, wait, idle and are killed are charged as the scheduler does, which counts whole seconds."""
    source = write_source(tmp_path, wait=[0, 2, 4], exit={"3": 137})
    given = settings(scheduler, grace_s=1.0 if scheduler == "slurm" else 15.0, idle_s=15)
    running = Running(given, source, pairs(6))
    wait_for(lambda: len(taken(tmp_path, "predict")) >= 4)  # as many elements as the node has cores
    time.sleep(10)  # what they cost has to be more than what whole seconds hide
    (tmp_path / "go").touch()
    running.end()
    wait_for(lambda: queued(scheduler) == "")
    bills = [bill for line in events(tmp_path, "job") for bill in charged(scheduler, line["job"])]
    assert len(bills) == 4
    assert sum(bills) > 20
    assert lifetime.allocated_core_s(lifetime.read(tmp_path)) == pytest.approx(
        sum(bills), rel=0.03, abs=1.2 * len(bills)
    )


def test_arrays_are_cut_under_the_limit_and_the_window(slurm_here: str, tmp_path: Path) -> None:
    """Twelve pieces where arrays have at most five and the queue takes six elements: each is taken once, by these."""
    outcomes = run(settings(slurm_here, window=6, idle_s=60), write_source(tmp_path), pairs(24))
    assert squares(outcomes) == {task: task**2 for task in range(24)}
    assert [line["elements"] for line in events(tmp_path, "intent")] == [5, 1]
    assert taken(tmp_path, "predict") == list(range(24))


def test_shards_share_the_window(slurm_here: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three threads feed one executor: all of it is done, and the queue never holds more than the window."""
    most = []
    ask = jobs.listing

    def listing(dialect: Dialect, names: Iterable[str]) -> dict[Place, Seen] | None:
        found = ask(dialect, names)
        most.append(sum(dialect.is_alive(seen.state) for seen in (found or {}).values()))
        return found

    monkeypatch.setattr(jobs, "listing", listing)
    source = write_source(tmp_path)
    with (
        executor.make(settings(slurm_here, window=4), cores=1, root=tmp_path) as pool,
        ThreadPoolExecutor(3) as threads,
    ):

        def shard(lo: int) -> list[Outcome]:
            return list(pool.run(work, source, "predict", [Slice(task, task + 1) for task in range(lo, lo + 4)]))

        outcomes = [outcome for found in threads.map(shard, (0, 4, 8)) for outcome in found]
    assert squares(outcomes) == {task: task**2 for task in range(12)}
    assert 1 < max(most) <= 4


def test_an_element_that_never_begins_is_given_up_with_its_log(slurm_here: str, tmp_path: Path) -> None:
    """An element whose command fails is retried as often as allowed; the message names job, log and remedy."""
    command = ["/bin/sh", "-c", "echo no such image >&2; exit 3"]
    outcomes = run(settings(slurm_here, command=command, retries=1), write_source(tmp_path), [Slice(0, 2)])
    assert [(outcome.task, outcome.retried, outcome.exit_code) for outcome in outcomes] == [
        (0, False, 30),
        (1, False, 30),
    ]
    assert len(events(tmp_path, "intent")) == 2
    assert "died 2 times" in outcomes[-1].failure.cause
    assert "ExitCode=3:0" in outcomes[-1].failure.cause
    assert "0.log ends with 'no such image')" in outcomes[-1].failure.cause


def test_a_requeued_element_is_not_submitted_again(slurm_here: str, tmp_path: Path) -> None:
    """Slurm restarts the element: its finished tasks are not done again, and nothing is submitted again."""
    running = Running(settings(slurm_here), write_source(tmp_path, wait=[1]), [Slice(0, 3)])
    wait_for(began(tmp_path, 1))
    job = job_of(tmp_path)
    call("scontrol", "requeue", f"{job}_0")
    wait_for(lambda: "PENDING" in call("squeue", "-h", "-o", "%T", "-j", job))
    time.sleep(2)  # Slurm does not launch a job again in the second in which it was stopped
    call("scontrol", "update", f"jobid={job}_0", "starttime=now")  # else two minutes
    outcomes = running.end()
    assert squares(outcomes) == {0: 0, 1: 1, 2: 4}
    assert [(outcome.task, outcome.usage["exit_class"]) for outcome in outcomes if outcome.retried] == [(1, "node")]
    assert len(events(tmp_path, "intent")) == 1


@pytest.mark.parametrize("state", ["Hold", "SpecialExit"])
def test_an_element_that_is_held_is_submitted_again(slurm_here: str, tmp_path: Path, state: str) -> None:
    """An element that Slurm requeues and holds is cancelled, and its tasks are submitted again."""
    running = Running(settings(slurm_here), write_source(tmp_path, wait=[1]), [Slice(0, 3)])
    wait_for(began(tmp_path, 1))
    job = job_of(tmp_path)
    how = ["requeuehold"] if state == "Hold" else ["requeuehold", "state=SpecialExit"]
    call("scontrol", *how, f"{job}_0")
    outcomes = running.end()
    assert squares(outcomes) == {0: 0, 1: 1, 2: 4}
    assert [(outcome.task, outcome.usage["exit_class"]) for outcome in outcomes if outcome.retried] == [(1, "node")]


def test_elements_cancelled_by_hand_are_not_replaced(
    scheduler: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """One that waits and one that works are cancelled: the others do what nobody had begun."""
    running = Running(settings(scheduler, throttle=2), write_source(tmp_path, wait=[0, 2]), pairs(6))
    wait_for(began(tmp_path, 0))
    wait_for(began(tmp_path, 2))
    job, with_work = job_of(tmp_path), {}
    for name, tasks in pieces_of(tmp_path, "predict").items():
        with_work[int(name.partition("/")[0].rpartition(".")[2])] = tasks
    (waits,) = ({0, 1, 2} if scheduler == "slurm" else {1, 2, 3}) - with_work.keys()
    works = next(number for number, tasks in with_work.items() if 0 in tasks)
    if scheduler == "slurm":
        call("scancel", f"{job}_{waits}", f"{job}_{works}")
    else:
        call("qdel", job, "-t", str(waits))
        call("qdel", job, "-t", str(works))
    wait_for(lambda: len(queued(scheduler).splitlines()) < (2 if scheduler == "slurm" else 4))
    (tmp_path / "go").touch()
    outcomes = running.end()
    assert squares(outcomes) == {task: task**2 for task in range(2, 6)}
    failed = [outcome for outcome in outcomes if outcome.receipt is None]
    assert [outcome.task for outcome in failed] == [0, 1]
    assert all("was cancelled" in outcome.failure.cause and "run again" in outcome.failure.remedy for outcome in failed)
    assert len(events(tmp_path, "intent")) == 1
    words = "JobState=CANCELLED" if scheduler == "slurm" else "ended by Grid Engine after "
    assert f"{works} was lost (cancelled: {words}" in caplog.text
    assert scheduler == "sge" or f"{job}_{works} has ended as CANCELLED; what it wrote is awaited" in caplog.text


def test_an_error_in_the_driver_cancels_what_it_taken(slurm_here: str, tmp_path: Path) -> None:
    """A run that is interrupted with Ctrl-C leaves nothing in the queue."""
    source = write_source(tmp_path, wait=[0])

    def interrupted() -> None:
        with executor.make(settings(slurm_here), cores=1, root=tmp_path) as pool:
            next(pool.run(work, source, "predict", pairs(4)))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    wait_for(lambda: queued(slurm_here) == "")


def drive(params: ExecutorParams, root: Path, count: int) -> subprocess.Popen[bytes]:
    code = "import sys, array_work; array_work.drive(*sys.argv[1:])"
    return subprocess.Popen([sys.executable, "-c", code, params.model_dump_json(), str(root), str(count)])


def test_a_driver_watches_the_arrays_of_a_killed_one(scheduler: str, tmp_path: Path) -> None:
    """After SIGKILL the next driver waits for what an element does, which then takes the rest: all once."""
    write_source(tmp_path, wait=[0, 2, 4, 6])
    params = settings(scheduler).model_copy(update={"workers": 1})
    driver = drive(params, tmp_path, 8)
    wait_for(lambda: bool(pieces_of(tmp_path, "predict")))
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    later = drive(params, tmp_path, 8)
    wait_for((tmp_path / f"driver-{later.pid}").exists)
    (tmp_path / "go").touch()
    assert later.wait(250) == 0
    assert json.loads((tmp_path / "ended").read_text()) == list(range(8))
    assert taken(tmp_path, "predict") == list(range(8))
    assert len(events(tmp_path, "intent")) == 1
    assert not jobs.JobLog(tmp_path).read().jobs


def test_a_run_is_cancelled_from_its_folder(scheduler: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """`wsiflow cancel` ends the driver and empties the queue; a run that is started again goes on."""
    write_source(tmp_path, wait=[0])
    driver = drive(settings(scheduler), tmp_path, 8)
    wait_for(began(tmp_path, 0))
    from flows.__main__ import main

    assert main(["cancel", str(tmp_path)]) == 0
    assert driver.wait(60) == -signal.SIGTERM
    said = capfd.readouterr().out
    assert f"process {driver.pid}" in said
    assert "cancelled" in said
    wait_for(lambda: queued(scheduler) == "")
    assert drive(settings(scheduler), tmp_path, 8).wait(250) == 0
    assert json.loads((tmp_path / "ended").read_text()) == list(range(8))


def test_what_others_see_of_a_job_holds_no_secret(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Grid Engine shows the variables of jobs to all users: an element gets those that it needs or that are named."""
    use("sge", request, monkeypatch)
    given = {"STORE_PASSWORD": "canary-1", "WSIFLOW_SWEEP": "canary-2", "LICENSE": "a,b=c d", "CONDA_PREFIX": "/x,/y"}
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    running = Running(
        settings("sge", environment=["LICENSE", "ABSENT"]),
        write_source(tmp_path, wait=[0], environ=given),
        pairs(2),
    )
    wait_for(began(tmp_path, 0))
    shown = [call("qstat", "-j", "*"), call("qstat", "-xml", "-j", "*")]
    (tmp_path / "go").touch()
    outcomes = running.end()
    (native,) = {outcome.usage["native_id"].partition(".")[0] for outcome in outcomes if outcome.usage}
    shown.append(subprocess.run(["qacct", "-j", native], check=False, capture_output=True, text=True).stdout)
    assert all("PATH" in text for text in shown[:2])
    assert "canary" not in "".join(shown)
    seen = {"STORE_PASSWORD": None, "WSIFLOW_SWEEP": None, "LICENSE": "a,b=c d", "CONDA_PREFIX": "/x,/y"}
    assert [outcome.receipt["environ"] for outcome in outcomes if outcome.receipt] == [seen, seen]


def test_a_refusal_is_reported_in_the_words_of_the_scheduler(slurm_here: str, tmp_path: Path) -> None:
    """A partition that does not exist ends the run at once, with the message of Slurm."""
    with pytest.raises(EnvironmentFault, match=r"refused an array of 2: .*partition"):
        run(settings(slurm_here, extra=["--partition=nowhere"]), write_source(tmp_path), pairs(4))


def test_what_waits_is_told_with_the_reason(scheduler: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Elements that somebody holds: `wsiflow status` has them with the reason, and the log names it once."""
    reason = "JobHeldUser" if scheduler == "slurm" else "Job is in hold state"
    running = Running(
        settings(scheduler, extra="--hold" if scheduler == "slurm" else "-h"), write_source(tmp_path), pairs(4)
    )
    wait_for(lambda: reason in waiting.text(tmp_path))
    job = job_of(tmp_path)
    (told,) = waiting.describe(tmp_path)
    assert told.startswith(f"array job {job}: 2 wait ({reason}) (200 MB, 5 min each; logs in logs/{job}), as of 20")
    wait_for(lambda: f"array job {job} waits until somebody acts: {reason}" in caplog.text)
    call(*(["scontrol", "release", job] if scheduler == "slurm" else ["qrls", job]))
    assert squares(running.end()) == {task: task**2 for task in range(4)}
    assert waiting.describe(tmp_path) == []
    assert caplog.text.count("waits until somebody acts") == 1


def test_an_element_in_error_is_given_up_by_its_reason(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Grid Engine keeps what it could not start in error, and knows why as long as it is there; another try is vain."""
    use("sge", request, monkeypatch)
    running = Running(settings("sge", extra="-h", grace_s=4.0), write_source(tmp_path), [Slice(0, 1)])
    job = job_of(tmp_path)
    shutil.rmtree(tmp_path / "logs")
    call("qrls", job)
    (outcome,) = running.end()
    assert outcome.usage["exit_class"] == "start"
    assert f"element {job} could not start: error: can't open output file" in outcome.failure.cause
    assert len(events(tmp_path, "intent")) == 1


def test_a_reason_that_no_waiting_cures_ends_the_work_by_name(slurm_here: str, tmp_path: Path) -> None:
    """A partition for others: the elements are cancelled, and the message has the reason of Slurm."""
    outcomes = run(settings(slurm_here, partition="labs"), write_source(tmp_path), pairs(2))
    assert {outcome.exit_code for outcome in outcomes} == {30}
    assert "Slurm never starts it: Job's account not known, so it can't use this partition" in outcomes[0].failure.cause
    assert len(events(tmp_path, "intent")) == 1
    assert queued(slurm_here) == ""


@pytest.mark.parametrize(
    ("changed", "cause"),
    [
        ({"partition": "short"}, "no job of short may run for 5 min, the limit is 2"),
        ({"extra": "-p short"}, "no job of short may run for 5 min, the limit is 2"),
        ({"memory_mb": 10**8}, r"no node of main has 100,000,000 MB, the largest has "),
    ],
)
def test_what_no_node_can_meet_is_not_submitted(
    slurm_here: str, tmp_path: Path, changed: dict[str, Any], cause: str
) -> None:
    """Slurm would accept the first two, and let them wait for ever."""
    with pytest.raises(EnvironmentFault, match=cause):
        run(settings(slurm_here, **changed), write_source(tmp_path), pairs(2))
    assert not events(tmp_path, "intent")


def test_grid_engine_is_asked_before_it_accepts_what_it_can_never_run(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """More slots than any host has: Grid Engine would accept it and let it wait for ever."""
    use("sge", request, monkeypatch)
    params = settings("sge").model_copy(update={"threads": 999})
    with pytest.raises(EnvironmentFault, match=r'refused an array of 1: .*PE "smp" because it only offers 0 slots'):
        run(params, write_source(tmp_path), pairs(2))


@pytest.mark.parametrize(
    ("changed", "needs", "words"),
    [
        ({"command": ["/nowhere/wsiflow"]}, [], "/nowhere/wsiflow: No such file or directory"),
        ({}, ["absent.svs"], "does not see"),
        ({"scratch": "/nowhere"}, [], "has no scratch folder /nowhere: No such file or directory"),
    ],
)
def test_a_node_that_lacks_something_ends_the_work_by_name(
    slurm_here: str, tmp_path: Path, changed: dict[str, Any], needs: list[str], words: str
) -> None:
    """An element that cannot work there says why, and is not tried again."""
    source = write_source(tmp_path)
    params = settings(slurm_here, **changed)
    paths = [tmp_path / name for name in needs]
    with executor.make(params, cores=1, root=tmp_path, needs=paths) as pool:
        (outcome,) = pool.run(work, source, "predict", [Slice(0, 1)])
    assert outcome.failure is not None
    assert outcome.usage is not None
    assert outcome.usage["exit_class"] == "start"
    assert "could not start: " in outcome.failure.cause
    assert words in outcome.failure.cause
    assert len(events(tmp_path, "intent")) == 1


def test_a_task_that_lacks_memory_is_given_more(slurm_here: str, tmp_path: Path) -> None:
    """Under a limit of address space allocations fail, and no element dies of it; at the limit the bound is named."""
    outcomes = run(settings(slurm_here, memory_limit_mb=400), write_source(tmp_path, starve=[1]), [Slice(0, 3)])
    assert squares(outcomes) == {0: 0, 1: 1, 2: 4}
    assert [(outcome.task, outcome.usage["exit_class"]) for outcome in outcomes if outcome.retried] == [(1, "memory")]
    assert [line["memory_mb"] for line in events(tmp_path, "intent")] == [200, 400]
    (tmp_path / "more").mkdir()
    (outcome,) = run(
        settings(slurm_here, memory_limit_mb=200), write_source(tmp_path / "more", starve=[1]), [Slice(1, 2)]
    )
    assert (outcome.retried, outcome.failure.remedy) == (
        False,
        "raise executor.array.memory_limit_mb, then run again",
    )


def test_an_element_of_slurm_gets_no_secret(slurm_here: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slurm keeps the environment of jobs: it gets those variables that elements need, or that are named."""
    monkeypatch.setenv("STORE_PASSWORD", "canary")
    monkeypatch.setenv("LICENSE", "a b")
    source = write_source(tmp_path, environ=["STORE_PASSWORD", "LICENSE", "ECHO"])
    (outcome,) = run(
        settings(slurm_here, environment=["LICENSE"], prologue="export ECHO=$((1+1))"), source, [Slice(0, 1)]
    )
    assert outcome.receipt["environ"] == {"STORE_PASSWORD": None, "LICENSE": "a b", "ECHO": "2"}


def test_an_array_that_cannot_be_prepared_keeps_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk ends one shard; the others do not wait for the room that its array had reserved."""
    pool = ArrayJobs(settings("slurm", limit=5).array, root=tmp_path, workers=0, threads=1)
    pool._log.append("driver", **jobs.identity())
    write = publish.write_view
    monkeypatch.setattr(publish, "write_view", lambda *them: 1 / 0 if them[1].endswith(".json") else write(*them))
    with pytest.raises(ZeroDivisionError):
        list(pool.run(work, write_source(tmp_path), "predict", pairs(4)))
    assert pool._queue._held == {}


def test_a_scheduler_may_answer_in_any_encoding() -> None:
    """The queue lists names of other users' jobs, whose encoding may be another one."""
    assert jobs.call(["printf", r"1 na\357ve"]).stdout == "1 na\ufffdve"


def test_without_a_scheduler_the_run_says_what_is_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The message names the command that is missing."""
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(EnvironmentFault, match="no command"):
        run(settings("slurm"), write_source(tmp_path), pairs(2))


def line(manifest: Path, out: Path, *more: str) -> list[str]:
    return ["dataset=manifest", f"dataset.manifest={manifest}", f"out={out}", *COARSE, *CUT, *more]


def published(out: Path) -> dict[str, str]:
    """Return the digests of all files except those of array jobs."""
    return {name: digest for name, digest in digests(out).items() if not name.startswith(("arrays", "logs", "jobs"))}


@pytest.fixture(scope="module")
def expected(small_slides: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The published bytes of the run in one process."""
    out = tmp_path_factory.mktemp("inline") / "run"
    assert wsiflow(*line(small_slides, out)) == 0
    return published(out)


def test_the_line_killed_in_the_middle_publishes_the_same_bytes(
    slurm_here: str, small_slides: Path, expected: dict[str, str], tmp_path: Path
) -> None:
    """With every stage in arrays of Slurm, and a driver that is killed and started again, the bytes are the same."""
    out = tmp_path / "run"
    command = [sys.executable, "-m", "wsiflow.flows", "run", *line(small_slides, out, *SLURM)]
    driver = subprocess.Popen(command)
    wait_for(lambda: len(pieces_of(out, "predict")) > 2)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    assert subprocess.run(command, check=False).returncode == 0
    assert published(out) == expected
    predicted = taken(out, "predict")
    assert predicted == list(range(len(predicted))), "every group was taken once"
    traced = {row["task"]: row["native_id"] for row in rows(out / "trace.csv")}
    assert len([task for task in traced if task.startswith("predict ")]) == len(predicted), "all are heard of"
    assert len(set(traced.values())) < len(traced) / 2, "elements do one task after another"
    logs = "".join(path.read_text() for path in (out / "logs").rglob("*.log"))
    assert " predict task 0: predictions/" in logs


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_hundreds_of_slices_survive_the_loss_of_elements_and_of_the_driver(
    scheduler: str, small_slides: Path, tmp_path: Path
) -> None:
    """Forty groups a slide, an element killed while it works, then the driver: the bytes are those of one process."""
    many = [f"dataset.limit={MANY_SLIDES}", "tiles.group_tiles=2", "dense.windows=20"]
    assert wsiflow(*line(small_slides, tmp_path / "inline", *many)) == 0
    out = tmp_path / "run"
    array = [f"executor={scheduler}_array", *SLURM[1:], "executor.workers=4"]
    command = [sys.executable, "-m", "wsiflow.flows", "run", *line(small_slides, out, *many, *array)]
    driver = subprocess.Popen(command)
    wait_for(lambda: len(pieces_of(out, "predict")) > 10)
    written = max((out / "arrays").glob("*/*.jsonl"), key=lambda path: path.stat().st_mtime)
    os.kill(json.loads(written.read_text().splitlines()[0])["pid"], signal.SIGKILL)
    wait_for(lambda: len(pieces_of(out, "predict")) > 30)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    assert subprocess.run(command, check=False).returncode == 0
    assert published(out) == published(tmp_path / "inline")
    predicted = taken(out, "predict")
    assert len(set(predicted)) > 25 * MANY_SLIDES
    assert len(predicted) <= len(set(predicted)) + 1, "only what the killed element did was done again"
    assert sum(found["elements"] for found in events(out, "intent")) < 30, "starts"


def test_the_doctor_sends_a_real_element(slurm_here: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A task goes through the queue and says where it was done; a queue that is not there is a fault."""
    words = ["doctor", "--cluster", f"executor={slurm_here}_array", f"out={tmp_path}/run", "executor.array.poll_s=0.2"]
    assert main(words) == 0
    found = rf"^cluster    ok    a task of executor.kind=array ran on {socket.gethostname()}, \d+ cores"
    assert re.search(found, capfd.readouterr().out, re.MULTILINE)
    assert list(tmp_path.iterdir()) == []
    assert main([*words, "executor.array.partition=nowhere"]) == 30
    assert re.search(r"^cluster    FAULT .*nowhere", capfd.readouterr().out, re.MULTILINE)
