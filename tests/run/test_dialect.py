"""Dialects of schedulers: recorded commands and parsed answers for each scheduler, and how arrays are watched."""

import itertools
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections import Counter, deque
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from array_work import work
from hypothesis import given, settings
from hypothesis import strategies as st

from flows.__main__ import main
from flows.compose import compose_config
from flows.literal import literal
from wsiflow.errors import EnvironmentFault, InputError
from wsiflow.run.executor import element, jobs, pieces, submission, submitter, waiting
from wsiflow.run.executor.array import ArrayJobs, Batch, runs
from wsiflow.run.executor.dialect import ArrayParams, Place, Seen, expand, indices
from wsiflow.run.executor.params import ExecutorParams
from wsiflow.run.executor.pieces import Call, Piece, Request, Tries
from wsiflow.run.executor.protocol import Outcome, Slice
from wsiflow.run.executor.watch import Poll, Queue
from wsiflow.system import processes

CONF = Path(__file__).parents[2] / "conf/executor"
SPACE = "0a1b2c3d4e5f"
NAMES = ("slurm", "sge", "pbs", "lsf")

FIELDS = {
    "first": 1,
    "last": 7,
    "running": 3,
    "name": "predict-1a2b",
    "memory_mb": 4000,
    "minutes": 60,
    "seconds": 3600,
    "logs": "/run/logs/predict-1a2b",
    "script": "/run/arrays/element.sh",
    "memory_slot_mb": 2000,
    "root": "/run",
    "parallel_environment": "smp",
    "memory_resource": "mem_free",
    "options": ["-q", "short"],
    "extra": ["-X", "a {b}"],
    "command": ["wsiflow", "element", "/run/arrays/predict-1a2b.json"],
}

SUBMISSIONS = {
    "slurm": "sbatch --parsable --array=1-7%3 --job-name=predict-1a2b --ntasks=1 --cpus-per-task=2 --time=60"
    " --output=/run/logs/predict-1a2b/%a.log --open-mode=append --requeue --mem=4000M -q short -X 'a {b}'"
    " /run/arrays/element.sh wsiflow element /run/arrays/predict-1a2b.json",
    "sge": "qsub -terse -t 1-7 -tc 3 -N predict-1a2b -wd /run -notify -v HOME,PATH -r y -j y"
    " -o ':/run/logs/predict-1a2b/$TASK_ID.log' -l h_rt=3600 -l mem_free=2000M -pe smp 2 -q short"
    " -X 'a {b}' -b y -shell n /bin/bash /run/arrays/element.sh"
    " wsiflow element /run/arrays/predict-1a2b.json",
    "pbs": "qsub -J 1-7%3 -N predict-1a2b -v HOME,PATH -r y -j oe -o '/run/logs/predict-1a2b/^array_index^.log'"
    " -l walltime=3600 -l select=1:ncpus=2:mem=4000mb -q short -X 'a {b}' -- /bin/bash /run/arrays/element.sh"
    " wsiflow element /run/arrays/predict-1a2b.json",
    "lsf": "bsub -J 'predict-1a2b[1-7]%3' -n 2 -R 'span[hosts=1]' -r -W 60 -o /run/logs/predict-1a2b/%I.log"
    " -M 4000MB -R 'rusage[mem=4000MB]' -q short -X 'a {b}' /bin/bash /run/arrays/element.sh"
    " wsiflow element /run/arrays/predict-1a2b.json",
}

SUBMITTED = {
    "slurm": ["1234\n", "1234;cluster\n"],
    "sge": ["1234.1-100:1\n"],
    "pbs": ["1234[].server\n"],
    "lsf": ["Job <1234> is submitted to default queue <normal>.\n"],
}

QUEUES = {
    "slurm": "1234_0|RUNNING|None|p-1\n1234_1|PENDING|JobArrayTaskLimit|p-1\n1234_2|OUT_OF_MEMORY|OutOfMemory|p-1\n"
    "1240|RUNNING|None|other\n1234_3|PENDING|launch failed requeued held|p-1\n"
    "1234_4|PENDING|job requeued in held state|p-1\n1234_5|PENDING|JobHeldUser|p-1\n",
    "sge": """<?xml version='1.0'?>
<job_info>
  <queue_info>
    <job_list state="running">
      <JB_job_number>9</JB_job_number>
      <JB_name>no-array</JB_name>
      <state>r</state>
    </job_list>
    <job_list state="running">
      <JB_job_number>1234</JB_job_number>
      <JAT_prio>0.5</JAT_prio>
      <JB_name>p-1</JB_name>
      <state>dr</state>
      <tasks>1</tasks>
    </job_list>
  </queue_info>
  <job_info>
    <job_list state="pending">
      <JB_job_number>1234</JB_job_number>
      <JB_name>p-1</JB_name>
      <state>qw</state>
      <tasks>3-7:2,9</tasks>
    </job_list>
    <job_list state="pending">
      <JB_job_number>1234</JB_job_number>
      <JB_name>p-1</JB_name>
      <state>Eqw</state>
      <tasks>2</tasks>
    </job_list>
  </job_info>
</job_info>
""",
    "pbs": "Job Id: 1234[].server\n    Job_Name = p-1\n    job_state = B\n"
    "Job Id: 1234[1].server\n    Job_Name = p-1\n    resources_used.mem = 9kb\n    job_state = R\n"
    "Job Id: 1234[2].server\n    Job_Name = p-1\n    job_state = X\n",
    "lsf": "1234|RUN|p-1[1]\n1234|EXIT|p-1[2]\n99|RUN|alone\n",
}

