"""The Dask executor on local workers, on a cluster at an address, and on a real Slurm."""

import csv
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from dask import config
from distributed import Client, LocalCluster
from slice_work import die_at_7, square, tell_pid_and_wait
from small_runs import digests, over

from flows import jobqueue
from flows.cluster import cluster
from wsiflow.errors import EnvironmentFault, InputError
from wsiflow.run import executor
from wsiflow.run.executor import dask_jobs, lifetime
from wsiflow.run.executor.params import DaskParams, ExecutorParams
from wsiflow.run.executor.protocol import Executor, Outcome, Slice
from wsiflow.system import publish

HERE = Path(__file__)


def slices(count: int, each: int = 1) -> list[Slice]:
    return [Slice(lo, min(lo + each, count)) for lo in range(0, count, each)]


def params(workers: int = 2, threads: int = 1, **dask: object) -> ExecutorParams:
    return ExecutorParams(kind="dask", workers=workers, threads=threads, slice_s=0, dask=DaskParams(**dask))


@contextmanager
def dask(chosen: ExecutorParams) -> Iterator[tuple[Client, Executor]]:
    with (
        cluster(chosen, cores=2, root=HERE.parent) as client,
        executor.make(chosen, cores=2, root=HERE.parent, client=client) as pool,
    ):
        assert client is not None
        yield client, pool


def published(out: Path) -> dict[str, str]:
    return {name: value for name, value in digests(out).items() if not name.startswith("logs/")}


@pytest.fixture(scope="module")
def local() -> Iterator[tuple[Client, Executor]]:
    """Two local workers that use three threads each."""
    with dask(params(threads=3, window=3)) as both:
        yield both


