"""Run slices as elements of array jobs, on Slurm, Grid Engine or what else has a dialect.

An array is a table on disk (`wsiflow.run.executor.element`), a line in ``jobs.jsonl`` and a submission, in this order;
its elements write their outcomes to files that are read while the queue is looked at. An element that is gone with
tasks undone is judged by what the scheduler tells of it. The task that was under way is charged an attempt and gets an
element of its own from then on; its neighbours are not charged. A driver that is killed leaves its arrays in the queue,
and the next one watches them instead of submitting the same work again.
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
        told: Work, source and stage, as the arrays' tables name them.
        wanted: Tasks whose outcome is still to be told.
        waiting: Pieces to submit, the next one first.
        arrays: What is watched.
    """

    told: Mapping[str, str]
    wanted: set[int]
    waiting: deque[Piece]
    arrays: list[Array]


def make(params: ExecutorParams, site: Site) -> "ArrayJobs":
    """Return the arrays of the scheduler that the settings describe."""
    assert params.array is not None, "the settings of this kind have it"
    return ArrayJobs(params.array, root=site.root, workers=params.workers, threads=params.threads)


class ArrayJobs:
    """The executor; several threads may feed it at once."""

    def __init__(self, params: ArrayParams, *, root: Path, workers: int, threads: int) -> None:
        """Remember the settings; nothing is asked or submitted yet.

        Args:
            params: How arrays are submitted and watched.
            root: The run's folder, which every node sees under the same path.
            workers: Elements in the queue at a time, over all arrays; 0: ``params.window``.
            threads: Threads of an element's network.
        """
        self._params, self._dialect, self._root = params, params.dialect, root.resolve()
        self._workers, self._threads = workers, threads
        self._log, self._queue = JobLog(self._root), Queue(params, workers=workers)
        self._left: dict[str, Array] = {}  # with elements in the queue
        self._past: dict[str, Array] = {}  # whose notes no driver may have read to the end
        self._lock, self._identity = threading.Lock(), jobs.identity()
        self._longest = params.limit or 0

    def __enter__(self) -> Self:
        """Note who runs the line, and count what an earlier driver left in the queue.

        Raises:
            EnvironmentFault: Another process runs the line, or the scheduler does not answer or is not here.
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
        """Cancel what is in the queue if the run ends in an error; else there is nothing left to do."""
        self._queue.close()
        if not self._log.read().is_driven_by(self._identity):
            return  # what is in the queue is another driver's
        try:
            if kind is not None:
                self._cancel()
        finally:
            self._log.append("left", **self._identity)

    def stop(self) -> str | None:
        """Cancel what is in the queue, and say how much that was."""
        self._queue.close()
        if not self._log.read().is_driven_by(self._identity):
            return None
        try:
            count = len(self._cancel())
        except WsiflowError:
            return f"array jobs may still be in the queue, end them with wsiflow cancel {self._root}"
        return f"{count} array job{'s' * (count != 1)} cancelled"

    def _cancel(self) -> list[str]:
        """Let nobody submit anything more, and cancel what was submitted."""
        self._log.append("cancel")  # threads that still wait see it
        jobs.await_submissions(self._log)
        return jobs.drop_open(self._log, self._dialect)

    def run(self, work: Work, source: Path, stage: str, slices: Sequence[Slice]) -> Iterator[Outcome]:
        """Run the slices in arrays under the scheduler's limit, and yield outcomes as elements note them."""
        batch = self._begin({"work": element.dotted(work), "source": source.name, "stage": stage}, slices)
        try:
            yield from self._recall(batch.told)
            while batch.wanted:
                if batch.waiting and self._is_stopped():
                    yield from self._give_up(batch)
                self._submit(batch)
                poll = self._queue.poll()
                for array in tuple(batch.arrays):
                    yield from self._settle(batch, array, poll)
        finally:
            for array in batch.arrays:
                self._close(array, array.open)

    def _take_over(self, left: Sequence[jobs.Job]) -> None:
        """Find the arrays that an earlier driver left, and which of their elements live."""
        self._queue.hold((Place(job.name, -1) for job in left), finished=False)
        places = self._queue.poll().places
        if places is None:
            cause = f"{self._dialect.name} does not answer, and arrays of an earlier start may still be in its queue"
            raise EnvironmentFault(cause, "run again when it does", path=self._log.path)
        self._queue.release(Place(job.name, -1) for job in left)
        alive = {place: seen for place, seen in places.items() if self._dialect.is_alive(seen.state)}
        self._queue.hold(alive, finished=True)  # they count, though nobody may want their tasks
        ids = {place.name: seen.job for place, seen in alive.items()}
        if alive:
            _logger.info("%d elements that an earlier start submitted are in the queue: taken up again", len(alive))
        for name, job in left:
            table = json.loads((self._root / FOLDER / f"{name}.json").read_text(encoding="utf-8"))
            self._past[name] = Array(self._root, name, ids.get(name, job), table)
            if name in ids:
                self._left[name] = self._past[name]

    def _recall(self, told: Mapping[str, str]) -> Iterator[Outcome]:
        """Yield, for the trace alone, what elements noted while no driver was there to read it."""
        with self._lock:
            names = [name for name, array in self._past.items() if told.items() <= array.table.items()]
            arrays = [self._past.pop(name) for name in names]
        for array in arrays:
            files = array.files()
            for one in array.open:
                for outcome in one.read(files.get(one.place.number, ())):
                    yield outcome.with_usage(**self._known(array, one))._replace(retried=True)
            if array.name not in self._left:
                self._log.append("ended", name=array.name)

    def _begin(self, told: Mapping[str, str], slices: Sequence[Slice]) -> Batch:
        """Watch what is in the queue already; the rest waits."""
        batch = Batch(told, {task for lo, hi in slices for task in range(lo, hi)}, deque(), [])
        covered: set[int] = set()
        for left in self._left.values():
            array = Array(self._root, left.name, left.job, left.table)
            array.open = [
                one for one in array.open if self._queue.holds(one.place) and not batch.wanted.isdisjoint(one.missing)
            ]
            if array.open and told.items() <= array.table.items():
                self._queue.hold((one.place for one in array.open), finished=False)
                batch.arrays.append(array)
                covered.update(task for one in array.open for task in one.missing)
        for lo, hi in slices:
            lacking = (task for task in range(lo, hi) if task not in covered)
            batch.waiting.extend(Piece(*span, Tries()) for span in runs(lacking))
        return batch

    def _is_stopped(self) -> bool:
        """Tell whether the run was cancelled, or started again on another machine."""
        history = self._log.read()
        return history.cancelled or not history.is_driven_by(self._identity)

    def _give_up(self, batch: Batch) -> Iterator[Outcome]:
        """Say that what waits was cancelled."""
        while batch.waiting:
            piece = batch.waiting.popleft()
            for task in range(piece.lo, piece.hi):
                fault = EnvironmentFault("the run was cancelled", _REMEDIES["cancelled"], stage=batch.told["stage"])
                usage = {"exit_class": "cancelled"}
                yield from _wanted(batch, Outcome(task, None, executed=False, failure=fault.failure, usage=usage))

    def _submit(self, batch: Batch) -> None:
        """Submit what there is room for."""
        while batch.waiting:
            request = self._request(batch.waiting[0].tries)
            alike = itertools.takewhile(lambda piece: self._request(piece.tries) == request, batch.waiting)  # noqa: B023
            name = f"{batch.told['stage']}-{uuid.uuid4().hex[:12]}"
            size = self._queue.take(name, sum(1 for _ in alike), longest=self._limit())
            if not size:
                return
            pieces = [batch.waiting.popleft() for _ in range(size)]
            try:
                array = self._start(name, batch.told, request, pieces)
            except BaseException:
                self._queue.drop(name)  # others wait for that room
                raise
            if array is None:
                batch.waiting.extendleft(reversed(pieces))
                return
            batch.arrays.append(array)

    def _request(self, tries: Tries) -> dict[str, int]:
        """Return what to ask for: twice as much after each time it was too little, up to the limits."""
        params = self._params
        return {
            "memory_mb": min(params.memory_mb << tries.memory, params.memory_limit_mb),
            "minutes": min(params.minutes << tries.time, params.minutes_limit),
        }

    def _limit(self) -> int:
        """Return how many elements an array may have; the scheduler is asked once."""
        with self._lock:
            if not self._longest:
                told = jobs.call(self._dialect.limit).stdout
                self._longest = self._dialect.longest(told) or _LIMIT_UNKNOWN
            return self._longest

    def _start(
        self, name: str, told: Mapping[str, str], request: Mapping[str, int], pieces: Sequence[Piece]
    ) -> Array | None:
        """Publish an array's table, note the intent, submit it and note its id; None where it has to wait."""
        table = {
            **told,
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
        self._log.append("intent", name=name, **told, **request, elements=len(pieces), tasks=tasks)
        if self._is_stopped():  # whoever cancelled may have looked before that was noted
            self._log.append("ended", name=name)
            self._queue.drop(name)
            self._forget(name)
            return None
        job = self._send(name, len(pieces), request)
        if not job:
            return None
        self._log.append("job", name=name, job=job)
        size, asked = (len(pieces), tasks), (request["memory_mb"], request["minutes"])
        _logger.info("%s: job %s submitted, %d elements for %d tasks, %d MB and %d min each", name, job, *size, *asked)
        if self._is_stopped():  # whoever cancelled may have looked before it was in the queue
            jobs.drop(self._dialect, [self._dialect.whole.format(job=job)])
        return Array(self._root, name, job, table)

    def _send(self, name: str, size: int, request: Mapping[str, int]) -> str:
        """Submit an array and return its id; empty where it was refused and has to wait for others of the run to end.

        Raises:
            EnvironmentFault: It was refused again and again, though the run has nothing else in the queue.
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
            job = job or self._find(name)  # it may have been accepted though the answer was lost
            if job:
                return job
        self._log.append("ended", name=name)
        if self._queue.give_back(name):  # sites limit what a user may have in the queue, other runs included
            self._forget(name)
            refusal = (answer.stderr or answer.stdout).strip()
            _logger.warning("%s took no more, it is asked again later: %s", self._dialect.name, refusal)
            return ""
        cause = f"{self._dialect.name} refused an array of {size}: {(answer.stderr or answer.stdout).strip()}"
        raise EnvironmentFault(cause, "correct executor.array, then run again", path=self._log.path)

    def _forget(self, name: str) -> None:
        """Remove what was made for an array that was refused."""
        (self._root / FOLDER / f"{name}.json").unlink()
        (self._root / FOLDER / name).rmdir()
        (self._root / LOGS / name).rmdir()

    def _find(self, name: str) -> str:
        """Return the id of an array by its name; empty where the scheduler does not have it."""
        while (places := self._queue.poll().places) is None:
            pass
        return next((seen.job for place, seen in places.items() if place.name == name), "")

    def _settle(self, batch: Batch, array: Array, poll: Poll) -> Iterator[Outcome]:
        """Read what the elements of an array have noted, and judge those that are gone."""
        files = array.files()
        ended = []
        for one in array.open:
            known = self._known(array, one)
            for outcome in one.read(files.get(one.place.number, ())):
                yield from _wanted(batch, outcome.with_usage(**known))
            if one.missing and not self._is_lost(array, one, poll):
                continue
            ended.append(one)
            if one.missing:
                yield from self._replace(batch, array, one, known)
        self._close(array, ended)
        if not array.open:
            batch.arrays.remove(array)
        with self._lock:
            left = self._left.get(array.name)  # whose other elements may be another batch's, now or later
            if left is not None:
                over = {one.place for one in ended}
                left.open = [one for one in left.open if one.place not in over and self._queue.holds(one.place)]
        if not array.open and not (left and left.open):
            self._log.append("ended", name=array.name)

    def _close(self, array: Array, ended: Sequence[Element]) -> None:
        """Watch elements no more."""
        self._queue.finish(one.place for one in ended)
        array.open = [one for one in array.open if one not in ended]

    def _known(self, array: Array, one: Element) -> dict[str, Any]:
        """Return what the driver knows of an element's attempts."""
        return {"submitted": array.table["submitted"], "native_id": self._native(array, one)}

    def _native(self, array: Array, one: Element) -> str:
        return self._dialect.native.format(job=array.job, index=one.place.number)

    def _is_lost(self, array: Array, one: Element, poll: Poll) -> bool:
        """Tell whether an element is gone, and has been for so long that its files would have appeared."""
        if poll.places is None or poll.taken_s < array.since:  # no answer, or one that is older than the array
            return False
        seen = poll.places.get(one.place)
        if seen and (self._dialect.is_alive(seen.state) or not self._dialect.is_stuck(one.seen.state)):
            one.seen = seen
        if seen and self._dialect.is_alive(seen.state):
            one.gone_since = None
            return False
        if seen and self._dialect.is_stuck(seen.state):
            with contextlib.suppress(EnvironmentFault):  # it will be there at the next look
                jobs.drop(self._dialect, [self._native(array, one)])
            return False
        if one.gone_since is None:
            one.gone_since = poll.taken_s
        return poll.taken_s - one.gone_since >= self._params.grace_s

    def _replace(self, batch: Batch, array: Array, one: Element, known: Mapping[str, Any]) -> Iterator[Outcome]:
        """Let the tasks of a lost element wait again, or say why they do not."""
        cause = self._cause(array, one)
        at = one.under_way()
        charged = list(one.missing) if at is None or cause == "cancelled" else [at]
        tries = one.piece.tries.after(cause)
        over = cause == "cancelled" or tries.lost > self._params.retries
        process = one.process()
        if process:  # a driver on another machine could not tell that the process is gone
            publish.forget_attempts(self._root, process)
        usage = {**one.about(), **known, "exit_class": cause}
        failure = self._fault(array, one, cause, tries.lost).failure
        if not over:
            stage, log = array.table["stage"], array.logs / f"{one.place.number}.log"
            native = self._native(array, one)
            _logger.warning("%s: element %s was lost (%s) and is requeued; its log is %s", stage, native, cause, log)
        for task in charged:
            outcome = Outcome(task, None, executed=True, failure=failure, usage=usage, retried=not over)
            yield from _wanted(batch, outcome)
        again = [Piece(*span, tries) for span in runs(charged)] if not over else []
        spared = [Piece(*span, one.piece.tries) for span in runs(set(one.missing) - set(charged))]
        batch.waiting.extendleft(reversed(again + spared))

    def _cause(self, array: Array, one: Element) -> str:
        """Ask what became of an element."""
        if self._is_stopped():
            return "cancelled"
        command = expand(self._dialect.inspect, {"job": array.job, "index": one.place.number})
        answer = jobs.call(command)
        told = "" if answer.returncode else answer.stdout
        return self._dialect.cause(one.seen.state, told, began=one.began)

    def _fault(self, array: Array, one: Element, cause: str, lost: int) -> EnvironmentFault:
        """Return why the tasks of a lost element are not done."""
        request, stage = array.table["request"], array.table["stage"]
        asked = f"{request['memory_mb']} MB, {request['minutes']} min"
        fate = "it was cancelled" if cause == "cancelled" else f"its element died {lost} times, at last of {cause!r}"
        log = array.logs / f"{one.place.number}.log"
        remedy = _REMEDIES.get(cause, "read the log, then run again")
        return EnvironmentFault(f"{fate} ({self._native(array, one)}, {asked}; log {log})", remedy, stage=stage)


def _wanted(batch: Batch, outcome: Outcome) -> Iterator[Outcome]:
    """Yield an outcome if its task's is still to be told."""
    if outcome.task not in batch.wanted:
        return
    if not outcome.retried:
        batch.wanted.discard(outcome.task)
    yield outcome


def runs(tasks: Iterable[int]) -> Iterator[Slice]:
    """Yield the ranges that hold exactly these tasks, rising."""
    lo = hi = None
    for task in sorted(tasks):
        if task != hi:
            if lo is not None and hi is not None:
                yield Slice(lo, hi)
            lo = task
        hi = task + 1
    if lo is not None and hi is not None:
        yield Slice(lo, hi)
