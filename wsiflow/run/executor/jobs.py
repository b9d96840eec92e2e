"""The array jobs of a run: the log of them in the run's folder, and the commands of the scheduler.

Each event is appended to ``jobs.jsonl`` before it has an effect. `driver` is written when a process starts to drive the
run, and `left` when it stops; `intent` before an array is submitted, with its unique name, and `job` after, with the
scheduler's id; `ended` when no outcome of the array is expected any more; and `cancel` when the run is cancelled. Where
the driver was killed between `intent` and `job`, the array is found in the queue by its name. Only the last driver
submits arrays: an earlier one that still runs on another machine reads the log and stops.
"""

import contextlib
import getpass
import json
import logging
import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from wsiflow.errors import EnvironmentFault, InputError
from wsiflow.run.executor import pieces
from wsiflow.run.executor.dialect import Dialect, Place, Seen, expand
from wsiflow.system import processes, publish
from wsiflow.system.usage import now

_logger = logging.getLogger(__name__)

LOG = "jobs.jsonl"

_CALL_S = 120.0
_DRIVER_S = 10.0
_SUBMISSION_S = 1.0
_POLL_S = 0.05


Answer = subprocess.CompletedProcess[str]
"""What a command of a scheduler printed, and its exit code."""


class Job(NamedTuple):
    """An array that may still be in the queue.

    Attributes:
        name: Its unique name.
        job: The scheduler's id; empty where it was not noted.
    """

    name: str
    job: str


class History(NamedTuple):
    """The state of a run according to its log.

    Attributes:
        driver: The line of the last driver; empty where there was none.
        left: Whether that driver has stopped; its process may go on.
        cancelled: Whether the run was cancelled after that driver started.
        jobs: Arrays of which outcomes are still expected.
    """

    driver: Mapping[str, Any]
    left: bool
    cancelled: bool
    jobs: tuple[Job, ...]

    def is_driven_by(self, process: Mapping[str, Any]) -> bool:
        """Tell whether the last driver is a given process, see `identity`."""
        return bool(self.driver) and processes.from_record(process) == processes.from_record(self.driver)


class JobLog:
    """The log of the array jobs of one run."""

    def __init__(self, root: Path) -> None:
        """Open the log of a run's folder; nothing is read or written yet."""
        self.path = root / LOG

    def append(self, event: str, **facts: Any) -> None:
        """Append an event; it is on disk before this returns."""
        publish.append_line(self.path, json.dumps({"event": event, "at": now(), **facts}), sync=True)

    def lines(self) -> list[dict[str, Any]]:
        """Return every complete line."""
        if not self.path.exists():
            return []
        return parse(self.path.read_bytes())

    def read(self) -> History:
        """Return the state that follows from all lines."""
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
    """Return the complete JSON lines; an incomplete line of a killed process is ignored."""
    lines = []
    for line in data.splitlines():
        with contextlib.suppress(ValueError):
            lines.append(json.loads(line))
    return lines


def _absent(command: str) -> EnvironmentFault:
    remedy = "run on a machine that submits jobs, with the scheduler's commands in PATH"
    return EnvironmentFault(f"there is no command {command}", remedy, stage="executor")


def found(pattern: str, text: str, name: str) -> str:
    """Return what a pattern finds under a name, empty where it finds nothing."""
    match = re.search(pattern, text, re.MULTILINE) if pattern else None
    return (match[name] or "") if match else ""


def is_here(command: str) -> bool:
    """Tell whether this machine has a command."""
    return shutil.which(command) is not None


def call(command: Sequence[str], environ: Mapping[str, str] | None = None) -> Answer:
    """Run a command of a scheduler; where it exceeds the time limit, it counts as failed.

    Args:
        command: The command.
        environ: Its environment; None for that of this process.

    Raises:
        EnvironmentFault: There is no such command on this machine.
    """
    try:
        return subprocess.run(
            command,
            capture_output=True,
            text=True,
            errors="replace",  # names of other users' jobs may have any encoding
            timeout=_CALL_S,
            check=False,
            stdin=subprocess.DEVNULL,
            env=environ,
        )
    except FileNotFoundError as error:
        raise _absent(command[0]) from error
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, 1, "", f"no answer in {_CALL_S:.0f} s")


def require_answer(dialect: Dialect) -> None:
    """Check that the scheduler answers, once at the start; later on, a silent scheduler is waited for.

    Raises:
        EnvironmentFault: It does not answer, or this machine lacks one of its commands.
    """
    for command in (dialect.queue[0], dialect.submit[0], dialect.cancel[0]):
        if not is_here(command):
            raise _absent(command)
    if not is_here(dialect.inspect[0]):
        text = "there is no command %s on this machine: why elements die is known from what they write alone"
        _logger.warning(text, dialect.inspect[0])
    answer = _ask(dialect, ["wsiflow"])
    if answer.returncode and not means_nothing(dialect, answer):
        reason = ((answer.stderr or answer.stdout).strip().splitlines() or [f"exit code {answer.returncode}"])[-1]
        remedy = f"see that {answer.args[0]} works on this machine, then run again"
        raise EnvironmentFault(f"{dialect.name} does not answer ({reason})", remedy, stage="executor")


