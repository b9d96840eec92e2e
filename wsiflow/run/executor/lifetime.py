"""How long workers on a cluster live, and on how many cores: what a scheduler charges, idle and lost ones included.

Each worker has a small file in the folder ``workers`` of the run. It writes the file anew every few seconds, with the
seconds since the start of its job, so that the life of a worker that is killed is known too, but for the last of them:
half a second of a short life, a two-hundredth of a long one, since thousands of workers write to one disk. The driver
adds a file for an element of an array that was lost, with what the scheduler says of it: that counts instead of the
element's own file, which it has none of where it died before Python started.
"""

import json
import math
import os
import threading
import uuid
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple, Self

from wsiflow.errors import EnvironmentFault
from wsiflow.system import processes, publish
from wsiflow.system.machine import job_cores
from wsiflow.system.usage import now

FOLDER = "workers"
_PULSE_S = 0.5
_PULSE_SHARE = 1 / 200  # of the life so far


class Life(NamedTuple):
    """The life of a worker.

    Attributes:
        job: Name of the scheduler's job it is a part of; its own name where there is none.
        cores: Number of cores of the job, or of the worker where there is no job.
        lived_s: Seconds since the start of the job, or of the worker.
        charged: Whether this is what the scheduler says of the job.
    """

    job: str
    cores: int
    lived_s: float
    charged: bool = False


class Recorder:
    """Records the life of this process in a run's folder until it ends; a failure to do so harms nothing."""

    def __init__(self, root: Path, *, threads: int, job: str = "", lent: bool = False) -> None:
        """Begin to record.

        Args:
            root: The run's folder.
            threads: Number of cores that are charged where no scheduler names a number.
            job: Name by which the driver knows the job; empty for the scheduler's own.
            lent: Whether the worker, or its job, was there before the run: then only what the run uses of it is
                recorded.
        """
        who, own = processes.current(), "" if lent else job_name()
        name = "-".join((*map(str, who), uuid.uuid4().hex[:8]))
        cores = (job_cores(os.environ) if own else None) or threads
        facts = {"job": job or own or name, "cores": cores, "host": who.host, "pid": who.pid, "since": now()}
        self._facts = json.dumps(facts)
        self._earlier_s = 0.0 if lent else processes.age_s(of_session=bool(own))
        self._began_s, self._lock = processes.clock_s(), threading.RLock()  # a handler of a signal may end it
        self._ended, self._ends_soon = threading.Event(), threading.Event()
        self._file: int | None = None
        path = root / FOLDER / f"{name}.json"
        with suppress(OSError):
            path.parent.mkdir(exist_ok=True)
            self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        self._write()
        threading.Thread(target=self._pulse, name="lifetime", daemon=True).start()

    def __enter__(self) -> Self:
        """Return this recorder."""
        return self

    def __exit__(self, *_exc: object) -> None:
        """Record the end."""
        self.end()

    def end_soon(self) -> None:
        """Declare that somebody is about to end this process."""
        self._ends_soon.set()
        self._write()

    def end(self) -> None:
        """Record the end."""
        self._ended.set()
        self.end_soon()
        with self._lock, suppress(OSError):
            if self._file is not None:
                os.fsync(self._file)  # the driver may be on another machine, and reads it soon
                os.close(self._file)
            self._file = None

    def _pulse(self) -> None:
        while not self._ends_soon.wait(max(_PULSE_S, _PULSE_SHARE * self._lived_s())):
            self._write()
        while not self._ended.wait(_PULSE_S):
            self._write()

    def _lived_s(self) -> float:
        return self._earlier_s + processes.clock_s() - self._began_s

    def _write(self) -> None:
        """Write the file anew, in place: the text always has the same length."""
        text = f'{self._facts[:-1]}, "lived_s": {self._lived_s():12.2f}}}\n'
        with self._lock, suppress(OSError):
            if self._file is not None:
                os.pwrite(self._file, text.encode(), 0)


def note_charge(root: Path, name: str, life: Life) -> None:
    """Note what the scheduler says of a job, under a unique name; a failure to do so harms nothing."""
    with suppress(EnvironmentFault):
        publish.write_view(root, f"{FOLDER}/{name}.json", json.dumps(life._asdict()).encode())


def read(root: Path) -> list[Life]:
    """Return the lives of the workers that have recorded theirs in a run's folder."""
    lives = []
    for path in (root / FOLDER).glob("*.json"):
        with suppress(OSError, ValueError):  # it has just been created
            line = json.loads(path.read_text(encoding="utf-8"))
            lives.append(Life(line["job"], line["cores"], line["lived_s"], line.get("charged", False)))
    return lives


def allocated_core_s(lives: Sequence[Life]) -> float:
    """Return the core-seconds that were allocated to workers; several of one job share its cores."""
    jobs: dict[str, tuple[bool, float]] = {}
    for life in lives:
        jobs[life.job] = max(jobs.get(life.job, (False, 0.0)), (life.charged, life.cores * life.lived_s))
    return math.fsum(core_s for _, core_s in jobs.values())


def job_name(environ: Mapping[str, str] = os.environ) -> str:
    """Return the scheduler's name of the job that this process is in, each start of it by itself; empty for none."""
    for names in (
        ("SLURM_JOB_ID", "SLURM_RESTART_COUNT"),
        ("PBS_JOBID",),
        ("LSB_JOBID", "LSB_JOBINDEX"),
        ("JOB_ID", "SGE_TASK_ID", "RESTARTED"),
    ):
        if environ.get(names[0]):
            return " ".join(f"{name}={environ.get(name, '')}" for name in names)
    return ""
