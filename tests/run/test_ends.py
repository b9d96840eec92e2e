"""Why elements of array jobs ended, in the words of recorded schedulers, and what is requested and advised then."""

import json
import math
import os
import signal
import time
from functools import cache
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from wsiflow.errors import EnvironmentFault
from wsiflow.run.executor import bounds, element, ends, jobs, lifetime, submission
from wsiflow.run.executor.bounds import Bounds
from wsiflow.run.executor.dialect import ArrayParams, Charge, Given, Seen
from wsiflow.run.executor.ends import End, Requests, Told
from wsiflow.run.executor.lifetime import Life
from wsiflow.run.executor.params import ExecutorParams
from wsiflow.run.executor.pieces import Request, Tries
from wsiflow.system import faults

CONF = Path(__file__).parents[2] / "conf/executor"
GIVEN = Given(4000, 3600.0)
REQUEST = Request(4000, 60)


@cache
def shipped(name: str) -> ArrayParams:
    """Return the shipped settings of a scheduler."""
    array = ExecutorParams.model_validate(yaml.safe_load((CONF / f"{name}_array.yaml").read_text())).array
    assert array is not None
    return array


def params(name: str, **changed: object) -> ArrayParams:
    """Return the shipped settings of a scheduler with some changes."""
    return shipped(name).model_copy(update=changed)


def qacct(failed: str, exit_status: int, maxvmem: str, wallclock: str = "12s") -> str:
    return (
        f"taskid       1\nfailed       {failed}\nexit_status  {exit_status}                  (Killed)\n"
        f"ru_wallclock {wallclock}\nmaxvmem      {maxvmem}\n"
    )


@pytest.mark.parametrize(
    ("name", "report", "reason", "cause"),
    [
        ("slurm", "JobState=FAILED Reason=NonZeroExitCode ExitCode=127:0", "", "start"),
        ("slurm", "JobState=FAILED Reason=NonZeroExitCode ExitCode=126:0", "", "start"),
        ("slurm", "JobState=FAILED Reason=RaisedSignal:53(Real-time_signal_19) ExitCode=0:53", "", "start"),
        ("slurm", "JobState=FAILED Reason=BadConstraints ExitCode=0:0", "BadConstraints", "start"),
        ("slurm", "JobState=PREEMPTED Reason=Preempted ExitCode=0:9", "", "preempted"),
        ("slurm", "JobState=NODE_FAIL Reason=NodeDown ExitCode=0:9", "", "node"),
        ("slurm", "JobState=TIMEOUT Reason=TimeLimit ExitCode=0:9", "", "time"),
        ("slurm", "JobState=FAILED Reason=NonZeroExitCode ExitCode=0:9", "", "memory"),
        ("slurm", "JobState=DEADLINE Reason=DeadLine ExitCode=0:1", "", "cancelled"),
        ("sge", qacct("100 : assumedly after job", 137, "3.9G"), "", "memory"),
        ("sge", qacct("100 : assumedly after job", 137, "310.5M"), "", "killed"),
        ("sge", qacct("37  : qmaster enforced h_rt, h_cpu, or h_vmem limit", 137, "1.0G", "3590s"), "", "time"),
        ("sge", qacct("37  : qmaster enforced h_rt, h_cpu, or h_vmem limit", 137, "4.1G", "90s"), "", "memory"),
        ("sge", qacct("37  : qmaster enforced h_rt, h_cpu, or h_vmem limit", 137, "1.0G", "90s"), "", "killed"),
        ("sge", qacct("0", 140, "1.0G"), "", "cancelled"),
        ("sge", qacct("0", 127, "0.000B"), "", "start"),
        ("pbs", "    Exit_status = 127", "", "start"),
        ("lsf", "Exited with exit code 126. The CPU time used is 0.1 seconds.", "", "start"),
    ],
)
def test_causes(name: str, report: str, reason: str, cause: str) -> None:
    """What another try does not change is a cause of its own; memory and time need use near to what was requested."""
    assert params(name).dialect.cause("RUNNING", report, began=True, reason=reason, given=GIVEN) == cause


QSTAT_J = """\
job_number:                 11
script_file:                sleep
error reason          1:      11/28/2026 00:03:00 [0:5159]: error: can't chdir to /gone: No such file or directory
scheduling info:            Job is in error state
"""
WAITS = """\
job_number:                 9
scheduling info:            queue instance "all.q@vm" dropped because it is full
                            (-l mem_free=100000G) cannot run at host "vm" because it offers only hl:mem_free=22.060G
"""
OFF = "scheduling info:            (Collecting of scheduler job information is turned off)\n"