def listing(dialect: Dialect, names: Iterable[str]) -> dict[Place, Seen] | None:
    """Return the elements of some arrays that the scheduler lists, or None where it does not answer."""
    requested = sorted(names)
    if not requested:
        return {}
    answer = _ask(dialect, requested)
    if answer.returncode and not means_nothing(dialect, answer):
        return None
    return {place: seen for place, seen in dialect.listed(answer.stdout).items() if place.name in set(requested)}


def drop(dialect: Dialect, natives: Sequence[str]) -> None:
    """Cancel arrays or elements.

    Raises:
        EnvironmentFault: The scheduler refused.
    """
    if not natives:
        return
    answer = call(expand(dialect.cancel, {"jobs": list(natives)}))
    if answer.returncode and not means_nothing(dialect, answer):
        cause = f"{dialect.name} did not cancel {' '.join(natives)}: {answer.stderr.strip()}"
        raise EnvironmentFault(cause, "cancel again when the scheduler answers")


def cancel(root: Path) -> list[str]:
    """Cancel a run by its folder alone: end its driver, where that runs on this machine, and cancel its arrays.

    Returns:
        A sentence for each step.

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
    pieces.close(root)
    sentences = [_end_driver(history)]  # before the arrays: the driver would submit cancelled tasks again
    dialect = Dialect.model_validate(driver["dialect"])
    return sentences + drop_open(log, dialect)


def may_be_left(root: Path) -> str:
    """Return what is to be said where it is not known whether a run's jobs were cancelled."""
    return f"jobs may still be in the queue, end them with wsiflow cancel {root}"


def await_submissions(log: JobLog) -> None:
    """Wait a moment until arrays that are being submitted have ids; they may not be in the queue before."""
    end = time.monotonic() + _SUBMISSION_S
    while any(not job.job for job in log.read().jobs) and time.monotonic() < end:
        time.sleep(_POLL_S)


def drop_open(log: JobLog, dialect: Dialect) -> list[str]:
    """Cancel every array of which outcomes are still expected.

    An array without an id that is not in the queue may be about to be submitted. It stays open in the log, so that it
    is searched again.

    Returns:
        A sentence for each cancelled array.

    Raises:
        EnvironmentFault: The scheduler does not answer.
    """
    jobs = log.read().jobs
    elements = listing(dialect, [job.name for job in jobs])
    if elements is None:
        remedy = f"when it does, cancel again: wsiflow cancel {log.path.parent}"
        raise EnvironmentFault(f"{dialect.name} does not answer", remedy, path=log.path)
    alive: dict[str, list[str]] = {}
    for place, element in elements.items():
        if dialect.is_alive(element.state) or dialect.is_stuck(element.state):
            alive.setdefault(place.name, []).append(element.job)
    natives = {name: dialect.whole.format(job=ids[0]) for name, ids in alive.items()}
    drop(dialect, sorted(natives.values()))
    listed = {place.name for place in elements}
    for job in jobs:
        if job.job or job.name in listed:
            log.append("ended", name=job.name)
    return [
        f"{name}: {natives[name]} was cancelled, {len(ids)} of its elements were waiting or running"
        for name, ids in alive.items()
    ]


def identity() -> dict[str, Any]:
    """Return what identifies this process, also among later processes with the same number."""
    return processes.current()._asdict()


def _ask(dialect: Dialect, names: Sequence[str]) -> Answer:
    return call(expand(dialect.queue, {"names": ",".join(names), "user": _user()}))


def _user() -> str:
    """Return the user's name, or the user's number where the system has no name for it, as in containers."""
    try:
        return getpass.getuser()
    except (KeyError, OSError, ImportError):
        return str(os.getuid())


def means_nothing(dialect: Dialect, answer: subprocess.CompletedProcess[str]) -> bool:
    """Tell whether a failed command only reports that there is no such job."""
    complaints = [line for line in (answer.stderr + answer.stdout).splitlines() if line.strip()]
    pattern = re.compile(dialect.nothing) if dialect.nothing else None
    return pattern is not None and bool(complaints) and all(pattern.search(line) for line in complaints)


def require_alone(log: JobLog) -> None:
    """Refuse to drive a run that another process of this machine drives.

    Raises:
        EnvironmentFault: Another process does.
    """
    history = log.read()
    if _drives_here(history):
        host, pid = history.driver["host"], history.driver["pid"]
        cause = f"process {pid} on {host} drives this run already"
        raise EnvironmentFault(cause, f"wait for it, or end it: wsiflow cancel {log.path.parent}", path=log.path)


def _drives_here(history: History) -> bool:
    """Tell whether the last driver is another process of this machine and PID namespace, and still runs."""
    if not history.driver or history.left:
        return False
    driver = processes.from_record(history.driver)
    return (
        processes.is_observable(driver)
        and driver.pid != os.getpid()
        and processes.start_ticks(driver.pid) == driver.born
    )


def _end_driver(history: History) -> str:
    """End the driver of a run, and return a sentence that says what became of it."""
    driver = processes.from_record(history.driver)
    if not processes.is_observable(driver) and not history.left:
        return f"the driver was started on {driver.host}, or in another container: it stops by itself, or has ended"
    if not _drives_here(history):
        return "the driver had ended before"
    processes.end(driver, patience_s=_DRIVER_S)
    return f"the driver, process {driver.pid}, was ended"