def test_every_task_ends_once(local) -> None:
    """Four threads that run fifty tasks each get fifty outcomes each, and the scheduler keeps nothing."""
    _, pool = local
    found: dict[int, list[Outcome]] = {}

    def shard(number: int) -> None:
        found[number] = sorted(pool.run(square, HERE, "stage", slices(50, 3)))

    threads = [threading.Thread(target=shard, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for outcomes in found.values():
        assert [(o.task, o.receipt) for o in outcomes] == [(i, {"square": i**2, "threads": "3"}) for i in range(50)]
        assert {o.usage["native_id"] for o in outcomes} <= {"0", "1"}
        assert all(o.usage["submitted"] for o in outcomes)
    assert len(found) == 4
    assert pool._flying == 0


def test_no_more_in_flight_than_the_window(local, tmp_path: Path) -> None:
    """The scheduler never has more than three slices per worker, however many threads submit slices."""
    client, pool = local
    seen: list[int] = []
    ended = threading.Event()

    def count() -> None:
        while not ended.is_set():
            seen.append(client.run_on_scheduler(lambda dask_scheduler: len(dask_scheduler.tasks)))
            time.sleep(0.02)

    threads = [threading.Thread(target=count)]
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
        work = threading.Thread(target=lambda f=folder: list(pool.run(tell_pid_and_wait, f, "s", slices(8))))
        threads.append(work)
    for thread in threads:
        thread.start()
    for thread in threads[1:]:
        thread.join()
    ended.set()
    threads[0].join()
    assert 4 <= max(seen) <= 6 + 2, "two may be released while others are submitted"
    assert [len(list(folder.iterdir())) for folder in folders] == [8, 8]


def test_the_first_slices_start_first(local, tmp_path: Path) -> None:
    """Slices start in the order given, so that the longest, which come first, do not end last."""
    _, pool = local
    list(pool.run(tell_pid_and_wait, tmp_path, "stage", slices(10)))
    begun = sorted(range(10), key=lambda index: (tmp_path / f"{index}").stat().st_mtime_ns)
    assert all(abs(begun.index(index) - index) <= 3 for index in range(10)), begun


def test_a_worker_killed_at_work_loses_nothing(local, tmp_path: Path) -> None:
    """The slice of a killed worker goes to another worker, and every task has one outcome."""
    _, pool = local
    outcomes: list[Outcome] = []
    thread = threading.Thread(target=lambda: outcomes.extend(pool.run(tell_pid_and_wait, tmp_path, "s", slices(10, 2))))
    thread.start()
    pid_file = tmp_path / "1"
    while not (pid_file.exists() and pid_file.read_text()):
        time.sleep(0.02)
    os.kill(int(pid_file.read_text()), signal.SIGKILL)
    thread.join()
    assert sorted(o.task for o in outcomes if not o.retried) == list(range(10))
    assert all(o.receipt is not None for o in outcomes if not o.retried)
    assert len((tmp_path / "1").read_text().split()) == 2, "it was done again"


def test_a_task_that_kills_its_worker_fails_alone(local) -> None:
    """Its neighbours succeed; the task is named with the reason, and the workers go on."""
    _, pool = local
    outcomes = list(pool.run(die_at_7, HERE, "predict", slices(12, 3)))
    last = sorted(o for o in outcomes if not o.retried)
    assert [o.task for o in last] == list(range(12))
    assert [o.task for o in last if o.receipt is None] == [7]
    assert "worker process died" in last[7].failure.cause
    assert (last[7].exit_code, last[7].usage["exit_class"]) == (30, "killed")
    assert {6, 7, 8} <= {o.task for o in outcomes if o.retried}
    assert len(list(pool.run(square, HERE, "predict", slices(3)))) == 3


def test_a_worker_beyond_its_memory_is_named(local, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the limit and the settings that help; what a nanny has told is heard."""
    client, pool = local
    limit_mb = next(iter(client.scheduler_info()["workers"].values()))["memory_limit"] // 1_000_000
    told = [(time.time() + 600, {"worker": "elsewhere", "pid": 1, "rss": 1})]
    monkeypatch.setattr(client, "get_events", lambda topic: told if topic == "worker-restart-memory" else [])
    outcomes = list(pool.run(die_at_7, HERE, "predict", slices(12, 3)))
    (last,) = (o for o in outcomes if o.failure and not o.retried)
    assert last.usage["exit_class"] == "memory"
    assert f"exceeded its memory limit, {limit_mb} MB, each time" in last.failure.cause
    assert last.failure.remedy.startswith("raise executor.dask.cluster_kwargs.memory_limit or lower tiles.memory_mb")


def test_a_worker_that_is_nearly_full_goes_on(local) -> None:
    """It would pause until results are spilled to disk, but holds none, and the run would wait for ever."""
    client, _ = local
    found = client.run(lambda dask_worker: dask_worker.memory_manager.memory_pause_fraction)
    assert set(found.values()) == {False}


def test_what_cannot_be_submitted_keeps_no_place(local, monkeypatch: pytest.MonkeyPatch) -> None:
    """A slice that cannot be submitted gives its place back, as does a caller that stops."""
    client, pool = local
    with monkeypatch.context() as patched:
        patched.setattr(client, "submit", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            list(pool.run(square, HERE, "stage", slices(9)))
    outcomes = pool.run(square, HERE, "stage", slices(9))
    next(outcomes)
    outcomes.close()
    assert pool._flying == 0


def test_a_scheduler_that_ends_is_one_clear_error(tmp_path: Path) -> None:
    """A run at an address ends with one error and its remedy, and does not wait for ever."""
    with LocalCluster(n_workers=1, threads_per_worker=1, dashboard_address=None, host="127.0.0.1") as lent:
        chosen = params(address=lent.scheduler_address)
        with cluster(chosen, cores=2, root=HERE.parent) as client:
            assert client is not None
            client._timeout = 1
            with executor.make(chosen, cores=2, root=tmp_path, client=client) as pool:
                outcomes = pool.run(tell_pid_and_wait, tmp_path, "stage", slices(100))
                next(outcomes)
                lent.close()
                with pytest.raises(EnvironmentFault, match=r"connection to the Dask scheduler is lost; .*run again"):
                    list(outcomes)


def test_of_a_lent_worker_the_run_is_charged_what_it_uses(tmp_path: Path) -> None:
    """A worker of a cluster at an address lived before, and lives on."""
    with LocalCluster(n_workers=1, threads_per_worker=1, dashboard_address=None, host="127.0.0.1") as lent:
        chosen = params(threads=3, address=lent.scheduler_address)
        began_s = time.monotonic()
        with cluster(chosen, cores=2, root=HERE.parent) as client:
            with executor.make(chosen, cores=2, root=tmp_path, client=client) as pool:
                list(pool.run(square, HERE, "stage", slices(3)))
            used_s = time.monotonic() - began_s
            (life,) = lifetime.read(tmp_path)
    assert life.cores == 3
    assert 0 < life.lived_s < used_s


def test_what_does_not_start_is_named() -> None:
    """A missing class, wrong keywords, and an address that does not answer or is given beside a class are named."""
    with pytest.raises(ValueError, match="cluster_kwargs and adapt_kwargs must be empty"):
        DaskParams(address="tcp://127.0.0.1:9", cluster="distributed.LocalCluster")
    with (
        pytest.raises(InputError, match=r"executor\.dask\.cluster is distributed\.Nowhere"),
        dask(params(cluster="distributed.Nowhere")),
    ):
        pass
    with (
        pytest.raises(InputError, match=r"refuses executor\.dask\.cluster_kwargs: security must be"),
        dask(params(cluster_kwargs={"security": "yes"})),
    ):
        pass
    with (
        config.set({"distributed.comm.timeouts.connect": "1s"}),
        pytest.raises(EnvironmentFault, match=r"no Dask scheduler answers at tcp://127\.0\.0\.1:9"),
        dask(params(address="tcp://127.0.0.1:9")),
    ):
        pass


@pytest.mark.skipif(os.geteuid() != 0, reason="a mount of its own needs root")
def test_workers_without_semaphores_name_the_shared_memory(tmp_path: Path) -> None:
    """Dask says that a nanny failed to start, and means that /dev/shm is read-only."""
    code = "import sys; from pathlib import Path; sys.path[:0] = sys.argv[2:]\n"
    code += "from test_dask import *\nfrom flows.terminal import bounded\nroot = Path(sys.argv[1])\n"
    code += "if __name__ == '__main__':\n"
    code += "    with cluster(params(workers=1), cores=1, root=root): print('started')"
    (tmp_path / "start.py").write_text(code)
    mounted = f'mount -t tmpfs -o ro none /dev/shm && exec "{sys.executable}" "$@"'
    command = ["unshare", "-m", "sh", "-c", mounted, "sh", tmp_path / "start.py", tmp_path, *HERE.parents[:3]]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.stderr.startswith(("mount:", "unshare:")):
        pytest.skip(done.stderr)
    message = "/dev/shm: worker processes cannot be started (Read-only file system); mount it for writing, or take exec"
    assert message in done.stderr.splitlines()[-1]


def test_slurm_jobs_do_not_change_a_byte(
    slurm: dict[str, str], small_slides: Path, expected: dict[str, str], tmp_path: Path
) -> None:
    """dask-jobqueue on a real Slurm gives the same bytes, with TLS and logs in the run's folder, and leaves no job."""
    env = os.environ | slurm
    out = tmp_path / "run"
    more = ["executor=dask_slurm", "executor.workers=2", "executor.dask.cluster_kwargs.memory=2GB"]
    more += ["+executor.dask.cluster_kwargs.interface=lo", "executor.dask.cluster_kwargs.walltime=00:10:00"]
    command = [Path(sys.executable).parent / "wsiflow", "run", *over(small_slides, out, *more)]
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert published(out) == expected
    with (out / "trace.csv").open(newline="") as stream:
        names = {row["native_id"] for row in csv.DictReader(stream)}
    assert names == {"SLURMCluster-0", "SLURMCluster-1"}
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert list((out / ".attempts").iterdir()) == [], "no certificate is left"
    queue = subprocess.run(["squeue", "-h", "-t", "PD,R"], env=env, capture_output=True, text=True, check=True)
    assert queue.stdout == ""
    jobs = subprocess.run(["scontrol", "show", "job"], env=env, capture_output=True, text=True, check=True).stdout
    times = re.findall(r"JobName=run-dask.*?RunTime=00:(\d+):(\d+)", jobs, re.DOTALL)
    bill = sum(60 * int(minutes) + int(seconds) for minutes, seconds in times)
    summary = json.loads((out / "evaluation/summary.json").read_text())
    assert summary["cost.allocated_core_s"] == pytest.approx(bill, rel=0.03, abs=2 * len(times))


@pytest.mark.parametrize(
    ("walltime", "options"),
    [
        ("04:00:00", ["--lifetime", "13800s", "--lifetime-stagger", "300s"]),
        ("1-12", ["--lifetime", "129000s", "--lifetime-stagger", "300s"]),
        ("30", ["--lifetime", "1500s", "--lifetime-stagger", "150s"]),
        ("some", []),
    ],
)
def test_workers_end_before_their_walltime(walltime: str, options: list[str], tmp_path: Path) -> None:
    """So long before that they hand over their work; what the user says of it is kept."""

    class Cluster:
        job_cls = object

    given = {"walltime": walltime, "worker_extra_args": ["--no-dashboard"]}
    found = jobqueue.keywords(Cluster, given | {"n_workers": 3}, tmp_path)
    assert found["worker_extra_args"] == ["--no-dashboard", *options]
    assert "n_workers" not in found, "one is started first"
    own = {"walltime": walltime, "worker_extra_args": ["--lifetime=1h"]}
    assert jobqueue.keywords(Cluster, own, tmp_path)["worker_extra_args"] == ["--lifetime=1h"]


_A_DRIVER = """
import sys, time
from pathlib import Path
sys.path[:0] = sys.argv[2:]
from flows.cluster import cluster
from test_dask import of_jobs
with cluster(of_jobs(Path(sys.argv[1])), cores=2, root=Path(sys.argv[1])):
    print("ready", flush=True)
    time.sleep(600)
"""


def of_jobs(root: Path, **changed: object) -> ExecutorParams:
    """One worker that is a Slurm job."""
    keywords = {
        "cores": 1,
        "memory": "500MB",
        "walltime": "00:10:00",
        "interface": "lo",
        "security": True,
        "protocol": "tls://",
        "scheduler_options": {"dashboard_address": "127.0.0.1:0"},
        "shared_temp_directory": str(root / publish.ATTEMPTS),
        "log_directory": str(root),
    }
    return params(workers=1, cluster="dask_jobqueue.SLURMCluster", cluster_kwargs=keywords | changed)


def slurm_of(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    return lambda *command: subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_jobs_that_will_never_start_end_the_run(slurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One job is submitted first: why it is refused, or will never start, is said at once, and none stays."""
    call = slurm_of(slurm, monkeypatch)
    refused = pytest.raises(
        EnvironmentFault, match=r"submits no workers: .*Invalid partition name.*; correct executor\.d"
    )
    with refused, cluster(of_jobs(tmp_path, queue="nowhere"), cores=2, root=tmp_path):
        pass
    never = pytest.raises(EnvironmentFault, match=r"would never start: Partition\w+; correct executor\.dask")
    call("scontrol", "update", "PartitionName=main", "MaxTime=5")
    try:
        with never, cluster(of_jobs(tmp_path), cores=2, root=tmp_path):
            pass
    finally:
        call("scontrol", "update", "PartitionName=main", "MaxTime=UNLIMITED")
    monkeypatch.setenv("PATH", str(tmp_path))
    absent = pytest.raises(EnvironmentFault, match="submits no workers: there is no command sbatch on this machine")
    with absent, cluster(of_jobs(tmp_path), cores=2, root=tmp_path):
        pass
    monkeypatch.undo()
    assert dask_jobs.open_jobs(tmp_path) == []
    assert list((tmp_path / publish.ATTEMPTS).iterdir()) == [], "no certificate is left"


def test_jobs_that_grid_engine_will_never_start_end_the_run(
    sge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes jobs that it can never run, and those whose folder is missing; why is said at once, and none stays."""
    call = slurm_of(sge, monkeypatch)
    keywords = {"cores": 1, "memory": "500MB", "walltime": "00:10:00", "interface": "lo"}
    keywords |= {"log_directory": str(tmp_path), "shared_temp_directory": str(tmp_path / publish.ATTEMPTS)}
    for option, reason in (("-wd /absent", "can't chdir to /absent"), ("-pe smp 900", 'cannot run in PE "smp"')):
        more = {"job_directives_skip": ["-cwd"], "job_extra_directives": [option]}
        chosen = params(workers=1, cluster="dask_jobqueue.SGECluster", cluster_kwargs=keywords | more)
        never = pytest.raises(EnvironmentFault, match=f"would never start: .*{reason}")
        with never, cluster(chosen, cores=2, root=tmp_path):
            pass
    assert dask_jobs.open_jobs(tmp_path) == []
    assert call("qstat") == ""


def test_jobs_of_a_killed_driver_are_cancelled(slurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the folder alone, and by the next start; jobs of a driver that may live are left to it."""
    call = slurm_of(slurm, monkeypatch)
    command = [sys.executable, "-c", _A_DRIVER, tmp_path, *map(str, HERE.parents[:3])]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as driver:
        assert any(line == "ready\n" for line in driver.stdout)
        (job,) = dask_jobs.open_jobs(tmp_path)
        assert dask_jobs.drop_left(tmp_path) == [], "its driver lives"
        driver.kill()
    assert job.job in call("squeue", "--noheader", "--format=%i|%j")
    dask_jobs.note(tmp_path, "1000001", ["true"])
    assert dask_jobs.drop_left(tmp_path) == [job.job]
    assert [one.job for one in dask_jobs.own(tmp_path)] == ["1000001"]
    assert jobqueue.cancel(tmp_path) == "1 Dask job cancelled", "as at Ctrl-C"
    assert jobqueue.cancel(tmp_path) is None
    publish.sweep_attempts(tmp_path)
    assert list((tmp_path / publish.ATTEMPTS).iterdir()) == [], "no certificate is left"
    states = call("scontrol", "--oneliner", "show", "job", job.job)
    assert not re.search("JobState=(PENDING|RUNNING)", states)
    assert f"JobName={tmp_path.name}-dask" in states
