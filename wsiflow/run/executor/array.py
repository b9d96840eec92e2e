"""Run slices as elements of array jobs, on Slurm, Grid Engine or any other scheduler that has a dialect.

An array is created in this order: a table on disk (`wsiflow.run.executor.element`), a line in ``jobs.jsonl``, and a
submission. Its elements write outcomes to files, which the driver reads each time it polls the queue. Where an element
is gone and tasks of it are unfinished, the scheduler is asked for the cause. The task that was running is charged with
an attempt and gets an element of its own; its neighbours are not charged. A driver that is killed leaves its arrays in
the queue, and the next driver watches them instead of submitting the same tasks again.
"""

import contextlib
import itertools
import json
import logging
import os
import threading
import uuid
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

from wsiflow.errors import EnvironmentFault, WsiflowError
from wsiflow.run.executor import element, jobs
from wsiflow.run.executor.dialect import ArrayParams, Place, expand
from wsiflow.run.executor.jobs import JobLog
from wsiflow.run.executor.params import ExecutorParams
from wsiflow.run.executor.protocol import Outcome, Site, Slice, Work
from wsiflow.run.executor.watch import FOLDER, LOGS, Array, Element, Piece, Poll, Queue, Tries
from wsiflow.system import publish
from wsiflow.system.usage import now

_logger = logging.getLogger(__name__)

_SCRIPT = f"{FOLDER}/element.sh"
_SUBMISSIONS = 3
_LIMIT_UNKNOWN = 1000
_REMEDIES = {
    "memory": "raise executor.array.memory_limit_mb, then run again",
    "time": "raise executor.array.minutes_limit, then run again",
    "cancelled": "run again to do it",
}


class Batch(NamedTuple):
    """One call of `ArrayJobs.run`.

    Attributes:
        call: Names of the work, the source and the stage, as the tables of the arrays have them.
        unfinished: Tasks whose last outcome was not yielded yet.
        waiting: Pieces to submit, the next one first.
        arrays: The arrays that are watched.
    """

    call: Mapping[str, str]
    unfinished: set[int]
    waiting: deque[Piece]
    arrays: list[Array]


def make(params: ExecutorParams, site: Site) -> "ArrayJobs":
    """Return the executor for the scheduler that the settings describe."""
    assert params.array is not None, "the settings of this kind have it"
    return ArrayJobs(params.array, root=site.root, workers=params.workers, threads=params.threads)


