"""The resources that an attempt at a task used: time, memory and bytes, and the host on which it ran.

The counters belong to the whole process, so they describe one task as long as a worker does one at a time. The work
that a process does once, whatever its tasks (starting, importing, loading networks), is warm-up and counted separately.
What a run cost as a whole is the CPU time of all its processes, from their start on: a `Spending` measures it for the
process that drives the run and its descendants, and attempts report it for workers on other machines.
"""

import math
import os
import resource
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from wsiflow.system import processes

_IO = Path("/proc/self/io")


def now() -> str:
    """Return the current time as attempts record it: ISO 8601, UTC, milliseconds."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


class _Warmup:
    """The core-seconds that this process has spent on warm-up."""

    def __init__(self) -> None:
        self.core_s, self.reported_s, self.started, self.inside = 0.0, 0.0, False, False
        self.attempted_s = 0.0  # core-seconds of the process up to the last attempt that was executed

    def unreported_s(self) -> float:
        """Return the core-seconds of warm-up since the last call."""
        before, self.reported_s = self.reported_s, self.core_s
        return self.core_s - before

    def since_attempt_s(self) -> float:
        """Return the core-seconds of the process since the last call, those of its children that ended included."""
        before, self.attempted_s = self.attempted_s, math.fsum(os.times()[:4])
        return self.attempted_s - before


_warmup = _Warmup()


@contextmanager
def warming_up() -> Iterator[None]:
    """Count the core-seconds of the body as warm-up; those of a nested body are counted once."""
    if _warmup.inside:
        yield
        return
    cpu, _warmup.inside = time.process_time(), True
    try:
        yield
    finally:
        _warmup.core_s += time.process_time() - cpu
        _warmup.inside = False


def warmup_s() -> float:
    """Return the core-seconds of warm-up that this process has spent so far."""
    return _warmup.core_s


def not_a_worker() -> None:
    """Declare that this process did other work before its first task, so its CPU time so far is not warm-up."""
    _warmup.started = True


class Spending:
    """The core-seconds of this process and its descendants that are not charged to any run yet.

    Runs of one process share its start: the interpreter, the libraries, a server. Each of them is charged all of it, as
    in a process of its own, or the first one would seem dearer than the others.

    Attributes:
        charged_s: Core-seconds that are charged already. Those of the process before its first run are, unless the
            process was started for the run, see `started_for_runs`.
        start_s: Core-seconds of the start, which every run is charged; None before the first run.
    """

    charged_s: float | None = None
    start_s: float | None = None

    @classmethod
    def started_for_runs(cls) -> None:
        """Declare that this process exists for its runs: the first of them is charged from the start of the process."""
        if cls.charged_s is None:
            cls.charged_s = 0.0

    @classmethod
    def begin(cls) -> None:
        """Begin to measure, where this process had other things to do before."""
        if cls.charged_s is None:
            cls.charged_s = tree_core_s()

    @classmethod
    def begin_run(cls) -> None:
        """Begin the next run: what was spent before the first one is the start, what lies between two is of neither."""
        cls.begin()
        spent_s = cls.charge()
        if cls.start_s is None:
            cls.start_s = spent_s

    @classmethod
    def charge(cls) -> float:
        """Return the core-seconds that are not charged yet, and charge them."""
        before, cls.charged_s = cls.charged_s or 0.0, tree_core_s()
        return max(0.0, cls.charged_s - before)

    @classmethod
    def uncharged(cls) -> float:
        """Return the core-seconds that are not charged yet."""
        return max(0.0, tree_core_s() - (cls.charged_s or 0.0))


def tree_core_s() -> float:
    """Return the core-seconds of this process and all its descendants, those that have ended included.

    The kernel adds the time of a process that has ended to its parent once that has collected its exit status.
    """
    return math.fsum(os.times()[:4]) + math.fsum(map(_core_s_of, processes.descendants()))


def _core_s_of(pid: int) -> float:
    """Return the core-seconds of a process and of those of its children that have ended; 0 where it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return 0.0
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")


class Meter:
    """Measures the resources that this process has used since the meter was created."""

    def __init__(self) -> None:
        """Start the measurement."""
        self._started, self._clock = now(), time.perf_counter()
        self._cpu, self._io = os.times(), _io_bytes()
        if not _warmup.started:  # the first task of a worker: the process has started and imported what it needs
            _warmup.core_s += time.process_time()
            _warmup.started = True

    def usage(self, *, executed: bool = True) -> dict[str, Any]:
        """Return the resources used since the start of the measurement.

        Args:
            executed: Whether the task did its work. Where it was already done, the warm-up so far is reported with
                the next task that does some.

        Returns:
            ``started`` and ``ended`` (ISO 8601, UTC), ``clock`` (the boot of the machine, and by how many seconds its
            clock is before its time since that boot: it changes when the clock is set), ``host``, ``pid``, ``wall_s``,
            ``cpu_user_s``, ``cpu_sys_s``,
            ``warmup_s`` (core-seconds of warm-up; the CPU seconds include loading, but not the start of the process),
            ``core_s`` (core-seconds of the process since the last task that was executed, its start included),
            ``max_rss_bytes`` (the peak of the process so far), ``bytes_read`` and ``bytes_written`` (by system calls,
            page cache included).
        """
        cpu, (read, written) = os.times(), _io_bytes()
        return {
            "started": self._started,
            "ended": now(),
            "clock": [processes.current().space, round(time.time() - time.monotonic(), 3)],
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "wall_s": round(time.perf_counter() - self._clock, 6),
            "cpu_user_s": round(cpu.user - self._cpu.user, 2),
            "cpu_sys_s": round(cpu.system - self._cpu.system, 2),
            "warmup_s": round(_warmup.unreported_s(), 3) if executed else 0.0,
            "core_s": round(_warmup.since_attempt_s(), 2) if executed else 0.0,
            "max_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            "bytes_read": read - self._io[0],
            "bytes_written": written - self._io[1],
        }


def _io_bytes() -> tuple[int, int]:
    """Return the bytes read and written by this process; zeros where the kernel does not count them."""
    try:
        counters = dict(line.split(": ") for line in _IO.read_text(encoding="ascii").splitlines())
        return int(counters["rchar"]), int(counters["wchar"])
    except (OSError, ValueError, KeyError):
        return 0, 0


Timer = Callable[[str], AbstractContextManager[None]]
"""A function from the name of a step to a context manager that adds the seconds of its body to that step."""


def untimed(_step: str) -> AbstractContextManager[None]:
    """Return a context manager that counts nothing: the `Timer` of work whose cost is counted elsewhere."""
    return nullcontext()
