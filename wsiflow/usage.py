"""What an attempt at a task used: seconds, memory, bytes, and where it ran.

The counters are those of the whole process, so they belong to one task as long as a worker does one at a time.
"""

import os
import resource
import socket
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

_IO = Path("/proc/self/io")


def now() -> str:
    """Return the time as attempts note it: ISO 8601, UTC, milliseconds."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


class Meter:
    """Counts from the moment it is made."""

    def __init__(self) -> None:
        """Start counting."""
        self._started, self._clock = now(), time.perf_counter()
        self._cpu, self._io = os.times(), _io_bytes()

    def usage(self) -> dict[str, Any]:
        """Return what was used since.

        Returns:
            ``started`` and ``ended`` (ISO 8601, UTC), ``host``, ``pid``, ``wall_s``, ``cpu_user_s``, ``cpu_sys_s``,
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
            "max_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            "bytes_read": read - self._io[0],
            "bytes_written": written - self._io[1],
        }


def _io_bytes() -> tuple[int, int]:
    """Return bytes read and written by this process; zeros where the kernel does not count them."""
    try:
        found = dict(line.split(": ") for line in _IO.read_text(encoding="ascii").splitlines())
    except OSError:
        return 0, 0
    return int(found["rchar"]), int(found["wchar"])