LISTED = {
    "slurm": {
        0: "RUNNING",
        1: "PENDING",
        2: "OUT_OF_MEMORY",
        3: "PENDING|launch failed requeued held",
        4: "PENDING|job requeued in held state",
        5: "PENDING",
    },
    "sge": {1: "dr", 2: "Eqw", 3: "qw", 5: "qw", 7: "qw", 9: "qw"},
    "pbs": {1: "R", 2: "X"},
    "lsf": {1: "RUN", 2: "EXIT"},
}

# Scheduler, last state, what it tells, whether the element began, and why it ended.
ENDS = [
    ("slurm", "COMPLETED", "JobId=9 JobState=OUT_OF_MEMORY Reason=OutOfMemory ExitCode=0:125", True, "memory"),
    ("slurm", "FAILED", "JobId=9 JobState=FAILED Reason=NonZeroExitCode ExitCode=137:0", True, "memory"),
    ("slurm", "FAILED", "JobId=9 JobState=FAILED Reason=JobLaunchFailure ExitCode=0:9", True, "memory"),
    ("slurm", "TIMEOUT", "", True, "time"),
    ("slurm", "RUNNING", "JobId=9 JobState=NODE_FAIL Reason=NodeDown ExitCode=0:0", True, "node"),
    ("slurm", "CANCELLED", "", True, "cancelled"),
    ("slurm", "RUNNING", "JobId=9 JobState=FAILED Reason=NonZeroExitCode ExitCode=1:0", True, "killed"),
    ("slurm", "RUNNING", "", True, "lost"),
    ("slurm", "PENDING", "", False, "cancelled"),
    ("slurm", "", "", False, "cancelled"),
    ("slurm", "REQUEUE_HOLD", "JobId=9 JobState=CANCELLED Reason=JobHeldAdmin ExitCode=0:0", True, "node"),
    ("slurm", "SPECIAL_EXIT", "", False, "node"),
    ("slurm", "PENDING", "", True, "lost"),
    ("slurm", "FAILED", "", False, "lost"),
    ("slurm", "RUNNING", "", False, "lost"),
    ("sge", "r", "failed       100 : assumedly after job\nexit_status  137                  (Killed)", True, "memory"),
    ("sge", "r", "failed       0\nexit_status  137", True, "memory"),
    ("sge", "r", "failed       37  : qmaster enforced h_rt, h_cpu, or h_vmem limit\nexit_status  137", True, "time"),
    ("sge", "dr", "failed       100 : assumedly after job\nexit_status  137", True, "cancelled"),
    ("sge", "Eqw", "failed       26  : opening input/output file\nexit_status  0", False, "node"),
    ("sge", "r", "failed       0\nexit_status  1", True, "killed"),
    ("sge", "qw", "", False, "cancelled"),
    ("sge", "hRwq", "", False, "cancelled"),
    ("sge", "r", "", False, "lost"),
    ("sge", "Rr", "", False, "lost"),
    ("pbs", "Q", "", False, "cancelled"),
    ("pbs", "R", "", False, "lost"),
    ("pbs", "R", "Exit_status = 265", True, "memory"),
    ("pbs", "R", "comment = Job terminated: walltime 60 exceeded limit 50\nExit_status = 271", True, "time"),
    ("lsf", "PEND", "", False, "cancelled"),
    ("lsf", "EXIT", "", False, "lost"),
    ("lsf", "RUN", "TERM_RUNLIMIT: job killed after reaching LSF run time limit.", True, "time"),
    ("lsf", "RUN", "TERM_MEMLIMIT: job killed after reaching LSF memory usage limit.", True, "memory"),
    ("lsf", "ZOMBI", "TERM_OWNER: job killed by owner.", True, "node"),
    ("lsf", "RUN", "TERM_OWNER: job killed by owner.", True, "cancelled"),
]

LIMITS = {
    "slurm": ("MaxArraySize            = 1001\nMaxDBDMsgs = 20016", 1001),
    "sge": ("max_aj_instances             2000\nmax_aj_tasks                 75000\n", 75000),
    "pbs": ("    max_array_size = 10000\n", 10000),
    "lsf": ("MAX_JOB_ARRAY_SIZE = 1000\n", 1000),
}


def params(name: str, **changed: object) -> ArrayParams:
    """Return the shipped settings of a scheduler with some changes."""
    values = yaml.safe_load((CONF / f"{name}_array.yaml").read_text())
    made = ExecutorParams.model_validate(values).array
    assert made is not None
    return made.model_copy(update=changed)


@pytest.mark.parametrize("name", NAMES)
def test_submission(name: str) -> None:
    """The command that submits an array is exactly the recorded one; braces in the user's options stay as they are."""
    assert (
        shlex.join(params(name).dialect.submission(FIELDS, threads=2, variables=["HOME", "PATH"])) == SUBMISSIONS[name]
    )


def test_one_thread_needs_no_parallel_environment() -> None:
    """Grid Engine is asked for slots only where more than one thread is used."""
    assert "-pe" not in params("sge").dialect.submission(FIELDS, threads=1)


SITE = {
    "partition": "short,long",
    "account": 12,
    "qos": "high",
    "constraint": "avx512",
    "reservation": "r1",
    "exclude": ["n1", "n2"],
    "resources": "gpu=1",
    "mail": "a@b.org",
    "comment": "a test",
}
SITE_OPTIONS = {
    "slurm": "--partition=short,long --account=12 --qos=high --constraint=avx512 --reservation=r1 --exclude=n1,n2"
    " --mail-user=a@b.org --mail-type=END,FAIL '--comment=a test'",
    "sge": "-q short,long -P 12 -ar r1 -l 'hostname=!(n1|n2)' -l gpu=1 -M a@b.org -m a -ac 'comment=a test'",
    "pbs": "-q short,long -A 12 -l gpu=1 -M a@b.org -m a",
    "lsf": "-q short,long -P 12 -sla high -R 'select[avx512]' -U r1 -u a@b.org -N -Jd 'a test'",
}


