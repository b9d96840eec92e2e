"""How elements end that did not finish their work: the cause, in the scheduler's words, and what can be done about it.

Memory and time are requested again, doubled, up to their bounds: the limits in the settings and those of the scheduler.
What ended for another cause is tried again as often as the settings say, except where another try changes nothing.
"""

import logging
import pwd
import re
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import NamedTuple

from wsiflow.errors import EnvironmentFault
from wsiflow.run.executor import jobs
from wsiflow.run.executor.bounds import Bounds
from wsiflow.run.executor.dialect import ArrayParams, Charge, Given, Seen, expand
from wsiflow.run.executor.pieces import Request, Tries
from wsiflow.system import faults

_logger = logging.getLogger(__name__)

_TAIL_BYTES = 4096
_LINE_CHARS = 300
_GROWING = ("memory", "time")
_REMEDIES = {
    "cancelled": "run again to do it",
    "start": "correct what it names, or name other nodes (executor.array.partition or exclude), then run again",
}
_IN_WORDS = {
    "memory": "lack of memory",
    "time": "its time limit",
    "node": "its node",
    "preempted": "preemption by other jobs",
    "killed": "an unknown cause",
    "lost": "an unknown cause, of which the scheduler knows nothing",
}


class End(NamedTuple):
    """How an element ended.

    Attributes:
        cause: One of `wsiflow.run.executor.dialect.CAUSES`, ``killed`` or ``lost``.
        words: What the scheduler, or the element itself, says of it; empty where nobody says anything.
        charge: What the scheduler charges for it; None where it was not asked or does not say.
    """

    cause: str
    words: str = ""
    charge: Charge | None = None

    def __str__(self) -> str:
        """Return both in a few words."""
        return f"{self.cause}: {self.words}" if self.words else self.cause


class Requests:
    """What is requested for elements: doubled each time it was too little, up to the bounds."""

    def __init__(self, params: ArrayParams) -> None:
        """Begin with the limits of the settings; those of the scheduler are added when it was asked."""
        self._params = params
        self.bounds = Bounds()

    def of(self, tries: Tries) -> Request:
        """Return the memory (MB) and the minutes to request after earlier tries."""
        params = self._params
        memory_mb = min(params.memory_mb << tries.memory, params.memory_limit_mb)
        minutes = min(params.minutes << tries.time, params.minutes_limit)
        return Request(
            int(max(params.memory_mb, min(memory_mb, self.bounds.memory_mb))),
            int(max(params.minutes, min(minutes, self.bounds.minutes))),
        )

    def after(self, tries: Tries, cause: str, had: Request) -> Tries | None:
        """Return the tries after one more was lost, or None where it is the last one.

        Args:
            tries: Those before.
            cause: Why it was lost.
            had: What the element had that was lost.
        """
        if cause == "preempted":  # as often as it happens: neither the task nor the node has done anything wrong
            return tries
        if cause not in _GROWING:
            again = tries.after(cause)
            is_last = cause in {"cancelled", "start"} or again.lost - again.memory - again.time > self._params.retries
            return None if is_last else again
        while self.of(tries := tries.after(cause)) != self.of(tries.after(cause)):
            if self._exceeds(self.of(tries), had, cause):
                return tries
        return tries if self._exceeds(self.of(tries), had, cause) else None

    def _exceeds(self, request: Request, had: Request, cause: str) -> bool:
        """Tell whether a request asks for more than an element had of what it lacked."""
        return request.memory_mb > had.memory_mb if cause == "memory" else request.minutes > had.minutes

    def remedy(self, cause: str) -> str:
        """Return what the user can do about an element that was lost for the last time, naming the bound it met."""
        params, bounds = self._params, self.bounds
        if cause == "memory" and bounds.memory_mb <= max(params.memory_mb, params.memory_limit_mb):
            bound = f"no node {bounds.where} has more than {bounds.memory_mb:,.0f} MB"
            return f"{bound}: name another executor.array.partition, then run again"
        if cause == "time" and bounds.minutes <= max(params.minutes, params.minutes_limit):
            bound = f"no job {bounds.where} may run longer than {bounds.minutes:,.0f} min"
            return f"{bound}: name another executor.array.partition, then run again"
        limits = {
            "memory": "memory_mb" if params.memory_mb > params.memory_limit_mb else "memory_limit_mb",
            "time": "minutes" if params.minutes > params.minutes_limit else "minutes_limit",
        }
        if cause in limits:
            return f"raise executor.array.{limits[cause]}, then run again"
        return _REMEDIES.get(
            cause, f"find the reason in the log, then run again (executor.array.retries is {params.retries})"
        )


