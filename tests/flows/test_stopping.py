"""Ctrl-C and SIGTERM on a real terminal: one line, nothing left behind, and the same command goes on."""

import os
import re
import signal
import sqlite3
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import psutil
import pytest
from serving import BIN, environment
from small_runs import digests, over

from flows import cli as command
from wsiflow.run import ledger
from wsiflow.run.executor import jobs

PATIENCE_S = 60  # on a busy machine; five seconds are meant
# Tasks that are small and many, so that the first has its receipt long before the last begins.
MANY = ["dataset.limit=1", "inference=window", "inference.batch=4", "dense.windows=0", "tiles=patch"]
MANY += ["tiles.group_tiles=1", "executor.slice_s=0", "store=none"]
ENDLESS = "inference.stride=16"  # for what nobody waits for
ARRAY = [f"executor.array.{it}" for it in ("poll_s=0.5", "grace_s=1", "memory_mb=900")]
_ON_A_TERMINAL = """
import fcntl, os, sys, termios
os.setsid()
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execvp(sys.argv[1], sys.argv[1:])
"""


class Running:
    """A command in a session of its own, in the foreground of a terminal of its own.

    Standard error is a file, unless it is to be on the terminal too, as for people.
    """

    def __init__(self, line: list[str], env: dict[str, str], folder: Path, *, watched: bool = False) -> None:
        self._keyboard, terminal = os.openpty()
        self._errors = folder / "stderr"
        self._chunks: list[bytes] = []
        with self._errors.open("wb") as errors:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _ON_A_TERMINAL, *line],
                stdin=terminal,
                stdout=terminal,
                stderr=terminal if watched else errors,
                env=env,
                cwd=folder,
            )
        os.close(terminal)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self._started: set[psutil.Process] = set()

    def wait_for(self, condition: Callable[[], object]) -> None:
        end = time.monotonic() + 4 * PATIENCE_S
        while not condition():
            assert self._process.poll() is None, f"it ended too early: {self.output} {self.errors}"
            assert time.monotonic() < end, "it did not happen in time"
            time.sleep(0.02)
        self._started |= set(psutil.Process(self._process.pid).children(recursive=True))

    def stop(self, number: int) -> int:
        """Press Ctrl-C, or send SIGTERM; return the exit code, once every process is seen to be gone."""
        if number == signal.SIGINT:
            os.write(self._keyboard, b"\x03")
        else:
            self._process.send_signal(number)
        code = self.end()
        assert psutil.wait_procs(self._started, timeout=PATIENCE_S)[1] == []
        return code

    def end(self) -> int:
        code = self._process.wait(4 * PATIENCE_S)
        self._reader.join(PATIENCE_S)
        return code

    @property
    def errors(self) -> str:
        return self._errors.read_text()

    @property
    def output(self) -> str:
        return b"".join(self._chunks).decode()

    @property
    def started(self) -> list[psutil.Process]:
        return list(self._started)

    def close(self) -> None:
        for process in [*self._started, self._process]:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        self._process.wait()
        os.close(self._keyboard)

    def _read(self) -> None:
        while True:
            try:
                data = os.read(self._keyboard, 1 << 16)
            except OSError:  # nobody has the terminal open any more
                return
            self._chunks.append(data)


@pytest.fixture
def start(prefect_home: Path, tmp_path: Path) -> Iterator[Callable[..., Running]]:
    """Yield a function that starts commands on terminals, and end them with the test."""
    running: list[Running] = []

    def begin(*arguments: str, watched: bool = False, **more: str) -> Running:
        env = environment(prefect_home, **more)
        running.append(Running([str(BIN / "wsiflow"), *arguments], env, tmp_path, watched=watched))
        return running[-1]

    yield begin
    for one in running:
        one.close()


def receipts(out: Path, kind: str = "predictions") -> list[Path]:
    return list(out.glob(f"receipts/{kind}/**/*.json"))


def open_arrays(out: Path) -> tuple[jobs.Job, ...]:
    return jobs.JobLog(out).read().jobs


def many(manifest: Path, out: Path, *more: str) -> list[str]:
    return over(manifest, out, *MANY, *more)