def test_grid_engine_tells_why_jobs_wait_and_why_they_are_in_error() -> None:
    """The error reason and the scheduling info of ``qstat -j``, also where the latter is switched off."""
    dialect = params("sge").dialect
    assert dialect.explained(QSTAT_J) == (
        "error: can't chdir to /gone: No such file or directory; Job is in error state"
    )
    assert dialect.explained(WAITS) == (
        'queue instance "all.q@vm" dropped because it is full; '
        '(-l mem_free=100000G) cannot run at host "vm" because it offers only hl:mem_free=22.060G'
    )
    others = 'queue instance "b.q@vm" dropped because it is full\ncannot run in queue "c.q" because it is not contained'
    asked = ['queue instance "a.q@vm" dropped because it is disabled', "cannot run because it exceeds limit"]
    text = "scheduling info:            " + "\n                            ".join([*others.split("\n"), *asked])
    for partition in ("a.q", "a.q@@fast,d.q", "a*"):
        assert dialect.explained(text, partition) == "; ".join(asked), "nothing of queues that were not asked for"
    assert dialect.explained(text).count(";") == 3
    refused = submission.refusal(
        jobs.Answer([], 1, "", f"Job 1 {others}\nJob 1 exceeds limit"), params("sge", partition="a.q")
    )
    assert refused == "Job 1 exceeds limit"
    assert dialect.explained(OFF) == "(Collecting of scheduler job information is turned off)"
    assert dialect.cause("Eqw", "", began=False, reason=dialect.explained(QSTAT_J)) == "start"
    assert dialect.cause("Eqw", "", began=False, reason="") == "node"


def test_grid_engine_tells_what_it_can_never_run() -> None:
    """A load value, which it takes for unknown while it tests, is no reason."""
    dialect = params("sge").dialect
    slots = 'Job 15 cannot run in PE "smp" because it only offers 0 slots'
    assert dialect.never_runs(f"{slots}\nverification: no suitable queues\n") == slots
    load = 'Job 14 (-l mem_free=1G) cannot run in queue "all.q@vm" because job requests unknown resource (mem_free)'
    assert dialect.never_runs(f"{load}\nverification: no suitable queues\n") == ""
    assert dialect.never_runs("verification: found suitable queue(s)\n") == ""
    assert params("slurm").dialect.never_runs(slots) == ""


PENDS = """\
JOBID   USER    STAT  QUEUE      FROM_HOST   EXEC_HOST   JOB_NAME   SUBMIT_TIME
7678    user1   PEND  priority   hostD                   a[1]       Oct 28 13:08
 Queue's resource requirements not satisfied:3 hosts;
 Unable to reach slave lsbatch server: 1 host;
"""


def test_pbs_and_lsf_tell_why_jobs_wait() -> None:
    """The comment of PBS and the pending reasons of LSF, as they are documented."""
    comment = "    Job_Name = a\n    comment = Not Running: Insufficient amount of resource: ncpus\n"
    assert params("pbs").dialect.explained(comment) == "Not Running: Insufficient amount of resource: ncpus"
    assert not params("pbs").dialect.is_hopeless("Not Running: Insufficient amount of resource: ncpus")
    assert params("pbs").dialect.is_hopeless("Can Never Run: Insufficient amount of resource: ncpus (R: 99 A: 8 T: 8)")
    assert params("lsf").dialect.explained(PENDS) == (
        "Queue's resource requirements not satisfied:3 hosts; Unable to reach slave lsbatch server: 1 host"
    )


