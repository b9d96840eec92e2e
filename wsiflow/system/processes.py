"""Identities of processes across machines and containers, and whether a process has ended.

A PID alone does not identify a process: PIDs are reused, containers that share a host name each count from 1, and
another machine may have the same name. A process is therefore identified by its host, its *space* (the boot of the
machine and the PID namespace in which the PID is valid), its PID, and its start time in kernel ticks.

A process is only reported as ended if this process would see it while it lived. Any other may still be alive.
"""

import atexit
import logging
import os
import signal
import socket
import sys
import threading
import time
import uuid
from collections.abc import Mapping
from contextlib import suppress
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

_PROC = Path("/proc")
_SPACE_CHARS = 12
_PARENT_POLL_S = 1.0
_END_POLL_S = 0.1
_ZOMBIE = "Z"  # it has ended, and its parent has not collected the exit status


class Process(NamedTuple):
    """The identity of a process.

    Attributes:
        host: Host name of the machine or container.
        pid: The PID there.
        space: Id of the boot and the PID namespace in which the PID is valid, letters and digits.
        born: Start time in kernel ticks; empty where it is unknown.
    """

    host: str
    pid: int
    space: str
    born: str


def current() -> Process:
    """Return the identity of the calling process, which changes after a fork."""
    pid = os.getpid()
    return Process(socket.gethostname(), pid, _space(), start_ticks(pid))


def from_record(facts: Mapping[str, Any]) -> Process:
    """Return the process that a JSON record identifies.

    Records of former versions have no space. Theirs is then empty, which matches the space of no process.
    """
    return Process(facts["host"], facts["pid"], facts.get("space", ""), facts.get("born", ""))


def is_observable(process: Process) -> bool:
    """Return whether this process would see the given one while it lived: whether host and space are the same."""
    return (process.host, process.space) == (socket.gethostname(), _space())


def has_ended(process: Process) -> bool:
    """Return whether a process is known to have ended; False where that cannot be observed from here."""
    if not is_observable(process):
        return False
    try:
        os.kill(process.pid, 0)
    except (ProcessLookupError, OverflowError):  # the latter where no PID can be as large
        return True
    except OSError:  # this user may not signal it, so it exists
        pass
    state, started = _stat(process.pid)
    return state == _ZOMBIE or bool(started and process.born and started != process.born)


def end(process: Process, *, patience_s: float) -> None:
    """End a process that can be observed from here: ask it to, and kill it where that takes too long."""
    patience = time.monotonic() + patience_s
    with suppress(ProcessLookupError):  # it may end by itself meanwhile
        os.kill(process.pid, signal.SIGTERM)
        while not has_ended(process):
            if time.monotonic() > patience:
                os.kill(process.pid, signal.SIGKILL)
            time.sleep(_END_POLL_S)


def start_ticks(pid: int) -> str:
    """Return the start time in kernel ticks of a process of this space; empty where it does not exist or is unknown."""
    state, started = _stat(pid)
    return "" if state == _ZOMBIE else started


def clock_s() -> float:
    """Return the seconds since the boot, those in which the machine slept included, as start times count them."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


def age_s(*, of_session: bool = False) -> float:
    """Return for how many seconds this process has lived, or the first one of its session where that can be seen."""
    for pid in (os.getsid(0), os.getpid()) if of_session else (os.getpid(),):
        if pid and (ticks := start_ticks(pid)):
            return max(0.0, clock_s() - int(ticks) / os.sysconf("SC_CLK_TCK"))
    return 0.0


def descendants() -> list[int]:
    """Return the PIDs of the processes that descend from this one and have not ended."""
    parents: dict[int, int] = {}
    for folder in _PROC.iterdir():
        if folder.name.isdecimal():
            with suppress(OSError):
                stat = (folder / "stat").read_text(encoding="utf-8", errors="replace")
                state, parent = stat.rpartition(")")[2].split()[:2]  # the name before it may hold anything
                if state != _ZOMBIE:
                    parents[int(folder.name)] = int(parent)
    found = [os.getpid()]
    for pid in found:  # the list grows while it is walked through
        found += [child for child, parent in parents.items() if parent == pid]
    return found[1:]


class _Exit:
    """The exit code with which this process skips the end of its interpreter; None where it does not."""

    code: int | None = None


def skip_teardown(exit_code: int) -> None:
    """Have this process exit as soon as its threads and its handlers of `atexit` have ended.

    What the interpreter does after them serves no purpose in a process that ends, and takes a second of CPU time where
    torch is loaded.
    """
    _Exit.code = exit_code


@atexit.register  # called last, since handlers of later imports are called before
def _exit() -> None:
    if _Exit.code is None:
        return
    logging.shutdown()  # its own handler was registered before
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError, AttributeError):  # closed, or nobody reads it
            stream.flush()
    os._exit(_Exit.code)


@cache
def end_with(parent: int) -> None:
    """End this process when its parent has ended, in whatever way; a thread polls for that every second."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_PARENT_POLL_S)
        os._exit(1)

    threading.Thread(target=watch, name="parent", daemon=True).start()


def _stat(pid: int) -> tuple[str, str]:
    """Return the state and the start time in kernel ticks of a process; both empty where they are unknown."""
    own = pid == os.getpid()
    try:
        if not own and not _is_own_proc():  # /proc is of another namespace, where the PID is another process's
            return "", ""
        text = (_PROC / ("self" if own else str(pid)) / "stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return "", ""
    fields = text.rpartition(")")[2].split()  # the command name, in parentheses, may contain any character
    return fields[0], fields[19]


def _is_own_proc() -> bool:
    return str((_PROC / "self").readlink()) == str(os.getpid())


def _space() -> str:
    return _space_of(os.getpid())


@lru_cache(maxsize=2)
def _space_of(_pid: int) -> str:
    """Return the id of this process's space; a random one where the system does not reveal boot and namespace."""
    if sys.platform != "linux":  # there are no PID namespaces
        return "0" * _SPACE_CHARS
    try:
        boot = (_PROC / "sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        namespace = (_PROC / "self/ns/pid").stat().st_ino
    except (OSError, ValueError):
        return uuid.uuid4().hex[:_SPACE_CHARS]
    return uuid.uuid5(uuid.NAMESPACE_OID, f"{boot} {namespace}").hex[:_SPACE_CHARS]