class ArrayJobs:
    """The executor of array jobs; several threads may call `run` at once."""

    def __init__(self, params: ArrayParams, *, root: Path, workers: int, threads: int) -> None:
        """Store the settings; the scheduler is not called yet.

        Args:
            params: How arrays are submitted and watched.
            root: The run's folder, which has the same path on every node.
            workers: Most elements in the queue at a time, over all arrays; 0: ``params.window``.
            threads: Number of threads of the network in each element.
        """
        self._params, self._dialect, self._root = params, params.dialect, root.resolve()
        self._workers, self._threads = workers, threads
        self._log, self._queue = JobLog(self._root), Queue(params, workers=workers)
        self._left: dict[str, Array] = {}  # arrays of an earlier driver with elements in the queue
        self._past: dict[str, Array] = {}  # arrays whose outcomes no driver may have read to the end
        self._lock, self._identity = threading.Lock(), jobs.identity()
        self._longest = params.limit or 0

    def __enter__(self) -> Self:
        """Record this process as the driver, and find the arrays that an earlier driver left in the queue.

        Raises:
            EnvironmentFault: Another process drives the run, or the scheduler does not answer or is not installed.
        """
        jobs.require_alone(self._log)
        jobs.require_answer(self._dialect)
        left = self._log.read().jobs
        (self._root / FOLDER).mkdir(parents=True, exist_ok=True)
        publish.write_view(self._root, _SCRIPT, element.SCRIPT.encode())
        self._log.append("driver", **self._identity, dialect=self._dialect.model_dump(mode="json"))
        if left:
            self._take_over(left)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_exc: object) -> None:
        """Cancel the arrays in the queue where the run ends in an error."""
        self._queue.close()
        if not self._log.read().is_driven_by(self._identity):
            return  # the arrays in the queue belong to another driver
        try:
            if kind is not None:
                self._cancel()
        finally:
            self._log.append("left", **self._identity)

    def stop(self) -> str | None:
        """Cancel the arrays in the queue, and return in words how many they were."""
        self._queue.close()
        if not self._log.read().is_driven_by(self._identity):
            return None
        try:
            count = len(self._cancel())
        except WsiflowError:
            return f"array jobs may still be in the queue, end them with wsiflow cancel {self._root}"
        return f"{count} array job{'s' * (count != 1)} cancelled"

    def _cancel(self) -> list[str]:
        """Record the cancellation, so that no thread submits anything more, and cancel what was submitted."""
        self._log.append("cancel")  # threads that still wait read it
        jobs.await_submissions(self._log)
        return jobs.drop_open(self._log, self._dialect)

    def run(self, work: Work, source: Path, stage: str, slices: Sequence[Slice]) -> Iterator[Outcome]:
        """Run the slices in arrays of at most the scheduler's limit, and yield outcomes as elements write them.

        Raises:
            EnvironmentFault: The scheduler refuses arrays or does not answer, or the executor was closed.
        """
        batch = self._make_batch({"work": element.dotted(work), "source": source.name, "stage": stage}, slices)
        try:
            yield from self._read_left(batch.call)
            while batch.unfinished:
                if batch.waiting and self._is_stopped():
                    yield from self._give_up(batch)
                self._submit(batch)
                poll = self._queue.poll()
                for array in tuple(batch.arrays):
                    yield from self._collect(batch, array, poll)
        finally:
            for array in batch.arrays:
                self._close(array, array.open)

    def _take_over(self, left: Sequence[jobs.Job]) -> None:
        """Find the arrays that an earlier driver left, and which of their elements are alive.

        Raises:
            EnvironmentFault: The scheduler does not answer.
        """
        self._queue.hold((Place(job.name, -1) for job in left), finished=False)
        places = self._queue.poll().places
        if places is None:
            cause = f"{self._dialect.name} does not answer, and arrays of an earlier start may still be in its queue"
            raise EnvironmentFault(cause, "run again when it does", path=self._log.path)
        self._queue.release(Place(job.name, -1) for job in left)
        alive = {place: seen for place, seen in places.items() if self._dialect.is_alive(seen.state)}
        self._queue.hold(alive, finished=True)  # they count for the window, even where nobody needs their tasks
        ids = {place.name: seen.job for place, seen in alive.items()}
        if alive:
            _logger.info(
                "%d elements that an earlier start submitted are in the queue and are watched again", len(alive)
            )
        for name, job in left:
            table = json.loads((self._root / FOLDER / f"{name}.json").read_text(encoding="utf-8"))
            self._past[name] = Array(self._root, name, ids.get(name, job), table)
            if name in ids:
                self._left[name] = self._past[name]

    def _read_left(self, call: Mapping[str, str]) -> Iterator[Outcome]:
        """Yield the outcomes that elements wrote while no driver was running; only the trace uses them."""
        with self._lock:
            names = [name for name, array in self._past.items() if call.items() <= array.table.items()]
            arrays = [self._past.pop(name) for name in names]
        for array in arrays:
            files = array.files()
            for one in array.open:
                for outcome in one.read(files.get(one.place.number, ())):
                    yield outcome.with_usage(**self._known(array, one))._replace(retried=True)
            if array.name not in self._left:
                self._log.append("ended", name=array.name)

    def _make_batch(self, call: Mapping[str, str], slices: Sequence[Slice]) -> Batch:
        """Return a batch that watches the elements in the queue; tasks that none of them has wait to be submitted."""
        batch = Batch(call, {task for lo, hi in slices for task in range(lo, hi)}, deque(), [])
        covered: set[int] = set()
        for left in self._left.values():
            array = Array(self._root, left.name, left.job, left.table)
            array.open = [
                one
                for one in array.open
                if self._queue.holds(one.place) and not batch.unfinished.isdisjoint(one.missing)
            ]
            if array.open and call.items() <= array.table.items():
                self._queue.hold((one.place for one in array.open), finished=False)
                batch.arrays.append(array)
                covered.update(task for one in array.open for task in one.missing)
        for lo, hi in slices:
            uncovered = (task for task in range(lo, hi) if task not in covered)
            batch.waiting.extend(Piece(*span, Tries()) for span in runs(uncovered))
        return batch

    def _is_stopped(self) -> bool:
        """Tell whether the run was cancelled, or has a newer driver on another machine."""
        history = self._log.read()
        return history.cancelled or not history.is_driven_by(self._identity)

    def _give_up(self, batch: Batch) -> Iterator[Outcome]:
        """Yield an outcome for each waiting task: it was cancelled."""
        while batch.waiting:
            piece = batch.waiting.popleft()
            for task in range(piece.lo, piece.hi):
                fault = EnvironmentFault("the run was cancelled", _REMEDIES["cancelled"], stage=batch.call["stage"])
                usage = {"exit_class": "cancelled"}
                yield from _accept(batch, Outcome(task, None, executed=False, failure=fault.failure, usage=usage))

    def _submit(self, batch: Batch) -> None:
        """Submit waiting pieces in arrays, as far as there is room in the queue."""
        while batch.waiting:
            request = self._request(batch.waiting[0].tries)
            alike = itertools.takewhile(lambda piece: self._request(piece.tries) == request, batch.waiting)  # noqa: B023
            name = f"{batch.call['stage']}-{uuid.uuid4().hex[:12]}"
            size = self._queue.take(name, sum(1 for _ in alike), longest=self._limit())
            if not size:
                return
            pieces = [batch.waiting.popleft() for _ in range(size)]
            try:
                array = self._start(name, batch.call, request, pieces)
            except BaseException:
                self._queue.drop(name)  # other threads wait for its room
                raise
            if array is None:
                batch.waiting.extendleft(reversed(pieces))
                return
            batch.arrays.append(array)

    def _request(self, tries: Tries) -> dict[str, int]:
        """Return the memory (MB) and the minutes to request: doubled each time they were too little, up to limits."""
        params = self._params
        return {
            "memory_mb": min(params.memory_mb << tries.memory, params.memory_limit_mb),
            "minutes": min(params.minutes << tries.time, params.minutes_limit),
        }

    def _limit(self) -> int:
        """Return the largest number of elements of an array; the scheduler is asked once."""
        with self._lock:
            if not self._longest:
                answer = jobs.call(self._dialect.limit).stdout
                self._longest = self._dialect.longest(answer) or _LIMIT_UNKNOWN
            return self._longest

    def _start(
        self, name: str, call: Mapping[str, str], request: Mapping[str, int], pieces: Sequence[Piece]
    ) -> Array | None:
        """Write the table of an array, record the intent, submit the array and record its id.

        Returns:
            The array; None where it was not submitted, because it has to wait or the run was stopped.
        """
        table = {
            **call,
            "base": self._dialect.base,
            "index": self._dialect.index,
            "threads": self._threads,
            "submitted": now(),
            "request": request,
            "slices": [[piece.lo, piece.hi] for piece in pieces],
            "tries": [list(piece.tries) for piece in pieces],
        }
        publish.write_view(self._root, f"{FOLDER}/{name}.json", json.dumps(table).encode())
        (self._root / FOLDER / name).mkdir()
        (self._root / LOGS / name).mkdir(parents=True)
        tasks = sum(piece.hi - piece.lo for piece in pieces)
        self._log.append("intent", name=name, **call, **request, elements=len(pieces), tasks=tasks)
        if self._is_stopped():  # a cancellation may have read the log before the intent was there
            self._log.append("ended", name=name)
            self._queue.drop(name)
            self._forget(name)
            return None
        job = self._send(name, len(pieces), request)
        if not job:
            return None
        self._log.append("job", name=name, job=job)
        sizes = len(pieces), tasks, request["memory_mb"], request["minutes"]
        _logger.info("%s: job %s submitted, %d elements for %d tasks, %d MB and %d min each", name, job, *sizes)
        if self._is_stopped():  # a cancellation may have listed the queue before the array was there
            jobs.drop(self._dialect, [self._dialect.whole.format(job=job)])
        return Array(self._root, name, job, table)

    def _send(self, name: str, size: int, request: Mapping[str, int]) -> str:
        """Submit an array, and return its id.

        Returns:
            The id; empty where the array was refused, and has to wait until other arrays of the run end.

        Raises:
            EnvironmentFault: It was refused repeatedly, although the run has nothing else in the queue.
        """
        table = self._root / FOLDER / f"{name}.json"
        starter = self._params.command or element.starter()
        fields = {
            **request,
            "seconds": request["minutes"] * 60,
            "name": name,
            "first": self._dialect.base,
            "last": self._dialect.base + max(size, self._dialect.least) - 1,
            "running": min(self._workers or size, size),
            "logs": self._root / LOGS / name,
            "script": self._root / _SCRIPT,
            "extra": self._params.extra,
            "command": [*starter, table],
        }
        variables = element.variables(os.environ, self._params.environment)
        command = self._dialect.submission(fields, threads=self._threads, variables=variables)
        for _ in range(_SUBMISSIONS):
            answer = jobs.call(command)
            job = self._dialect.submitted(answer.stdout) if not answer.returncode else ""
            job = job or self._find(name)  # it may have been accepted although the answer was lost
            if job:
                return job
        self._log.append("ended", name=name)
        if self._queue.give_back(name):  # sites limit the jobs of a user, those of other runs included
            self._forget(name)
            refusal = (answer.stderr or answer.stdout).strip()
            _logger.warning("%s refused another array, which is submitted again later: %s", self._dialect.name, refusal)
            return ""
        cause = f"{self._dialect.name} refused an array of {size}: {(answer.stderr or answer.stdout).strip()}"
        raise EnvironmentFault(cause, "correct executor.array, then run again", path=self._log.path)

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

    def _collect(self, batch: Batch, array: Array, poll: Poll) -> Iterator[Outcome]:
        """Yield the new outcomes of an array, and replace its elements that are lost."""
        files = array.files()
        ended = []
        for one in array.open:
            known = self._known(array, one)
            for outcome in one.read(files.get(one.place.number, ())):
                yield from _accept(batch, outcome.with_usage(**known))
            if one.missing and not self._is_lost(array, one, poll):
                continue
            ended.append(one)
            if one.missing:
                yield from self._replace(batch, array, one, known)
        self._close(array, ended)
        if not array.open:
            batch.arrays.remove(array)
        with self._lock:
            left = self._left.get(array.name)  # other elements of it may belong to another batch, now or later
            if left is not None:
                closed = {one.place for one in ended}
                left.open = [one for one in left.open if one.place not in closed and self._queue.holds(one.place)]
        if not array.open and not (left and left.open):
            self._log.append("ended", name=array.name)

    def _close(self, array: Array, ended: Sequence[Element]) -> None:
        """Stop watching elements."""
        self._queue.finish(one.place for one in ended)
        array.open = [one for one in array.open if one not in ended]

    def _known(self, array: Array, one: Element) -> dict[str, Any]:
        """Return the submission time and the scheduler's id of an element, for the trace."""
        return {"submitted": array.table["submitted"], "native_id": self._native(array, one)}

    def _native(self, array: Array, one: Element) -> str:
        return self._dialect.native.format(job=array.job, index=one.place.number)

    def _is_lost(self, array: Array, one: Element, poll: Poll) -> bool:
        """Tell whether an element has been gone for so long that its files would have appeared."""
        if poll.places is None or poll.taken_s < array.since:  # no answer, or an answer from before the submission
            return False
        seen = poll.places.get(one.place)
        if seen and (self._dialect.is_alive(seen.state) or not self._dialect.is_stuck(one.seen.state)):
            one.seen = seen
        if seen and self._dialect.is_alive(seen.state):
            one.gone_since = None
            return False
        if seen and self._dialect.is_stuck(seen.state):
            with contextlib.suppress(EnvironmentFault):  # it is cancelled after the next poll
                jobs.drop(self._dialect, [self._native(array, one)])
            return False
        if one.gone_since is None:
            one.gone_since = poll.taken_s
        return poll.taken_s - one.gone_since >= self._params.grace_s

    def _replace(self, batch: Batch, array: Array, one: Element, known: Mapping[str, Any]) -> Iterator[Outcome]:
        """Put the unfinished tasks of a lost element back into the queue of the batch, and yield their lost attempts.

        Where the run was cancelled or a task has no attempts left, the outcome is the last one of the task.
        """
        cause = self._cause(array, one)
        running = one.running_task()
        charged = list(one.missing) if running is None or cause == "cancelled" else [running]
        tries = one.piece.tries.after(cause)
        is_last = cause == "cancelled" or tries.lost > self._params.retries
        process = one.process()
        if process:  # a driver on another machine cannot see that the process is gone
            publish.forget_attempts(self._root, process)
        usage = {**one.about(), **known, "exit_class": cause}
        failure = self._fault(array, one, cause, tries.lost).failure
        if not is_last:
            stage, log = array.table["stage"], array.logs / f"{one.place.number}.log"
            native = self._native(array, one)
            _logger.warning("%s: element %s was lost (%s) and is requeued; its log is %s", stage, native, cause, log)
        for task in charged:
            outcome = Outcome(task, None, executed=True, failure=failure, usage=usage, retried=not is_last)
            yield from _accept(batch, outcome)
        again = [Piece(*span, tries) for span in runs(charged)] if not is_last else []
        spared = [Piece(*span, one.piece.tries) for span in runs(set(one.missing) - set(charged))]
        batch.waiting.extendleft(reversed(again + spared))

    def _cause(self, array: Array, one: Element) -> str:
        """Return why an element was lost, see `wsiflow.run.executor.dialect.Dialect.cause`."""
        if self._is_stopped():
            return "cancelled"
        command = expand(self._dialect.inspect, {"job": array.job, "index": one.place.number})
        answer = jobs.call(command)
        report = "" if answer.returncode else answer.stdout
        return self._dialect.cause(one.seen.state, report, began=one.began)

    def _fault(self, array: Array, one: Element, cause: str, lost: int) -> EnvironmentFault:
        """Return the error of the tasks of a lost element."""
        request, stage = array.table["request"], array.table["stage"]
        resources = f"{request['memory_mb']} MB, {request['minutes']} min"
        fate = "it was cancelled"
        if cause != "cancelled":
            fate = f"its element died {lost} times, the last time of cause {cause!r}"
        log = array.logs / f"{one.place.number}.log"
        remedy = _REMEDIES.get(cause, "read the log for the reason, then run again")
        return EnvironmentFault(f"{fate} ({self._native(array, one)}, {resources}; log {log})", remedy, stage=stage)


def _accept(batch: Batch, outcome: Outcome) -> Iterator[Outcome]:
    """Yield an outcome unless the last outcome of its task was yielded already."""
    if outcome.task not in batch.unfinished:
        return
    if not outcome.retried:
        batch.unfinished.discard(outcome.task)
    yield outcome


def runs(tasks: Iterable[int]) -> Iterator[Slice]:
    """Yield the ranges that together contain exactly these tasks, in rising order."""
    lo = hi = None
    for task in sorted(tasks):
        if task != hi:
            if lo is not None and hi is not None:
                yield Slice(lo, hi)
            lo = task
        hi = task + 1
    if lo is not None and hi is not None:
        yield Slice(lo, hi)