@pytest.fixture(scope="module")
def expected(small_slides: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Return what a run publishes when nothing stops it."""
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    assert command.main(["run", *many(small_slides, out)]) == 0
    return digests(out)


WATCHED = {"TERM": "xterm", "WSIFLOW_PROGRESS_S": "1"}


def assert_display_is_gone(running: Running, first: str) -> None:
    """See that the display was shown, and that it was erased from the terminal before the last line."""
    assert re.search(r"predict .* of \d+.*0 of 1 slides, [\d,]+ of [\d,]+ tiles", running.output, re.DOTALL)
    assert running.output.rindex("\x1b[?25h") > running.output.rindex("\x1b[?25l"), "the cursor is back"
    lines, row, column = [""], 0, 0
    for sign in re.findall(r"\x1b\[[?\d;]*[A-Za-z]|.", running.output, re.DOTALL):
        if sign == "\x1b[1A":
            row -= 1
        elif sign == "\x1b[2K":
            lines[row] = ""
        elif sign == "\r":
            column = 0
        elif sign == "\n":
            row += 1
            lines += [""] * (row == len(lines))
        elif len(sign) == 1:
            lines[row] = lines[row][:column].ljust(column) + sign + lines[row][column + 1 :]
            column += 1
    left = [line for line in lines if line and not re.match(r"slides +\d+ found|skipped: ", line)]
    assert left[0].startswith(first), lines


LINE = re.compile(r"stopped: (\d+) tasks done, (\d+) left; the same command goes on\n")


def test_a_stopped_run_goes_on(
    start: Callable[..., Running], small_slides: Path, expected: dict[str, str], tmp_path: Path
) -> None:
    """Ctrl-C in the middle of the predictions ends the run, and a second start publishes the same bytes.

    Runs whose workers were killed are continued in test_line.
    """
    out = tmp_path / "run"
    running = start("run", *many(small_slides, out))
    running.wait_for(lambda: receipts(out))
    assert not running.started
    assert running.stop(signal.SIGINT) == 130
    assert_counted(running, out)
    running = start("run", *many(small_slides, out), watched=True, **WATCHED)
    assert running.end() == 0
    assert digests(out) == expected
    assert_display_is_gone(running, "slides     1 of 1")


def test_a_signal_ends_prefect_and_a_pool_with_one_line(
    start: Callable[..., Running], small_slides: Path, tmp_path: Path, prefect_home: Path
) -> None:
    """The temporary server and the workers, which a terminal's Ctrl-C reaches too, end and print nothing.

    The server ends after the run was shown as cancelled: it would be listed as running for good.
    """
    out = tmp_path / "run"
    more = ["executor=process", "executor.workers=2", "orchestrator=prefect", ENDLESS]
    running = start("run", *many(small_slides, out, *more))
    running.wait_for(lambda: receipts(out))
    assert running.started
    assert running.stop(signal.SIGINT) == 130
    assert_counted(running, out)
    with closing(sqlite3.connect(prefect_home / "prefect.db")) as database:
        assert database.execute("select name, state_name from flow_run").fetchall() == [("run", "Cancelled")]


def assert_counted(running: Running, out: Path) -> None:
    """See that the last line says how many tasks are done and left, and that nothing else was printed."""
    counted = LINE.fullmatch(running.errors)
    assert counted, running.errors
    done, left = map(int, counted.groups())
    assert done == len(receipts(out)) > 0
    assert left > 0
    assert "Traceback" not in running.output


def test_a_signal_ends_dask_and_leaves_no_display_behind(
    start: Callable[..., Running], small_slides: Path, tmp_path: Path
) -> None:
    """The cluster ends, and on a terminal the display is erased, so that only the one line remains."""
    out = tmp_path / "run"
    more = ["executor=dask", "executor.workers=1", ENDLESS]
    running = start("run", *many(small_slides, out, *more), watched=True, **WATCHED)
    running.wait_for(lambda: "0 of 1 slides, " in running.output and "tiles/s" in running.output and receipts(out))
    assert running.started
    assert running.stop(signal.SIGINT) == 130
    assert_display_is_gone(running, "stopped: ")
    last = re.search(LINE.pattern.replace("\\n", "\\r\\n$"), running.output)
    assert last, running.output
    done, left = map(int, last.groups())
    assert done == len(receipts(out)) > 0
    assert left > 0
    assert "Traceback" not in running.output


@pytest.mark.parametrize(("scheduler", "number"), [("slurm", 15), ("sge", 2)])
def test_a_signal_takes_array_jobs_along(
    start: Callable[..., Running],
    small_slides: Path,
    tmp_path: Path,
    request: pytest.FixtureRequest,
    scheduler: str,
    number: int,
) -> None:
    """Running and waiting elements are cancelled, and the line says so."""
    env, out = request.getfixturevalue(scheduler), tmp_path / "run"
    more = [f"executor={scheduler}_array", *ARRAY, ENDLESS]
    running = start("run", *many(small_slides, out, *more), **env)
    # An element that is idle ends by itself, and an array that is being submitted is not yet one to cancel.
    running.wait_for(lambda: receipts(out) and any("-predict-" in job.name and job.job for job in open_arrays(out)))
    assert running.stop(number) == 128 + number
    pattern = r"stopped: \d+ tasks done, [1-9]\d* left, [1-9]\d* array jobs? cancelled; the same command goes on\n"
    assert re.fullmatch(pattern, running.errors), running.errors
    queue = ["squeue", "-h", "-t", "PD,R"] if scheduler == "slurm" else ["qstat"]
    end = time.monotonic() + PATIENCE_S
    while subprocess.run(queue, env=os.environ | env, capture_output=True, check=True).stdout:
        assert time.monotonic() < end, "jobs are left in the queue"
        time.sleep(0.2)


def test_a_signal_ends_retry_and_plan_too(start: Callable[..., Running], small_slides: Path, tmp_path: Path) -> None:
    """A signal ends a plan that measures costs, then a run in its folder, then `retry` of that run."""
    out, more = tmp_path / "run", [ENDLESS, "executor=process", "executor.workers=1"]
    running = start("plan", *many(small_slides, out, *more), "--calibrate")
    running.wait_for((out / "plan.json").exists)
    assert running.stop(signal.SIGINT) == 130
    assert re.fullmatch(r"stopped: 0 tasks done, [1-9]\d* left; the same command goes on\n", running.errors)
    running = start("run", *many(small_slides, out, *more))
    running.wait_for(lambda: receipts(out))
    assert running.stop(signal.SIGTERM) == 143
    before = len(receipts(out))
    running = start("retry", str(out))
    running.wait_for(lambda: len(receipts(out)) > before)
    assert running.stop(signal.SIGINT) == 130
    assert LINE.fullmatch(running.errors), running.errors
    assert ledger.summary([tmp_path]) == "nothing was planned yet"


def test_a_signal_ends_a_whole_sweep(start: Callable[..., Running], small_slides: Path, tmp_path: Path) -> None:
    """The sweep ends, and its next trials are not started."""
    out = tmp_path / "sweep"
    running = start("run", "-m", *many(small_slides, out, ENDLESS, "seed=1,2,3"))
    running.wait_for(lambda: list(out.glob("*/receipts/predictions/*/*.json")))
    assert running.stop(signal.SIGINT) == 130
    assert LINE.fullmatch(running.errors), running.errors
    assert len(list(out.glob("*/plan.json"))) == 1


def test_trials_at_once_end_with_their_sweep(start: Callable[..., Running], small_slides: Path, tmp_path: Path) -> None:
    """The processes of joblib end too, and print nothing."""
    out = tmp_path / "sweep"
    more = ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "seed=1,2,3", ENDLESS]
    running = start("run", "-m", *many(small_slides, out, *more))
    running.wait_for(lambda: list(out.glob("*/receipts/predictions/*/*.json")))
    assert running.stop(signal.SIGINT) == 130
    assert LINE.fullmatch(running.errors), running.errors
    assert "Traceback" not in running.output


STUBBORN = """
import sys, threading, time
from pathlib import Path
from wsiflow.flows import stopping
def clean():
    Path("cleaning").touch()
    time.sleep(600)
def command():
    jobs = stopping.at_stop(clean, unfinished="jobs may still be in the queue")
    with stopping.reporting(lambda: "1 tasks done, 2 left"), jobs, stopping.at_stop(lambda: None, unfinished="all"):
        Path("begun").touch()
        time.sleep(600)
sys.exit(stopping.run(command))
"""


@pytest.mark.parametrize("presses", [1, 2])
def test_a_second_signal_ends_it_at_once(tmp_path: Path, presses: int) -> None:
    """Cleaning up that hangs is given up after two seconds, or at once at a second signal; what is left is named."""
    (tmp_path / "stubborn.py").write_text(textwrap.dedent(STUBBORN))
    running = Running([sys.executable, str(tmp_path / "stubborn.py")], dict(os.environ), tmp_path)
    running.wait_for((tmp_path / "begun").exists)
    os.write(running._keyboard, b"\x03")
    if presses == 2:
        running.wait_for((tmp_path / "cleaning").exists)
        os.write(running._keyboard, b"\x03")
    assert running.end() == 130
    line = {1: "stopped: 1 tasks done, 2 left", 2: "stopped at once"}[presses]
    assert running.errors == f"{line}, jobs may still be in the queue; the same command goes on\n"
    running.close()


def test_what_sets_handlers_while_it_is_imported_is_called_by_the_thread_that_listens(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(
        "import os, signal, threading\n"
        "from wsiflow.flows import stopping\n"
        "def sets() -> None:\n"
        "    signal.signal(signal.SIGTERM, signal.SIG_DFL)\n"
        "def command() -> int:\n"
        "    stopping.in_main_thread(sets)\n"
        "    assert threading.current_thread() is not threading.main_thread()\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    threading.Event().wait()\n"
        "    return 0\n"
        "stopping.run(command)\n"
    )
    done = subprocess.run(
        [sys.executable, "own.py"], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=60
    )
    assert (done.returncode, done.stderr) == (143, "stopped\n")
