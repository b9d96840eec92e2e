"""The array jobs of a run, as its folder remembers them and its scheduler knows them.

``jobs.jsonl`` is appended to before anything happens: a line for each process that runs the line (`driver`) and one
when it stops (`left`), one before an array is submitted (`intent`, with its unique name) and one after (`job`, with the
scheduler's id), one when nothing is expected of it any more (`ended`), and one when the run is cancelled (`cancel`).
What was killed between two lines is found again by the name. The last driver is the only one: an earlier one that still
runs, on another machine, submits nothing more.
"""

import contextlib
import getpass
import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from wsiflow.errors import EnvironmentFault, InputError
from wsiflow.run.executor.dialect import Dialect, Place, Seen, expand
from wsiflow.system import processes, publish
from wsiflow.system.usage import now

LOG = "jobs.jsonl"

_CALL_S = 120.0
_DRIVER_S = 10.0
_SUBMISSION_S = 1.0
_LOOK_S = 0.05


class Job(NamedTuple):
    """An array that may still be in the queue.

    Attributes:
        name: Its unique name.
        job: The scheduler's id; empty where it was not noted.
    """

    name: str
    job: str


class History(NamedTuple):
    """What the log says.

    Attributes:
        driver: The line of the last driver, empty where there was none.
        left: That driver has stopped, though its process may go on.
        cancelled: The run was cancelled after that driver started.
        jobs: Arrays of which something is still expected.
    """

    driver: Mapping[str, Any]
    left: bool
    cancelled: bool
    jobs: tuple[Job, ...]

    def is_driven_by(self, process: Mapping[str, Any]) -> bool:
        """Tell whether the last driver is this process, see `identity`."""
        return bool(self.driver) and processes.from_record(process) == processes.from_record(self.driver)


class JobLog:
    """The log of one run."""

    def __init__(self, root: Path) -> None:
        """Name the run's folder."""
        self.path = root / LOG

    def append(self, event: str, **facts: Any) -> None:
        """Note an event, on disk before this returns."""
        publish.append_line(self.path, json.dumps({"event": event, "at": now(), **facts}), sync=True)

    def lines(self) -> list[dict[str, Any]]:
        """Return every whole line."""
        if not self.path.exists():
            return []
        return parse(self.path.read_bytes())

    def read(self) -> History:
        """Return what the lines add up to."""
        driver: dict[str, Any] = {}
        left = cancelled = False
        jobs: dict[str, Job] = {}
        for line in self.lines():
            match line["event"]:
                case "driver":
                    driver, left, cancelled = line, False, False
                case "left":
                    left = left or processes.from_record(line) == processes.from_record(driver)
                case "intent":
                    jobs[line["name"]] = Job(line["name"], "")
                case "job":
                    jobs[line["name"]] = Job(line["name"], line["job"])
                case "ended":
                    jobs.pop(line["name"], None)
                case "cancel":
                    cancelled = True
        return History(driver, left, cancelled, tuple(jobs.values()))


def parse(data: bytes) -> list[dict[str, Any]]:
    """Return the JSON lines that are whole; one that a killed process left torn is as if it had not been written."""
    found = []
    for line in data.splitlines():
        with contextlib.suppress(ValueError):
            found.append(json.loads(line))
    return found