@pytest.mark.parametrize(
    ("reason", "hopeless", "held"),
    [
        ("PartitionTimeLimit", True, False),
        ("PartitionConfig", True, False),
        ("BadConstraints", True, False),
        ("Job's account not known, so it can't use this partition (closed allows lab)", True, False),
        ("AccountNotAllowed", True, False),
        ("Job's QOS not permitted to use this partition (long allows special not normal)", True, False),
        ("InvalidQOS", True, False),
        ("QOSMaxWallDurationPerJobLimit", True, False),
        ("AssocMaxMemPerJob", True, False),
        ("AssocGrpCpuLimit", False, True),
        ("QOSGrpMemLimit", False, True),
        ("JobHeldUser", False, True),
        ("ReqNodeNotAvail, UnavailableNodes:vm", False, True),
        ("Resources", False, False),
        ("Priority", False, False),
        ("QOSMaxJobsPerUserLimit", False, False),
        ("JobArrayTaskLimit", False, False),
        ("BeginTime", False, False),
    ],
)
def test_reasons_of_slurm(reason: str, hopeless: bool, held: bool) -> None:
    """Some reasons no waiting cures, some somebody has to lift, and all others pass."""
    dialect = params("slurm").dialect
    assert (dialect.is_hopeless(reason), dialect.is_held(reason)) == (hopeless, held)


def requests(limits: Bounds, **changed: object) -> Requests:
    made = Requests(params("slurm", **changed))
    made.bounds = limits
    return made


@given(
    st.integers(1, 64_000),
    st.integers(1, 64_000),
    st.one_of(st.just(math.inf), st.integers(64_000, 128_000)),
    st.sampled_from(["memory", "time"]),
)
def test_no_request_is_sent_twice_unchanged(first: int, limit: int, node: float, cause: str) -> None:
    """After a lack of memory or time more is requested, until the bound was requested, and then no more."""
    changed = {"memory_mb": first, "minutes": first, "memory_limit_mb": limit, "minutes_limit": limit}
    asked = requests(Bounds(memory_mb=node, minutes=node), **changed)
    tries: Tries | None = Tries()
    given: list[int] = []
    while tries is not None:
        had = asked.of(tries)
        given.append(had.memory_mb if cause == "memory" else had.minutes)
        tries = asked.after(tries, cause, had)
    assert given == sorted(set(given))
    assert (given[0], given[-1]) == (first, max(first, min(limit, node)))


def test_an_element_with_more_than_was_requested_counts() -> None:
    """A piece that died in an element with more than it needed gets more than that element had."""
    asked = requests(Bounds())
    tries = asked.after(Tries(), "memory", Request(16000, 60))
    assert tries is not None
    assert asked.of(tries) == Request(32000, 60)


def test_preemption_costs_no_try() -> None:
    """However often it happens, the same is requested again; a node that fails is one of the tries."""
    asked = requests(Bounds(), retries=0)
    assert asked.after(Tries(3, 1, 1), "preempted", REQUEST) == Tries(3, 1, 1)
    assert asked.after(Tries(), "node", REQUEST) is None


@pytest.mark.parametrize(
    ("name", "said", "why"),
    [
        ("slurm", "PREEMPTED\n", "preempted"),
        ("slurm", "PREEMPTED\nNODE_FAIL\n", "node"),
        ("slurm", "", "node"),
        ("sge", "PREEMPTED\n", "node"),
    ],
)
def test_why_an_element_was_requeued_is_that_of_its_last_start(
    monkeypatch: pytest.MonkeyPatch, name: str, said: str, why: str
) -> None:
    """Where accounts tell it; without them it is the node."""
    monkeypatch.setattr(jobs, "call", lambda command: jobs.Answer(command, 0 if said else 1, said, ""))
    assert ends.why_requeued(params(name), {"job": "9", "index": 3}) == why


@pytest.mark.parametrize(
    ("cause", "limits", "changed", "remedy"),
    [
        ("memory", Bounds(), {}, "raise executor.array.memory_limit_mb, then run again"),
        ("memory", Bounds(), {"memory_mb": 64000}, "raise executor.array.memory_mb, then run again"),
        ("memory", Bounds(16000, where="of main"), {}, "no node of main has more than 16,000 MB: name another"),
        ("time", Bounds(), {}, "raise executor.array.minutes_limit, then run again"),
        (
            "time",
            Bounds(minutes=120, where="of short"),
            {},
            "no job of short may run longer than 120 min: name another",
        ),
        (
            "killed",
            Bounds(),
            {"retries": 1},
            "find the reason in the log, then run again (executor.array.retries is 1)",
        ),
        ("start", Bounds(), {}, "correct what it names, or name other nodes (executor.array.partition"),
        ("cancelled", Bounds(), {}, "run again to do it"),
    ],
)
def test_the_remedy_names_the_bound_that_was_met(
    cause: str, limits: Bounds, changed: dict[str, object], remedy: str
) -> None:
    """It is that of the settings or that of the scheduler, whichever is lower."""
    assert requests(limits, **changed).remedy(cause).startswith(remedy)