def changed(name: str, **values: object) -> ArrayParams:
    """Return the shipped settings of a scheduler with some changes, validated."""
    return ArrayParams.model_validate(params(name).model_dump() | values)


@pytest.mark.parametrize("name", NAMES)
def test_keys_of_a_site_are_options_of_every_scheduler(name: str) -> None:
    """The same keys everywhere; one that a scheduler has no option for is refused by name."""
    known = {key: value for key, value in SITE.items() if key in params(name).dialect.options}
    assert shlex.join(changed(name, **known).site_options()) == SITE_OPTIONS[name]
    for key in SITE.keys() - known.keys():
        with pytest.raises(ValueError, match=rf"has no option for executor.array.{key}, but for: partition, account"):
            changed(name, **{key: SITE[key]})


@pytest.mark.parametrize(
    ("name", "extra", "setting"),
    [
        ("slurm", "-J name", "executor.array.job_name"),
        ("slurm", "--job-name=name", "executor.array.job_name"),
        ("slurm", ["-a", "0-3"], "executor.array.throttle"),
        ("slurm", "--mem 60M", "executor.array.memory_mb"),
        ("slurm", "--mem-per-cpu=60M", "executor.array.memory_mb"),
        ("slurm", "-t60", "executor.array.minutes"),
        ("slurm", "--time=60", "executor.array.minutes"),
        ("slurm", "-o x", "the run's folder"),
        ("slurm", "--parsable", "the program"),
        ("slurm", "--export=ALL", "executor.array.environment"),
        ("sge", "-l h_rt=60", "executor.array.minutes"),
        ("sge", "[-l,h_vmem=4G]", "executor.array.memory_mb and executor.array.memory_resource"),
        ("sge", "-l gpu=1,h_vmem=4G", "executor.array.memory_mb and executor.array.memory_resource"),
        ("sge", "-N name", "executor.array.job_name"),
        ("sge", "-V", "executor.array.environment"),
        ("sge", "-tc 3", "executor.array.throttle"),
        ("pbs", "-lwalltime=60", "executor.array.minutes"),
        ("lsf", "-W 60", "executor.array.minutes"),
    ],
)
def test_extra_holds_nothing_that_a_setting_decides(name: str, extra: object, setting: str) -> None:
    """It would win in silence, and messages would tell false numbers, or the array would not be found again."""
    with pytest.raises(ValueError, match=rf"extra holds '-.*', which {setting} decides"):
        changed(name, extra=extra)


@pytest.mark.parametrize(
    ("typed", "words"),
    [
        ("-p paid --qos=normal", ("-p", "paid", "--qos=normal")),
        ("[-p,paid,--qos=normal]", ("-p", "paid", "--qos=normal")),
        (["-p", "paid"], ("-p", "paid")),
        ("--comment='a b' --nice --mem-bind=local --ntasks-per-core=1", ...),
    ],
)
def test_extra_is_a_list_or_one_text(typed: object, words: object) -> None:
    """Each as it is typed on a command line; options that only begin like others are free."""
    if words is ...:
        words = ("--comment=a b", "--nice", "--mem-bind=local", "--ntasks-per-core=1")
    assert changed("slurm", extra=typed).extra == words
    text = typed if isinstance(typed, str) else f"[{','.join(map(str, typed))}]"  # type: ignore[call-overload]
    composed = compose_config(literal([f"executor.array.extra={text}", "executor=slurm_array"]))
    assert composed.executor.array is not None
    assert composed.executor.array.extra == words


def test_memory_is_asked_for_by_slot() -> None:
    """Grid Engine counts memory for each slot of a parallel environment, which sites name as they like."""
    form = submission.Form(changed("sge", parallel_environment="mp", memory_resource="h_vmem"), Path("/run"), 0, 4)
    command = shlex.join(map(str, form.command("a-1", 9, Request(4001, 60), Path("/run/logs/a-1"))))
    assert " -l h_rt=3600 -l h_vmem=1001M -pe mp 4 " in command


