"""Tell what the elements of a run wait for, and find those that wait for what never comes."""

import logging
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from wsiflow.errors import EnvironmentFault
from wsiflow.run.executor import jobs, waiting
from wsiflow.run.executor.dialect import ArrayParams, Place, Seen, expand
from wsiflow.run.executor.waiting import Queued, View
from wsiflow.run.executor.watch import Array, Poll
from wsiflow.system.usage import now

_logger = logging.getLogger(__name__)

_REASON_S = 60.0  # between two questions why an array waits
_VIEW_S = 60.0  # after which what is in the queue is written again, although nothing has changed
_SUBMITTED = "just submitted"


class QueueWatch:
    """What waits and runs, for the user.

    Attributes:
        refused: Why the scheduler does not take another array at present; empty where it does.
    """

    def __init__(self, params: ArrayParams, root: Path) -> None:
        """Begin with nothing seen."""
        self._params, self._dialect, self._root = params, params.dialect, root
        self._reasons: dict[str, tuple[float, str]] = {}  # by array: when it was asked, and the answer
        self._hopeless_since: dict[str, float] = {}
        self._warned: set[tuple[str, str]] = set()
        self._shown: tuple[list[Queued], str] = ([], "")
        self.refused = ""
        self._shown_s = float("-inf")

    def show(self, arrays: Sequence[Array], poll: Poll) -> None:
        """Write what is in the queue where it has changed, and warn of reasons that somebody has to act on."""
        if poll.places is None:
            return
        queued = [self._queued(array, poll) for array in arrays]
        if (queued, self.refused) == self._shown and time.monotonic() - self._shown_s < _VIEW_S:
            return
        self._shown, self._shown_s = (queued, self.refused), time.monotonic()
        waiting.write(self._root, View(now(), queued, self.refused))
        for one in queued:
            for reason in one.waiting:
                if self._dialect.is_held(reason):
                    self._warn(one.job, reason, "waits until somebody acts")

    def end(self) -> None:
        """Write that nothing is in the queue any more."""
        if self._shown_s > float("-inf"):
            waiting.write(self._root, View(now(), ()))

    def hopeless(self, arrays: Sequence[Array], poll: Poll) -> Iterator[tuple[Array, list[Place], str]]:
        """Yield arrays with the elements that have waited in vain for as long as files are awaited, and the reason."""
        if poll.places is None:
            return
        for array in arrays:
            found = {
                place: reason
                for place, seen in self._pending(array, poll)
                if self._dialect.is_hopeless(reason := seen.reason or self.reason_of(array))
            }
            if not found:
                self._hopeless_since.pop(array.name, None)
                continue
            reason = next(iter(found.values()))
            since_s = self._hopeless_since.setdefault(array.name, poll.taken_s)
            self._warn(array.job, reason, f"is given up after {self._params.grace_s:.0f} s: no waiting cures that")
            if poll.taken_s - since_s >= self._params.grace_s:
                yield array, [*found], reason

    def reason_of(self, array: Array) -> str:
        """Return why an array waits, by asking for it; empty where the scheduler does not tell."""
        if not self._dialect.reasons:
            return ""
        asked_s, reason = self._reasons.get(array.name, (float("-inf"), ""))
        if time.monotonic() - asked_s < _REASON_S:
            return reason
        try:
            answer = jobs.call(expand(self._dialect.reasons, {"whole": self._dialect.whole.format(job=array.job)}))
            reason = "" if answer.returncode else self._dialect.explained(answer.stdout, self._params.partition)
        except EnvironmentFault:
            reason = ""
        self._reasons[array.name] = time.monotonic(), reason
        return reason

    def _warn(self, job: str, reason: str, what: str) -> None:
        if (job, reason) not in self._warned:
            self._warned.add((job, reason))
            _logger.warning("%s: array job %s %s: %s", self._dialect.name, job, what, reason)

    def _pending(self, array: Array, poll: Poll) -> list[tuple[Place, Seen]]:
        """Return the elements of an array that are listed as waiting."""
        seen = [(one.place, (poll.places or {}).get(one.place)) for one in array.open]
        return [(place, one) for place, one in seen if one is not None and self._is_waiting(one)]

    def _is_waiting(self, seen: Seen) -> bool:
        return self._dialect.is_alive(seen.state) and self._dialect.is_pending(seen.state)

    def _queued(self, array: Array, poll: Poll) -> Queued:
        """Return how many elements of an array wait and run."""
        reasons, running = Counter[str](), 0
        pending = self._pending(array, poll)
        whole = self.reason_of(array) if pending and not any(seen.reason for _, seen in pending) else ""
        reasons.update(seen.reason or whole for _, seen in pending)
        for one in array.open:
            seen = (poll.places or {}).get(one.place)
            if seen is None and poll.taken_s < array.since:
                reasons[_SUBMITTED] += 1
            elif seen is not None and self._dialect.is_alive(seen.state) and not self._is_waiting(seen):
                running += 1
        logs = array.logs.relative_to(self._root).as_posix()
        return Queued(array.job, dict(reasons), running, *array.request, logs)