def test_bounds_are_those_of_the_partition(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the one that is named in the key, in ``extra`` or by sbatch's variable, else of the default one."""
    sinfo = "short|2:00:00|8|32000\nmain*|7-00:00:00|16|64000\nmain*|7-00:00:00|64|256000\nbig|infinite|128|1000000\n"
    sinfo += "empty|infinite|0|0\n"
    monkeypatch.setattr(jobs, "call", lambda command: jobs.Answer(command, 0, sinfo, ""))
    monkeypatch.delenv("SBATCH_PARTITION", raising=False)
    assert bounds.read(params("slurm")) == Bounds(256000, 10080, 64, "of main")
    assert bounds.read(params("slurm", partition="short")) == Bounds(32000, 120, 8, "of short")
    assert bounds.read(params("slurm", extra=("-p", "short,big"))).minutes == math.inf
    assert bounds.read(params("slurm", extra=("--partition=short",))).cores == 8
    assert bounds.read(params("slurm", partition="unknown")) == Bounds()
    with pytest.raises(EnvironmentFault, match=r"there is no node of empty; name another executor\.array"):
        bounds.read(params("slurm", partition="empty")).require(memory_mb=1, minutes=1, threads=1)
    monkeypatch.setenv("SBATCH_PARTITION", "short")
    assert bounds.read(params("slurm")).where == "of short"
    qhost = (
        "HOSTNAME                ARCH         NCPU NSOC NCOR NTHR  LOAD  MEMTOT  MEMUSE  SWAPTO  SWAPUS\n"
        "global                  -               -    -    -    -     -       -       -       -       -\n"
        "vm                      lx-amd64        2    1    2    2  0.42   23.5G    1.9G     0.0     0.0\n"
    )
    monkeypatch.setattr(jobs, "call", lambda command: jobs.Answer(command, 0, qhost, ""))
    assert bounds.read(params("sge")).memory_mb == 23.5 * 1024
    assert bounds.read(params("sge", memory_resource="h_vmem")).memory_mb == math.inf


def test_a_scheduler_without_its_accounts_is_named_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """An element that the accounts do not know yet is no reason for it, a file that is missing is."""
    answers = iter(["error: job id 9 not found", *["error: /var/accounting: No such file or directory"] * 2])
    monkeypatch.setattr(jobs, "call", lambda command: jobs.Answer(command, 1, "", next(answers)))
    for _ in range(3):
        assert ends.report_of(params("sge"), {"job": "9", "index": 1}) == ""
    (said,) = caplog.messages
    assert said.startswith("qacct cannot tell how elements end")
    assert said.endswith("/var/accounting: No such file or directory")


def test_an_end_is_told_in_the_words_of_whoever_knows_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The element itself, then the scheduler and who cancelled it, then the last line of the log."""
    answers = {"scontrol": "JobId=9 JobState=CANCELLED Reason=None ExitCode=0:15", "sacct": "CANCELLED by 0\n"}
    monkeypatch.setattr(jobs, "call", lambda command: jobs.Answer(command, 0, answers.get(command[0], ""), ""))
    place = {"job": "9", "index": 3}

    def end(told: Told) -> End:
        return ends.of_element(params("slurm"), Seen("9", "RUNNING"), place, REQUEST, told)

    assert end(Told(began=True)) == End("cancelled", "by root, JobState=CANCELLED, Reason=None, ExitCode=0:15")
    assert end(Told(began=True, unfit="node a does not see /b")) == End("start", "node a does not see /b")
    assert end(Told(began=True, warned_s=3500.0)).cause == "time"
    assert end(Told(began=True, warned_s=12.0)) == End("cancelled", "ended by Slurm after 12 s")
    answers["scontrol"] = "JobId=9 JobState=FAILED Reason=NonZeroExitCode ExitCode=1:0"
    assert end(Told(began=True, last_line="OpenBLAS error: Memory allocation still failed")).cause == "memory"
    log = tmp_path / "3.log"
    log.write_text("Traceback\nValueError: no\n\n")
    text = ends.describe(end(Told(began=True)), native="9_3", times=3, request=REQUEST, log=log)
    assert text == (
        "element 9_3 died 3 times, at last with JobState=FAILED, Reason=NonZeroExitCode, ExitCode=1:0 "
        f"(4,000 MB, 60 min; log {log} ends with 'ValueError: no')"
    )


@pytest.mark.parametrize(
    ("lacks", "words"),
    [
        ({"needs": ["/absent/a.svs"]}, "does not see /absent/a.svs"),
        ({"version": "0.0.1"}, "and the run is of 0.0.1"),
        (
            {"kind": {"isa": "abacus", "torch": "other"}},
            ", and the run began on abacus: scores would have other last bits",
        ),
        ({"scratch": "/absent"}, "has no scratch folder /absent: No such file or directory"),
    ],
)
def test_an_element_checks_its_node_and_says_what_it_does(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    lacks: dict[str, object],
    words: str,
) -> None:
    """Its file and its log say where it runs, and what it lacks there."""
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "0")
    monkeypatch.delenv("TMPDIR", raising=False)
    table = tmp_path / "arrays/a.json"
    table.with_suffix("").mkdir(parents=True)
    about = {"index": "SLURM_ARRAY_TASK_ID", "base": 0, "elements": 1, "threads": 1, "idle_s": 0}
    table.write_text(json.dumps({**about, "request": {"memory_mb": 1, "minutes": 9}, **lacks}))
    assert element.run(table) == 30
    (written,) = table.with_suffix("").iterdir()
    (line,) = map(json.loads, written.read_text().splitlines())
    assert words in line["unfit"]
    assert words in capsys.readouterr().out


def test_an_element_records_that_it_is_about_to_be_killed(tmp_path: Path) -> None:
    """Grid Engine announces that it ends an element, and keeps no record of who asked for it."""
    child = os.fork()
    if not child:
        life = lifetime.Recorder(tmp_path, threads=1, job="a")
        time.sleep(0.2)  # too short for the next of its own notes
        with (tmp_path / "0.1.jsonl").open("w") as stream, element._warned(stream, 0.0, life):
            os.kill(os.getpid(), signal.SIGUSR2)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 128 + signal.SIGUSR2
    assert jobs.parse((tmp_path / "0.1.jsonl").read_bytes())[0].keys() == {"warned_s"}
    (noted,) = lifetime.read(tmp_path)
    assert noted.lived_s >= 0.2, "the bill has it to the end"


def test_what_a_scheduler_charges_counts_instead_of_what_an_element_noted(tmp_path: Path) -> None:
    """Of its last start; an element that died before Python started has nothing else in the bill."""
    slurm = "JobId=9 JobState=FAILED ExitCode=9:0 RunTime=1-00:01:05 TimeLimit=01:00:00 NumNodes=1 NumCPUs=4 NumTasks=1"
    assert params("slurm").dialect.charged(slurm) == Charge(4, 86465)
    twice = "slots        1\n" + qacct("0", 0, "1G", "3s") + "slots        2\n" + qacct("0", 137, "1G", "7s")
    assert params("sge").dialect.charged(twice) == Charge(2, 7)
    used = "    resources_used.ncpus = 2\n    resources_used.vmem = 1kb\n    resources_used.walltime = 00:01:01\n"
    assert params("pbs").dialect.charged(used) == Charge(2, 61)
    assert params("lsf").dialect.charged("Exited with exit code 1") is None
    for name, life in (
        ("own", Life("a.0.1", 4, 90.0)),
        ("charged", Life("a.0.1", 4, 65.0, charged=True)),
        ("dead", Life("a.1", 1, 6.0, charged=True)),
    ):
        lifetime.note_charge(tmp_path, name, life)
    assert lifetime.allocated_core_s(lifetime.read(tmp_path)) == 4 * 65 + 6


@pytest.mark.parametrize(
    ("error", "is_of_memory"),
    [
        (MemoryError(), True),
        (ImportError("libtorch.so: failed to map segment from shared object"), True),
        (RuntimeError("Exception from src/core.cpp:117: std::bad_alloc"), True),
        (OSError(12, "Cannot allocate memory"), True),
        (OSError(28, "No space left on device"), False),
        (ValueError("a tile is missing"), False),
    ],
)
def test_lack_of_memory_is_known_by_its_words(error: Exception, is_of_memory: bool) -> None:
    """Under a limit of address space libraries say it in many ways, also as the cause of another error."""
    assert faults.is_of_memory(error) is is_of_memory
    later = ValueError("it did not work")
    later.__cause__ = error
    assert faults.is_of_memory(later) is is_of_memory
