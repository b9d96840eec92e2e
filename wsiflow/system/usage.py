"""What an attempt at a task used: seconds, memory, bytes, and where it ran.

The counters are those of the whole process, so they belong to one task as long as a worker does one at a time. What a
process does once, whatever its tasks (it starts, imports, loads networks), is warm-up: it is counted apart.
"""

import os
import resource
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

_IO = Path("/proc/self/io")


def now() -> str:
    """Return the time as attempts note it: ISO 8601, UTC, milliseconds."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


class _Warmup:
    """Core-seconds of this process that went into getting ready for tasks."""

    def __init__(self) -> None:
        self.core_s, self.told_s, self.started, self.inside = 0.0, 0.0, False, False

    def untold_s(self) -> float:
        """Return what has not been returned before."""
        before, self.told_s = self.told_s, self.core_s
        return self.core_s - before


_warmup = _Warmup()


@contextmanager
def warming_up() -> Iterator[None]:
    """Count the core-seconds of the body as warm-up, those of a body inside of it once."""
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
    """Return the core-seconds of warm-up of this process so far."""
    return _warmup.core_s


def not_a_worker() -> None:
    """Say that this process did other things before its first task: what it has used so far is not its start."""
    _warmup.started = True


class Meter:
    """Counts from the moment it is made."""

    def __init__(self) -> None:
        """Start counting."""
        self._started, self._clock = now(), time.perf_counter()
        self._cpu, self._io = os.times(), _io_bytes()
        if not _warmup.started:  # the first task of a worker: the process has started and imported what it needs
            _warmup.core_s += time.process_time()
            _warmup.started = True

    def usage(self, *, executed: bool = True) -> dict[str, Any]:
        """Return what was used since.

        Args:
            executed: The task did something. What one that found its work done has of warm-up is told with the next.

        Returns:
            ``started`` and ``ended`` (ISO 8601, UTC), ``host``, ``pid``, ``wall_s``, ``cpu_user_s``, ``cpu_sys_s``,
            ``warmup_s`` (core-seconds of warm-up; loading is in the CPU seconds too, the start of the process is not),
            ``max_rss_bytes`` (the process's peak so far), ``bytes_read`` and ``bytes_written`` (by system calls, page
            cache included).
        """
        cpu, (read, written) = os.times(), _io_bytes()
        return {
            "started": self._started,
            "ended": now(),
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "wall_s": round(time.perf_counter() - self._clock, 6),
            "cpu_user_s": round(cpu.user - self._cpu.user, 2),
            "cpu_sys_s": round(cpu.system - self._cpu.system, 2),
            "warmup_s": round(_warmup.untold_s(), 3) if executed else 0.0,
            "max_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            "bytes_read": read - self._io[0],
            "bytes_written": written - self._io[1],
        }


def _io_bytes() -> tuple[int, int]:
    """Return bytes read and written by this process; zeros where the kernel does not count them."""
    try:
        found = dict(line.split(": ") for line in _IO.read_text(encoding="ascii").splitlines())
        return int(found["rchar"]), int(found["wchar"])
    except (OSError, ValueError, KeyError):
        return 0, 0


Timer = Callable[[str], AbstractContextManager[None]]
"""``with timed("infer"): ...`` adds the seconds of the body to a step."""


def untimed(_step: str) -> AbstractContextManager[None]:
    """Count nothing: the `Timer` of work whose cost is counted elsewhere."""
    return nullcontext()