def of_element(params: ArrayParams, seen: Seen, place: Mapping[str, object], request: Request, told: "Told") -> End:
    """Return how an element ended, by what it said itself, what the scheduler knows, and the end of its log.

    Args:
        params: The settings.
        seen: The element as it was last listed.
        place: ``job`` and ``index`` of the element.
        request: What it had.
        told: What it said itself.
    """
    dialect, given = params.dialect, Given(request.memory_mb, request.minutes * 60.0)
    if told.unfit:
        return End("start", told.unfit)
    if told.warned_s is not None:  # its scheduler announced that it would end it
        is_late = told.warned_s >= 0.8 * given.seconds
        return End("time" if is_late else "cancelled", f"ended by {dialect.name} after {told.warned_s:.0f} s")
    report = report_of(params, place)
    charge = dialect.charged(report)
    cause = dialect.cause(seen.state, report, began=told.began, reason=seen.reason, given=given)
    if cause in {"killed", "lost", "start"} and faults.tells_of_memory(told.last_line):
        return End("memory", told.last_line, charge)
    words = seen.reason if dialect.is_stuck(seen.state) else dialect.quoted(report)
    if cause == "cancelled" and (who := _who_cancelled(params, place)):
        words = ", ".join(filter(None, (f"by {who}", words)))
    return End(cause, words, charge)


class Told(NamedTuple):
    """What an element said of itself.

    Attributes:
        began: Whether it has written a file.
        unfit: Why it could do no work where it ran; empty where it could.
        warned_s: After how many seconds its scheduler announced its end; None where it did not.
        last_line: The last line of its log; empty where there is none.
    """

    began: bool
    unfit: str = ""
    warned_s: float | None = None
    last_line: str = ""


def report_of(params: ArrayParams, place: Mapping[str, object]) -> str:
    """Return what the scheduler says of an element, empty where it does not know it or cannot say it."""
    try:
        answer = jobs.call(expand(params.dialect.inspect, place))
    except EnvironmentFault:  # some machines that submit jobs have no accounting; the start says so
        return ""
    if answer.returncode and not jobs.means_nothing(params.dialect, answer):
        _tell_of_accounts(params.dialect.inspect[0], " ".join((answer.stderr or answer.stdout).split()))
    return "" if answer.returncode else answer.stdout


@cache
def _tell_of_accounts(command: str, words: str) -> None:
    """Tell once that a scheduler cannot say how elements end, as where its accounting file is on another machine."""
    _logger.warning("%s cannot tell how elements end, which is known from their logs alone: %s", command, words)


def why_requeued(params: ArrayParams, place: Mapping[str, object]) -> str:
    """Return why an element that ran waits again: ``preempted``, or ``node`` where nobody says that."""
    states = "".join(f"state={state}\n" for state in _accounts(params, place).split()[-1:])
    pattern = params.dialect.causes.get("preempted")
    return "preempted" if pattern and re.search(pattern, states, re.MULTILINE) else "node"


def _who_cancelled(params: ArrayParams, place: Mapping[str, object]) -> str:
    """Return the name of the user who cancelled an element; empty where nobody knows."""
    user = jobs.found(params.dialect.by, _accounts(params, place), "user")
    with suppress(ValueError, KeyError):
        return pwd.getpwuid(int(user)).pw_name
    return user


def _accounts(params: ArrayParams, place: Mapping[str, object]) -> str:
    """Return what a scheduler's accounts say of the starts of an element; empty where there are none."""
    if not params.dialect.blame:
        return ""
    with suppress(EnvironmentFault):
        answer = jobs.call(expand(params.dialect.blame, place))
        return "" if answer.returncode else answer.stdout
    return ""


def describe(end: End, *, native: str, times: int, request: Request, log: Path) -> str:
    """Return the cause of the error of tasks whose element was lost.

    Args:
        end: How it ended.
        native: The scheduler's id of the element.
        times: How often elements with this work died.
        request: What it had.
        log: Its log.
    """
    resources = f"{request.memory_mb:,} MB, {request.minutes:,} min"
    words = f": {end.words}" if end.words else ""
    if end.cause == "cancelled":
        return f"element {native} was cancelled{words} ({resources}; log {log})"
    if end.cause == "start":
        where = f"; {ending(log)}" if log.exists() else ""
        return f"element {native} could not start{words} ({resources}{where})"
    if end.cause == "killed" and end.words:
        often = f"died {times} times, at last" if times > 1 else "ended"
        return f"element {native} {often} with {end.words} ({resources}; {ending(log)})"
    often = f"died {times} times, at last of" if times > 1 else "died of"
    return f"element {native} {often} {_IN_WORDS[end.cause]}{words} ({resources}; {ending(log)})"


def ending(log: Path) -> str:
    """Return where the log is and how it ends, in words."""
    line = last_line(log)
    return f"log {log} ends with {line!r}" if line else f"log {log} is {'empty' if log.exists() else 'absent'}"


def last_line(log: Path) -> str:
    """Return the last line of a log that is not blank; empty where there is none."""
    with suppress(OSError), log.open("rb") as stream:
        stream.seek(max(0, stream.seek(0, 2) - _TAIL_BYTES))
        lines = [line for line in stream.read().decode(errors="replace").splitlines() if line.strip()]
        return lines[-1].strip()[:_LINE_CHARS] if lines else ""
    return ""
