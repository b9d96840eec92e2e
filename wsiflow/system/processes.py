"""Which process did something, told from every other one, and whether it has ended.

A number alone does not tell: it is used again, containers with one host name each count their processes from 1, and
another machine may have the same name. A process is therefore its host, the *space* in which its number means
something (this boot of this machine, this PID namespace), the number, and the moment it started in the kernel's ticks.

That a process has ended is only ever said of one that would be seen if it lived; of any other it may still live.
"""

import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Mapping
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

_PROC = Path("/proc")
_SPACE_CHARS = 12
_PARENT_POLL_S = 1.0
_ZOMBIE = "Z"  # it has ended, and nobody has asked how


class Process(NamedTuple):
    """A process.

    Attributes:
        host: Name of the machine or container.
        pid: Its number there.
        space: Names the boot and the PID namespace that the number belongs to, letters and digits.
        born: When it started, in ticks of the kernel's clock; empty where that cannot be told.
    """

    host: str
    pid: int
    space: str
    born: str


def current() -> Process:
    """Return the process that asks; it is another one after a fork."""
    pid = os.getpid()
    return Process(socket.gethostname(), pid, _space(), start_ticks(pid))


def from_record(facts: Mapping[str, Any]) -> Process:
    """Return the process of a note; one of a former version names no space, which is then nobody's."""
    return Process(facts["host"], facts["pid"], facts.get("space", ""), facts.get("born", ""))


def is_observable(process: Process) -> bool:
    """Tell whether a process would be seen here if it lived."""
    return (process.host, process.space) == (socket.gethostname(), _space())


def has_ended(process: Process) -> bool:
    """Tell whether a process is known to have ended."""
    if not is_observable(process):
        return False
    try:
        os.kill(process.pid, 0)
    except (ProcessLookupError, OverflowError):  # the latter: no process has a number as large
        return True
    except OSError:  # not ours to signal: it is there
        pass
    state, started = _stat(process.pid)
    return state == _ZOMBIE or bool(started and process.born and started != process.born)


def start_ticks(pid: int) -> str:
    """Return when a process of this space started; empty where there is none, or it cannot be told."""
    state, started = _stat(pid)
    return "" if state == _ZOMBIE else started


@cache
def end_with(parent: int) -> None:
    """End this process when its parent has ended, however that died; a thread looks now and then."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_PARENT_POLL_S)
        os._exit(1)

    threading.Thread(target=watch, name="parent", daemon=True).start()


def _stat(pid: int) -> tuple[str, str]:
    """Return state and start of a process; empty where they cannot be told."""
    own = pid == os.getpid()
    try:
        if not own and not _is_own_proc():  # that of another namespace, where the number is another process's
            return "", ""
        text = (_PROC / ("self" if own else str(pid)) / "stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return "", ""
    fields = text.rpartition(")")[2].split()  # the name before it may hold anything
    return fields[0], fields[19]


def _is_own_proc() -> bool:
    return str((_PROC / "self").readlink()) == str(os.getpid())


def _space() -> str:
    return _space_of(os.getpid())


@lru_cache(maxsize=2)
def _space_of(_pid: int) -> str:
    """Return the name of this process's space: one that nobody else has where the system does not tell."""
    if sys.platform != "linux":  # where there are no namespaces
        return "0" * _SPACE_CHARS
    try:
        boot = (_PROC / "sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        namespace = (_PROC / "self/ns/pid").stat().st_ino
    except (OSError, ValueError):
        return uuid.uuid4().hex[:_SPACE_CHARS]
    return uuid.uuid5(uuid.NAMESPACE_OID, f"{boot} {namespace}").hex[:_SPACE_CHARS]
