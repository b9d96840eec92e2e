"""Submit arrays of elements, and wait where a scheduler takes no more of them at present.

An array is created in this order: a table on disk, a line in ``jobs.jsonl``, and a submission, so that one whose answer
is lost is found in the queue by its name.
"""

import importlib.metadata
import json
import logging
import re
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from wsiflow.errors import EnvironmentFault
from wsiflow.run.executor import jobs, submission
from wsiflow.run.executor.jobs import JobLog
from wsiflow.run.executor.pieces import FOLDER, Request
from wsiflow.run.executor.queue_watch import QueueWatch
from wsiflow.run.executor.watch import LOGS, Array, Queue, link_logs
from wsiflow.system import publish
from wsiflow.system.notes import NOTES
from wsiflow.system.usage import now

_logger = logging.getLogger(__name__)

_SUBMISSIONS = 3
_FULL_S, _LONGEST_FULL_S = 30.0, 600.0  # between two tries where this user has as many jobs as are allowed
_LIMIT_UNKNOWN = 1000


class Nodes(NamedTuple):
    """What every node must have.

    Attributes:
        needs: Files and folders that it has to see.
        kind: The numeric class that it must be of; None for that of the first node that works.
    """

    needs: Sequence[Path] = ()
    kind: Mapping[str, str] | None = None


class Submitter:
    """Submits the arrays of a run.

    Attributes:
        nodes: What every node must have.
    """

    def __init__(
        self, form: submission.Form, log: JobLog, queue: Queue, watch: QueueWatch, is_stopped: Callable[[], bool]
    ) -> None:
        """Store what arrays have in common; the scheduler is not called yet.

        Args:
            form: The settings.
            log: The log of the run's jobs.
            queue: What of the run is in the queue.
            watch: Where refusals are told.
            is_stopped: Tells whether nothing more may be submitted.
        """
        self._form, self._params, self._dialect, self._root = form, form.params, form.params.dialect, form.root
        self._log, self._queue, self._watch, self._is_stopped = log, queue, watch, is_stopped
        self.nodes = Nodes()
        self._longest = form.params.limit or 0
        self._tested: set[Request] = set()  # of these the scheduler did not say that nothing can ever meet them
        self._full_s, self._full_until_s = _FULL_S, float("-inf")

    @property
    def is_waiting(self) -> bool:
        """Whether the scheduler has refused an array, and is to be left alone for a while."""
        return time.monotonic() < self._full_until_s

    def longest(self) -> int:
        """Return the largest number of elements of an array; the scheduler is asked once."""
        if not self._longest:
            answer = jobs.call(self._dialect.limit).stdout
            self._longest = self._dialect.longest(answer) or _LIMIT_UNKNOWN
        return self._longest

    def start(self, name: str, request: Request, size: int, stages: str = "") -> Array | None:
        """Write the table of an array, record the intent, submit the array and record its id.

        Returns:
            The array; None where it was not submitted, because it has to wait or the run was stopped.
        """
        table = {
            "base": self._dialect.base,
            "index": self._dialect.index,
            "threads": self._form.threads,
            "submitted": now(),
            "version": importlib.metadata.version("wsiflow"),
            "needs": [str(path) for path in self.nodes.needs],
            "kind": self.nodes.kind,
            "scratch": self._params.scratch,
            "request": request._asdict(),
            "elements": size,
            "idle_s": self._params.idle_s,
        }
        publish.write_view(self._root, f"{FOLDER}/{name}.json", json.dumps(table).encode())
        (self._root / FOLDER / name).mkdir()
        (self._root / LOGS / name).mkdir(parents=True)
        self._log.append("intent", name=name, **request._asdict(), elements=size)
        if self._is_stopped():  # a cancellation may have read the log before the intent was there
            self._log.append("ended", name=name)
            self._queue.drop(name)
            self._forget(name)
            return None
        job = self.send(name, size, request)
        if not job:
            return None
        self._log.append("job", name=name, job=job)
        elements = f"{size:,} element{'s' * (size != 1)} of {request.memory_mb:,} MB and {request.minutes:,} min"
        logs = link_logs(self._root, name, job)
        NOTES.info("submitted  array job %s for %s: %s; logs in %s", job, stages, elements, logs)
        if self._is_stopped():  # a cancellation may have listed the queue before the array was there
            jobs.drop(self._dialect, [self._dialect.whole.format(job=job)])
        return Array(self._root, name, job, table)

    def send(self, name: str, size: int, request: Request) -> str:
        """Submit an array, and return its id.

        Returns:
            The id; empty where the array was refused, and has to wait until other arrays of the run end.

        Raises:
            EnvironmentFault: It was refused repeatedly, although the run has nothing else in the queue.
        """
        command = self._form.command(name, size, request, self._root / LOGS / name)
        if request not in self._tested:
            self._test(name, size, request)
        for _ in range(_SUBMISSIONS):
            answer = jobs.call(command, self._form.environ())
            job = self._dialect.submitted(answer.stdout) if not answer.returncode else ""
            job = job or self._find(name)  # it may have been accepted although the answer was lost
            if job:
                self._full_s, self._watch.refused = _FULL_S, ""
                self._queue.widen()
                return job
            if self._is_wrong(answer):
                break
        self._log.append("ended", name=name)
        refusal = submission.refusal(answer, self._params)
        if self._is_wrong(answer):
            raise self._refused(size, refusal)
        is_full = bool(self._dialect.full and re.search(self._dialect.full, refusal))
        if self._queue.give_back(name, size) or is_full:  # sites limit the jobs of a user, those of other runs included
            self._forget(name)
            self._wait(refusal, self._full_s if is_full else min(self._full_s, 2 * self._params.poll_s))
            return ""
        raise self._refused(size, refusal)

    def _is_wrong(self, answer: jobs.Answer) -> bool:
        """Tell whether the scheduler refused for a reason that no waiting cures."""
        return bool(self._dialect.wrong and re.search(self._dialect.wrong, submission.refusal(answer, self._params)))

    def _test(self, name: str, size: int, request: Request) -> None:
        """Have a scheduler test a request that would accept what it can never meet.

        Raises:
            EnvironmentFault: Nothing here can ever meet it.
        """
        tested = self._form.command(name, size, request, self._root / LOGS / name, for_test=True)
        if reason := self._form.unmet(tested):
            self._log.append("ended", name=name)
            raise self._refused(size, reason)
        self._tested.add(request)

    def _wait(self, refusal: str, seconds: float) -> None:
        """Submit nothing for some time, the longer the more often arrays were refused, and say why."""
        self._full_until_s = time.monotonic() + seconds
        self._full_s = min(2 * self._full_s, _LONGEST_FULL_S)
        self._watch.refused = refusal
        text = "%s refused another array, which is submitted again later: %s"
        _logger.warning(text, self._dialect.name, refusal)

    def _refused(self, size: int, reason: str) -> EnvironmentFault:
        cause = f"{self._dialect.name} refused an array of {size}: {reason}"
        return EnvironmentFault(cause, "correct executor.array, then run again", path=self._log.path)

    def _forget(self, name: str) -> None:
        """Remove the files of an array that was not submitted."""
        (self._root / FOLDER / f"{name}.json").unlink()
        (self._root / FOLDER / name).rmdir()
        (self._root / LOGS / name).rmdir()

    def _find(self, name: str) -> str:
        """Return the id of an array by its name; empty where it is not in the queue."""
        while (places := self._queue.poll().places) is None:
            pass
        return next((seen.job for place, seen in places.items() if place.name == name), "")