def call(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Run a scheduler's command; one that does not answer in time failed.

    Raises:
        EnvironmentFault: There is no such command here.
    """
    try:
        return subprocess.run(
            command,
            capture_output=True,
            text=True,
            errors="replace",  # others name their jobs as they like
            timeout=_CALL_S,
            check=False,
            stdin=subprocess.DEVNULL,
        )
    except FileNotFoundError as error:
        remedy = "run on a machine that submits jobs, with the scheduler's commands in PATH"
        raise EnvironmentFault(f"there is no command {command[0]}", remedy, stage="executor") from error
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, 1, "", f"no answer in {_CALL_S:.0f} s")


def require_answer(dialect: Dialect) -> None:
    """See that there is a scheduler, before anything waits for it: later on, one that is silent is out for a while.

    Raises:
        EnvironmentFault: It does not answer.
    """
    answer = _ask(dialect, ["wsiflow"])
    if answer.returncode and not _means_nothing(dialect, answer):
        told = ((answer.stderr or answer.stdout).strip().splitlines() or [f"exit code {answer.returncode}"])[-1]
        remedy = f"see that {answer.args[0]} works on this machine, then run again"
        raise EnvironmentFault(f"{dialect.name} does not answer ({told})", remedy, stage="executor")


def listing(dialect: Dialect, names: Iterable[str]) -> dict[Place, Seen] | None:
    """Ask the scheduler for the elements of some arrays; None where it does not answer."""
    wanted = sorted(names)
    if not wanted:
        return {}
    answer = _ask(dialect, wanted)
    if answer.returncode and not _means_nothing(dialect, answer):
        return None
    return {place: seen for place, seen in dialect.listed(answer.stdout).items() if place.name in set(wanted)}


def drop(dialect: Dialect, natives: Sequence[str]) -> None:
    """Cancel arrays or elements.

    Raises:
        EnvironmentFault: The scheduler refused.
    """
    if not natives:
        return
    answer = call(expand(dialect.cancel, {"jobs": list(natives)}))
    if answer.returncode and not _means_nothing(dialect, answer):
        cause = f"{dialect.name} did not cancel {' '.join(natives)}: {answer.stderr.strip()}"
        raise EnvironmentFault(cause, "cancel again when it answers")


def cancel(root: Path) -> list[str]:
    """Cancel a run from its folder alone: its driver, where that runs on this machine, and its arrays.

    Returns:
        What was done, a sentence each.

    Raises:
        InputError: The run never submitted an array.
        EnvironmentFault: The scheduler does not answer.
    """
    log = JobLog(root)
    history = log.read()
    driver = history.driver
    if not driver:
        raise InputError("it submitted no array jobs", "name the out= folder of a run that did", path=root)
    log.append("cancel")
    said = [_end_driver(history)]  # first, or it would submit what is cancelled once more
    dialect = Dialect.model_validate(driver["dialect"])
    return said + drop_open(log, dialect)


def await_submissions(log: JobLog) -> None:
    """Wait until arrays that are being submitted have their ids, since they may not be in the queue before."""
    end = time.monotonic() + _SUBMISSION_S
    while any(not job.job for job in log.read().jobs) and time.monotonic() < end:
        time.sleep(_LOOK_S)


def drop_open(log: JobLog, dialect: Dialect) -> list[str]:
    """Cancel every array of which something is still expected, and return what was done.

    One whose submission may be under way, without an id and not in the queue, is left to be looked for again.

    Raises:
        EnvironmentFault: The scheduler does not answer.
    """
    jobs = log.read().jobs
    seen = listing(dialect, [job.name for job in jobs])
    if seen is None:
        raise EnvironmentFault(f"{dialect.name} does not answer", "cancel again when it does", path=log.path)
    alive: dict[str, list[str]] = {}
    for place, element in seen.items():
        if dialect.is_alive(element.state) or dialect.is_stuck(element.state):
            alive.setdefault(place.name, []).append(element.job)
    found = {name: dialect.whole.format(job=ids[0]) for name, ids in alive.items()}
    drop(dialect, sorted(found.values()))
    listed = {place.name for place in seen}
    for job in jobs:
        if job.job or job.name in listed:
            log.append("ended", name=job.name)
    return [
        f"{name}: {found[name]} cancelled, {len(ids)} elements were waiting or running" for name, ids in alive.items()
    ]


def identity() -> dict[str, Any]:
    """Return what tells this process from every other, later ones with its number included."""
    return processes.current()._asdict()


def _ask(dialect: Dialect, names: Sequence[str]) -> subprocess.CompletedProcess[str]:
    return call(expand(dialect.queue, {"names": ",".join(names), "user": _user()}))


def _user() -> str:
    """Return the user's name; the number of one that the system has no name for, as in containers."""
    try:
        return getpass.getuser()
    except (KeyError, OSError, ImportError):
        return str(os.getuid())


def _means_nothing(dialect: Dialect, answer: subprocess.CompletedProcess[str]) -> bool:
    """Tell whether a failure only says that there is no such job."""
    complaints = [line for line in (answer.stderr + answer.stdout).splitlines() if line.strip()]
    pattern = re.compile(dialect.nothing) if dialect.nothing else None
    return pattern is not None and bool(complaints) and all(pattern.search(line) for line in complaints)


def require_alone(log: JobLog) -> None:
    """Refuse to run the line where another process of this machine does.

    Raises:
        EnvironmentFault: It does.
    """
    history = log.read()
    if _drives_here(history):
        host, pid = history.driver["host"], history.driver["pid"]
        cause = f"process {pid} on {host} runs this line already"
        raise EnvironmentFault(cause, f"wait for it, or end it: wsiflow cancel {log.path.parent}", path=log.path)


def _drives_here(history: History) -> bool:
    """Tell whether the last driver is another process of this machine and PID namespace, and at it."""
    if not history.driver or history.left:
        return False
    driver = processes.from_record(history.driver)
    return (
        processes.is_observable(driver)
        and driver.pid != os.getpid()
        and processes.start_ticks(driver.pid) == driver.born
    )


def _end_driver(history: History) -> str:
    """End the process that runs the line, and say what became of it."""
    driver = processes.from_record(history.driver)
    if not processes.is_observable(driver) and not history.left:
        return f"the run was started on {driver.host}, or in another container: it will notice there, or has ended"
    if not _drives_here(history):
        return "the process that ran the line had ended"
    patience = time.monotonic() + _DRIVER_S
    with contextlib.suppress(ProcessLookupError):  # it ends by itself
        os.kill(driver.pid, signal.SIGTERM)
        while processes.start_ticks(driver.pid) == driver.born:
            if time.monotonic() > patience:
                os.kill(driver.pid, signal.SIGKILL)
            time.sleep(0.1)
    return f"process {driver.pid}, which ran the line, was ended"