def test_a_driver_in_a_job_hands_nothing_of_that_job_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands of a scheduler get what they need themselves, and what elements need; no secrets, no other job."""
    given = ("SLURM_CONF", "SLURM_JOB_ID", "SLURM_MEM_PER_NODE", "SBATCH_ACCOUNT", "API_KEY", "MINE", "SGE_TASK_ID")
    for name in (*given, "SGE_ROOT"):
        monkeypatch.setenv(name, "x")
    names = {"slurm": {"SLURM_CONF", "SBATCH_ACCOUNT", "MINE"}, "sge": {"SGE_ROOT", "MINE"}}
    for name, expected in names.items():
        form = submission.Form(changed(name, environment=["MINE"]), Path("/run"), 0, 1)
        assert form.environ().keys() & {*given, "SGE_ROOT"} == expected


def test_the_variables_of_an_element() -> None:
    """Elements get only the variables that are set and either needed or named."""
    there = dict.fromkeys(("PATH", "WSIFLOW_DEBUG", "WSIFLOW_SWEEP", "API_KEY", "MINE", "MKL_CBWR"), "x")
    assert element.variables(there, ["MINE", "ABSENT"]) == ["MINE", "MKL_CBWR", "PATH", "WSIFLOW_DEBUG"]
    assert "-v" not in params("sge").dialect.submission(FIELDS, threads=1)
    with pytest.raises(ValueError, match="pattern"):
        ArrayParams.model_validate({**params("sge").model_dump(), "environment": ["A,B"]})


def test_the_job_script_is_constant() -> None:
    """The job script is the same for all runs but for the prologue: the command and the table are its arguments."""
    assert element.script(["module load x"]).endswith('from the run\'s folder.\nmodule load x\nexec "$@"\n')
    assert element.script() == (
        "#!/bin/bash\n"
        "# One element of an array job. The arguments are a command and the array's table; the element's index is in\n"
        "# the environment, and is its name among the elements that take work from the run's folder.\n"
        'exec "$@"\n'
    )


@pytest.mark.parametrize("name", NAMES)
def test_ids_are_found_in_what_the_submission_prints(name: str) -> None:
    """The id of the array is found, and an empty text where the answer has none."""
    dialect = params(name).dialect
    assert [dialect.submitted(text) for text in SUBMITTED[name]] == ["1234"] * len(SUBMITTED[name])
    assert dialect.submitted("error: it did not work\n") == ""


@pytest.mark.parametrize("name", NAMES)
def test_the_queue_is_read_element_by_element(name: str) -> None:
    """Every listed element of every array is found with its state; jobs without an array are ignored."""
    expected = {Place("p-1", index): ("1234", state) for index, state in LISTED[name].items()}
    listed = params(name).dialect.listed(QUEUES[name])
    assert {place: (seen.job, seen.state) for place, seen in listed.items()} == expected
    reasons = {place.number: seen.reason for place, seen in listed.items() if seen.reason}
    expected_reasons = {0: "None", 1: "JobArrayTaskLimit", 2: "OutOfMemory", 5: "JobHeldUser"}
    assert reasons == (expected_reasons if name == "slurm" else {})


@pytest.mark.parametrize(
    ("name", "alive", "stuck", "ended"),
    [
        (
            "slurm",
            ["PENDING", "RUNNING", "COMPLETING", "REQUEUED"],
            ["SPECIAL_EXIT", "REQUEUE_HOLD", "PENDING|held"],
            ["COMPLETED"],
        ),
        ("sge", ["qw", "hqw", "r", "t", "Rr", "dr"], ["Eqw"], []),
        ("pbs", ["Q", "R", "H", "E"], [], ["X", "F"]),
        ("lsf", ["PEND", "RUN", "UNKWN"], ["ZOMBI"], ["EXIT", "DONE"]),
    ],
)
def test_states(name: str, alive: list[str], stuck: list[str], ended: list[str]) -> None:
    """An element in each of the states is alive, stuck or ended."""
    dialect = params(name).dialect
    found = {state: (dialect.is_alive(state), dialect.is_stuck(state)) for state in alive + stuck + ended}
    assert found == {
        **dict.fromkeys(alive, (True, False)),
        **dict.fromkeys(stuck, (False, True)),
        **dict.fromkeys(ended, (False, False)),
    }


@pytest.mark.parametrize(("name", "state", "report", "began", "cause"), ENDS)
def test_why_an_element_ended(name: str, state: str, report: str, began: bool, cause: str) -> None:
    """The report of a scheduler on a dead element gives one of a few causes."""
    assert params(name).dialect.cause(state, report, began=began) == cause


@pytest.mark.parametrize("name", NAMES)
def test_the_longest_array_is_read(name: str) -> None:
    """The limit of the site is read, and 0 where the answer has none."""
    text, limit = LIMITS[name]
    assert params(name).dialect.longest(text) == limit
    assert params(name).dialect.longest("") == 0


def test_an_invalid_pattern_is_refused() -> None:
    """A mistake in the dialect of a site is an error before anything runs."""
    values = params("slurm").dialect.model_dump()
    with pytest.raises(ValueError, match="unterminated"):
        type(params("slurm").dialect).model_validate({**values, "alive": "(RUNNING"})
    with pytest.raises(ValueError, match="are unknown causes"):
        type(params("slurm").dialect).model_validate({**values, "causes": {"magic": "x"}})


def test_lists_are_spliced() -> None:
    """An argument that is only the placeholder of a list is replaced by the items of the list."""
    assert expand(["a", "{x}", "{y}", "b{z}"], {"x": ["1", "2"], "y": [], "z": 3}) == ["a", "1", "2", "b3"]


def test_compressed_indices() -> None:
    """Ranges with and without a step, and single indices, are expanded."""
    assert list(indices("1-9:4,12,20-21")) == [1, 5, 9, 12, 20, 21]


@given(st.sets(st.integers(0, 60)))
def test_runs_hold_each_task_once(tasks: set[int]) -> None:
    """Ranges are in rising order, never touch, and contain exactly the tasks."""
    found = list(runs(tasks))
    assert [task for lo, hi in found for task in range(lo, hi)] == sorted(tasks)
    assert all(before[1] < after[0] for before, after in itertools.pairwise(found))


@settings(max_examples=100, deadline=None)
@given(
    spans=st.lists(st.integers(1, 4), max_size=40),
    limit=st.integers(2, 12),
    window=st.integers(2, 30),
    lost=st.lists(st.integers(0, 2), min_size=40, max_size=40),
)
def test_elements_are_as_many_as_pieces_but_within_the_limits(
    spans: list[int], limit: int, window: int, lost: list[int]
) -> None:
    """For any pieces, limit, window and earlier losses, arrays are within the limit, and elements in the window."""
    with tempfile.TemporaryDirectory() as folder:
        pool = ArrayJobs(params("slurm", limit=limit, window=window), root=Path(folder), workers=0, threads=1)
        batch = Batch(Call("work", "plan.json", "s"), set(range(99)), deque())
        lo, requests = 0, Counter[Request]()
        for span, memory in zip(spans, lost, strict=False):
            piece = Piece(batch.call, lo, lo + span, Tries(memory, memory))
            pool._post(batch, piece)
            requests[pool._request(piece.tries)] += 1
            lo += span
        arrays: list[tuple[Request, int]] = []

        def start(name: str, request: Request, size: int, _stages: str) -> SimpleNamespace:
            arrays.append((request, size))
            places = [SimpleNamespace(place=Place(name, i)) for i in range(size)]
            return SimpleNamespace(name=name, request=request, open=places)

        pool._submitter.start = start  # type: ignore[assignment,method-assign]
        for request in requests:
            waiting = [name for name in pieces.posted(Path(folder)) if pieces.request_of(name) == request]
            assert len(waiting) == requests[request]
            for _ in range(2):  # once more changes nothing
                pool._staff(request, waiting, ())
        started = Counter[Request]()
        for request, size in arrays:
            assert size <= limit
            started[request] += size
        assert all(started[request] <= count for request, count in requests.items())
        assert sum(started.values()) <= window
        if sum(requests.values()) <= window:
            assert started == requests


def test_small_pieces_share_an_element(tmp_path: Path) -> None:
    """Ten pieces of six seconds are worth one start; so is a single one, and each of which nothing is known."""
    pool = ArrayJobs(params("slurm"), root=tmp_path, workers=0, threads=1)
    batch = Batch(Call("work", "plan.json", "s"), set(range(99)), deque())
    sizes: list[int] = []
    pool._submit = lambda _name, _request, size, _stages: bool(sizes.append(size)) or True  # type: ignore[func-returns-value,method-assign]
    for task in range(25):
        pool._post(batch, Piece(batch.call, task, task + 1), expected_s=6.0)
    pool._staff(pool._request(Tries()), pieces.posted(tmp_path), ())
    pool._staff(pool._request(Tries()), pieces.posted(tmp_path)[:1], ())
    pool._post(batch, Piece(batch.call, 25, 26))
    pool._staff(pool._request(Tries()), pieces.posted(tmp_path), ())
    assert sizes == [3, 1, 4]


@pytest.mark.parametrize(
    ("causes", "resources"),
    [
        ([], (4000, 60)),
        (["memory"], (8000, 60)),
        (["time", "memory"], (8000, 120)),
        (["killed", "node", "lost"], (4000, 60)),
        (["memory"] * 5, (32000, 60)),
        (["time"] * 6, (4000, 1440)),
    ],
)
def test_what_was_too_little_is_doubled_up_to_the_limit(causes: list[str], resources: tuple[int, int]) -> None:
    """Memory is doubled after a lack of memory, minutes after a lack of time, and nothing after other causes."""
    pool = ArrayJobs(params("slurm"), root=Path("/nowhere"), workers=0, threads=1)
    tries = Tries()
    for cause in causes:
        tries = tries.after(cause)
    assert tries.lost == len(causes)
    assert pool._request(tries) == resources


def test_an_incomplete_line_is_ignored(tmp_path: Path) -> None:
    """A line that a killed driver left incomplete spoils neither its neighbours nor the next line."""
    log = jobs.JobLog(tmp_path)
    log.append("driver", pid=1)
    log.append("intent", name="a")
    with log.path.open("a") as stream:
        stream.write('{"event": "job", "name": "a", "jo')
    assert log.read().jobs == (jobs.Job("a", ""),)
    log.append("job", name="a", job="7")
    assert log.read().jobs == (jobs.Job("a", "7"),)
    log.append("ended", name="a")
    assert log.read().jobs == ()


def test_cancelling_counts_for_the_drivers_before_it(tmp_path: Path) -> None:
    """A run that is started again after it was cancelled is not cancelled any more."""
    log = jobs.JobLog(tmp_path)
    log.append("driver", pid=1)
    log.append("cancel")
    assert log.read().cancelled
    log.append("driver", pid=2)
    assert not log.read().cancelled


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Put commands into PATH; each is a shell script that runs in the returned folder."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")

    def put(**scripts: str) -> Path:
        for name, script in scripts.items():
            (folder / name).write_text(f"#!/bin/bash\ncd {folder}\n{script}\n")
            (folder / name).chmod(0o755)
        return folder

    return put


def test_what_would_be_submitted_is_shown_and_tested(
    commands: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """``wsiflow run --script-only`` has the scheduler test the very command, and submits and writes nothing."""
    folder = commands(
        sbatch='echo "$@" >> asked; echo "sbatch: Job 7 to start at noon" >&2',
        squeue="",
        sinfo="echo 'main*|60|4|9999'",
    )
    words = [
        "run",
        "--script-only",
        "dataset=folder",
        "dataset.folder=/slides",
        f"out={tmp_path}/x",
        "executor=slurm_array",
    ]
    assert main([*words, "executor.array.prologue=[module load a]", "executor.array.account=lab"]) == 0
    shown = capsys.readouterr().out
    assert "\nmodule load a\nexec " in shown
    assert f" --account=lab {tmp_path}/x/arrays/element.sh " in shown
    assert "9,999 MB, 60 min, 4 cores of main" in shown
    assert "sbatch: Job 7 to start at noon" in shown
    assert (folder / "asked").read_text().startswith("--test-only --parsable --array=0-0%1 --job-name=x-0 ")
    assert not (tmp_path / "x").exists()
    assert main([*words, "executor.array.minutes=61"]) == 30
    assert "no job of main may run for 61 min, the limit is 60; lower executor.array.minutes" in capsys.readouterr().err
    assert main([*words, "executor=process"]) == 20
    site = tmp_path / "site/executor/ours.yaml"
    site.parent.mkdir(parents=True)
    site.write_text("defaults: [slurm_array, _self_]\narray: {account: theirs}\n")
    commands(squeue="echo away >&2; exit 1")
    assert main([*words[:-1], "--config-dir", str(site.parents[1]), "executor=ours"]) == 0
    shown = capsys.readouterr().out
    assert " --account=theirs " in shown
    assert shown.endswith("\nnot tested: Slurm does not answer (away)\n")


# A Slurm with room for ROOM elements of a user; it runs an element at every fourth call of squeue.
SBATCH = """\
for one; do case $one in
    --array=*) span=${one#--array=}; span=${span%\\%*} ;;
    --job-name=*) name=${one#--job-name=} ;;
esac; done
size=$((${span#*-} - ${span%-*} + 1))
echo $size >> asked
if [ $(($(cat queue 2> /dev/null | wc -l) + size)) -gt ROOM ]; then
    echo "sbatch: error: AssocMaxSubmitJobLimit" >&2
    exit 1
fi
job=$(wc -l < asked)
for ((i = 0; i < size; i++)); do echo "$job $i $name ${*: -1}" >> queue; done
echo $job
"""
SQUEUE = """\
while read -r job i name table; do echo "${job}_$i|RUNNING|$name"; done < queue
echo >> looks
[ $(($(wc -l < looks) % 4)) -eq 0 ] || exit 0
head -n 1 queue | while read -r job i name table; do
    SLURM_ARRAY_TASK_ID=$i PYTHON -m wsiflow.flows element $table >&2
done
sed -i 1d queue
"""


def test_a_refused_array_waits_for_others_of_the_run(commands: Callable[..., Path], tmp_path: Path) -> None:
    """Where a user may have three jobs, the elements of the first array do all tasks, and no array is left."""
    python = f"PYTHONPATH={Path(__file__).parents[1]} {sys.executable}"
    folder = commands(sbatch=SBATCH.replace("ROOM", "3"), squeue=SQUEUE.replace("PYTHON", python))
    (tmp_path / "plan.json").write_text("{}")
    made = params("slurm", limit=3, poll_s=0.01, grace_s=60, idle_s=0)
    with ArrayJobs(made, root=tmp_path, workers=0, threads=1) as pool:
        outcomes = list(pool.run(work, tmp_path / "plan.json", "predict", [Slice(i, i + 1) for i in range(5)]))
    assert sorted(outcome.task for outcome in outcomes if outcome.receipt) == list(range(5))
    assert not any(outcome.retried for outcome in outcomes)
    assert (folder / "asked").read_text().split() == ["3", *["2"] * 3], "three refusals"
    tables = [path for path in (tmp_path / "arrays").glob("*.json") if path.stem != "queue"]
    assert len(tables) == 1
    assert {path.name for path in (tmp_path / "logs").iterdir()} == {tables[0].stem, "1"}, "and the link by its id"
    assert not pool._log.read().jobs


def test_an_array_refused_while_nothing_is_in_the_queue_ends_the_run(
    commands: Callable[..., Path], tmp_path: Path
) -> None:
    """There is nothing to wait for: the error has the message of the scheduler."""
    commands(sbatch="echo 'sbatch: error: invalid account' >&2; exit 1", squeue="")
    pool = ArrayJobs(params("slurm", limit=3, poll_s=0.01), root=tmp_path, workers=0, threads=1)
    with pytest.raises(EnvironmentFault, match=r"refused an array of 2: .*invalid account"), pool:
        list(pool.run(work, tmp_path / "plan.json", "predict", [Slice(0, 1), Slice(1, 2)]))


def test_a_queue_that_is_full_for_this_user_is_waited_for(
    commands: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Jobs of other runs fill what a user may have: the run says so, waits, and asks for fewer at a time."""
    monkeypatch.setattr(submitter, "_FULL_S", 0.01)
    python = f"PYTHONPATH={Path(__file__).parents[1]} {sys.executable}"
    folder = commands(sbatch=SBATCH.replace("ROOM", "1"), squeue=SQUEUE.replace("PYTHON", python))
    (tmp_path / "plan.json").write_text("{}")
    made = params("slurm", poll_s=0.01, grace_s=60, idle_s=0)
    told = []
    monkeypatch.setattr(waiting, "write", lambda _root, view: told.append(view.refused))
    with ArrayJobs(made, root=tmp_path, workers=0, threads=1) as pool:
        outcomes = list(pool.run(work, tmp_path / "plan.json", "predict", [Slice(0, 1), Slice(1, 2)]))
    assert sorted(outcome.task for outcome in outcomes if outcome.receipt) == [0, 1]
    assert (told[0], told[-1]) == ("sbatch: error: AssocMaxSubmitJobLimit", "")
    assert (folder / "asked").read_text().split()[:4] == ["2"] * 3 + ["1"], "three tries, then half"
    assert "Slurm refused another array, which is submitted again later: sbatch: error: AssocMaxSubmit" in caplog.text


def test_a_scheduler_that_does_not_answer_is_an_error_at_once(commands: Callable[..., Path], tmp_path: Path) -> None:
    """Where the scheduler does not answer its commands, a run does not begin, and leaves no array."""
    commands(squeue="echo 'squeue: error: no configuration' >&2; exit 1", sbatch="exit 1")
    pool = ArrayJobs(params("slurm", poll_s=0.01), root=tmp_path, workers=0, threads=1)
    with pytest.raises(EnvironmentFault, match=r"Slurm does not answer \(squeue: error: no config.*squeue works"), pool:
        pytest.fail("it began")
    assert not (tmp_path / "jobs.jsonl").exists()


@pytest.mark.parametrize(("workers", "room"), [(0, 100), (7, 7), (1, 1), (1000, 100)])
def test_workers_limit_all_shards_together(workers: int, room: int) -> None:
    """All shards together have no more elements in the queue than may run at a time, and than the window."""
    queue = Queue(params("slurm", window=100), workers=workers)
    taken = [queue.take(f"shard-{i}", 5, longest=1000) for i in range(200)]
    assert sum(taken) == room


def test_a_refusal_narrows_the_window_but_keeps_what_was_accepted() -> None:
    """The window becomes half of what was tried, never less than what was accepted, and grows again with time."""
    queue = Queue(params("slurm", window=100), workers=0)
    assert queue.take("a", 30, longest=1000) == 30
    queue._last = Poll(0.0, {Place("a", i): Seen("1", "RUNNING") for i in range(30)})
    windows = []
    for size in (70, 20):
        assert queue.take("b", size, longest=1000) == size
        assert queue.give_back("b", size)
        windows.append(queue._window)
    assert windows == [50, 30]
    assert not queue.give_back("a", 30)
    assert not queue.give_back("a", 1)
    assert queue._window == 1
    for _ in range(8):
        queue.widen()
    assert queue._window == 100


def test_a_second_driver_is_refused_while_the_first_lives(commands: Callable[..., Path], tmp_path: Path) -> None:
    """The second driver of a folder is refused with the first one's name, unless that was killed or has stopped."""
    commands(squeue="")
    first = subprocess.Popen(["sleep", "3600"])
    pool = ArrayJobs(params("slurm"), root=tmp_path, workers=0, threads=1)
    known = {**jobs.identity(), "pid": first.pid, "born": processes.start_ticks(first.pid)}
    pool._log.append("driver", **known)
    with pytest.raises(EnvironmentFault, match=rf"process {first.pid} on .*wsiflow cancel {tmp_path}"), pool:
        pass
    pool._log.append("left", **known)
    with pool, pool:  # its own process is no other
        pass
    pool._log.append("driver", **known)
    pool._log.append("driver", **known | {"space": "another"})
    assert "another container" in jobs._end_driver(pool._log.read())
    with pool:  # whatever has its number here
        pass
    assert first.poll() is None, "a process with the number of another container's driver is not ended"
    pool._log.append("driver", **known)
    first.kill()
    first.wait()
    with pool:
        assert not pool._log.read().left
    assert pool._log.read().left


def test_an_array_cancelled_while_it_is_submitted_is_searched_again(
    commands: Callable[..., Path], tmp_path: Path
) -> None:
    """At the first poll the array has no id and is not in the queue; at the second one it is cancelled by its name."""
    folder = commands(squeue="touch queue; cat queue", scancel='echo "$@" >> dropped')
    log, dialect = jobs.JobLog(tmp_path), params("slurm").dialect
    log.append("intent", name="under-way")
    log.append("intent", name="gone")
    log.append("job", name="gone", job="6")
    assert jobs.drop_open(log, dialect) == []
    assert log.read().jobs == (jobs.Job("under-way", ""),)
    (folder / "queue").write_text("7_0|PENDING|under-way\n")
    assert jobs.drop_open(log, dialect) == ["under-way: 7 was cancelled, 1 of its elements were waiting or running"]
    assert (folder / "dropped").read_text() == "7\n"
    assert log.read().jobs == ()


def test_an_array_taken_over_is_expected_until_all_its_elements_have_ended(
    commands: Callable[..., Path], tmp_path: Path
) -> None:
    """Two shards need what two elements of an array that was left have: it is open until both have said their end."""
    commands(squeue="printf '7_0|RUNNING|predict-a\\n7_1|RUNNING|predict-a\\n'")
    first = ArrayJobs(params("slurm"), root=tmp_path, workers=0, threads=1).__enter__()  # and then it was killed
    first._submitter.send = lambda *_: "7"  # type: ignore[method-assign]
    request = first._request(Tries())
    call = Call(element.dotted(work), "plan.json", "predict")
    first._submitter.start("predict-a", request, 2)
    for task in (0, 1):
        name = pieces.post(tmp_path, Piece(call, task, task + 1), request, task)
        assert pieces.take(tmp_path, "predict-a", task, [name]) == name
    expected = []
    with ArrayJobs(params("slurm", poll_s=0.01), root=tmp_path, workers=0, threads=1) as pool:
        for task in (0, 1):
            shard = pool.run(work, tmp_path / "plan.json", "predict", [Slice(task, task + 1)])
            (name,) = pieces.of_element(tmp_path, "predict-a", task)
            lines = ({"outcome": Outcome(task, {}, executed=True)._asdict(), "piece": name}, {"ended": ""})
            text = "".join(json.dumps(line) + "\n" for line in lines)
            (tmp_path / f"arrays/predict-a/{task}.2.jsonl").write_text(text)
            pieces.finish(tmp_path, "predict-a", task, name)
            assert [outcome.task for outcome in shard if not outcome.retried] == [task]
            expected.append(pool._log.read().jobs)
    assert expected == [(jobs.Job("predict-a", "7"),), ()]


def test_what_a_lost_element_left_is_removed(commands: Callable[..., Path], tmp_path: Path) -> None:
    """The attempt file of an element that was killed on another host is removed; those of others stay."""
    commands(squeue="", scontrol="exit 1")
    pool = ArrayJobs(params("slurm", poll_s=0.01, grace_s=0, retries=0), root=tmp_path, workers=0, threads=1)
    one, other = f"{SPACE}-1-{'a' * 32}", f"{SPACE}-1-{'b' * 32}"
    gone = {f"node-7-{one}", f"node-7-{other}"}
    stays = {
        f"node-7-7-{one}",
        f"node-71-{one}",
        f"edon-7-{one}",
        f"node-7-{'f' * 12}-1-{'a' * 32}",
        "node-7-" + "a" * 32,
    }

    def send(name: str, *_: object) -> str:
        (piece,) = pieces.posted(tmp_path)
        pieces.take(tmp_path, name, 0, [piece])
        about = {"started": "", "host": "node", "pid": 7, "space": SPACE, "born": "1"}
        lines = "".join(json.dumps(line) + "\n" for line in (about, {"begun": 0, "piece": piece}))
        (tmp_path / f"arrays/{name}/0.1.jsonl").write_text(lines)
        for attempt in (*gone, *stays):
            (tmp_path / ".attempts" / attempt).mkdir(parents=True)
            (tmp_path / ".attempts" / attempt / "scores.h5").touch()
        return "9"

    pool._submitter.send = send  # type: ignore[method-assign]
    with pool:
        (outcome,) = pool.run(work, tmp_path / "plan.json", "predict", [Slice(0, 1)])
    assert outcome.usage is not None
    assert (outcome.exit_code, outcome.usage["exit_class"]) == (30, "lost")
    left = {folder.name for folder in (tmp_path / ".attempts").iterdir()}
    assert left == stays


def test_an_element_that_waits_is_not_lost_whatever_the_queue_lists(
    commands: Callable[..., Path], tmp_path: Path
) -> None:
    """A site may give jobs other names: asked by its id, the element waits, and nothing is submitted again."""
    script = "echo >> asked; [ $(wc -l < asked) -lt 3 ] && echo JobState=PENDING || echo JobState=CANCELLED"
    folder = commands(squeue="", sbatch="echo >> sent; echo 7", scontrol=script)
    pool = ArrayJobs(params("slurm", poll_s=0.01, grace_s=0, limit=5), root=tmp_path, workers=0, threads=1)
    with pool:
        (outcome,) = pool.run(work, tmp_path / "plan.json", "predict", [Slice(0, 1)])
    assert outcome.usage is not None
    assert outcome.usage["exit_class"] == "cancelled"
    assert len((folder / "asked").read_text().splitlines()) == 4, "twice it waits, and once more for the cause"
    assert len((folder / "sent").read_text().splitlines()) == 1


def test_a_driver_stops_where_there_is_a_newer_one(commands: Callable[..., Path], tmp_path: Path) -> None:
    """A driver whose run was started elsewhere submits nothing, and does not touch the arrays of the other driver."""
    commands(squeue="")
    pool = ArrayJobs(params("slurm"), root=tmp_path, workers=0, threads=1).__enter__()
    pool._log.append("cancel")
    pool._log.append("driver", host="elsewhere", pid=1, born="1")
    pool._log.append("intent", name="later")
    outcomes = list(pool.run(work, tmp_path / "plan.json", "predict", [Slice(0, 2)]))
    pool.__exit__(KeyboardInterrupt)
    assert [(outcome.task, outcome.usage["exit_class"]) for outcome in outcomes] == [(0, "cancelled"), (1, "cancelled")]
    history = pool._log.read()
    assert (history.cancelled, history.left, history.jobs) == (False, False, (jobs.Job("later", ""),))


def test_a_run_without_arrays_cannot_be_cancelled(tmp_path: Path) -> None:
    """The message names the folder and the remedy."""
    with pytest.raises(InputError, match="submitted no array jobs"):
        jobs.cancel(tmp_path)


@pytest.mark.parametrize("value", ["", "undefined"])
def test_an_element_needs_its_index(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, value: str) -> None:
    """Outside of an array job the command is refused with the reason."""
    monkeypatch.setenv("SGE_TASK_ID", value)
    table = tmp_path / "t.json"
    table.write_text('{"index": "SGE_TASK_ID", "base": 1, "elements": 1}')
    with pytest.raises(InputError, match="SGE_TASK_ID"):
        element.run(table)


def test_an_element_beyond_the_table_has_nothing_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Where arrays need two elements, the second element of an array of one ends without an error."""
    monkeypatch.setenv("PBS_ARRAY_INDEX", "2")
    table = tmp_path / "t.json"
    table.write_text('{"index": "PBS_ARRAY_INDEX", "base": 1, "elements": 1}')
    assert element.run(table) == 0


@pytest.mark.parametrize(
    ("name", "refusal"),
    [
        ("slurm", "sbatch: error: invalid partition specified: nowhere"),
        (
            "slurm",
            "sbatch: error: Batch job submission failed: Invalid account or account/partition combination",
        ),
        ("sge", 'Unable to run job: Job was rejected because job requests unknown queue "nowhere"'),
        ("pbs", "qsub: Unknown queue"),
        ("lsf", "nowhere: No such queue. Job not submitted."),
    ],
)
def test_a_refusal_that_no_waiting_cures_is_known(name: str, refusal: str) -> None:
    """It is not taken for a queue that is full, which is."""
    dialect = compose_config([f"executor={name}_array"]).executor.array.dialect
    assert re.search(dialect.wrong, refusal)
    assert not re.search(dialect.full, refusal)
    assert not re.search(dialect.wrong, "sbatch: error: AssocMaxSubmitJobLimit")
