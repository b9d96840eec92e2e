"""Run tasks in array jobs, on Slurm, Grid Engine or any other scheduler that has a dialect.

The tasks are posted as pieces of work in the run's folder (`wsiflow.run.executor.pieces`), whichever stage and shard
they belong to. Elements take piece after piece, and write outcomes to files, which the driver reads. The driver submits
as many elements as there are pieces that no element is free for (`wsiflow.run.executor.submitter`).

Where an element is gone and did not say that it ended, the scheduler is asked for the cause
(`wsiflow.run.executor.ends`). The task that was running is charged with an attempt and becomes a piece of its own; its
neighbours are not charged. What waits and runs is told as it changes (`wsiflow.run.executor.queue_watch`). A driver
that is killed leaves its arrays in the queue, whose elements go on with what is posted. The next driver withdraws what
nobody has taken, and waits for the rest instead of posting it again.
"""

import contextlib
import itertools
import json
import logging
import math
import re
import threading
import time
import uuid
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

from wsiflow.errors import EnvironmentFault, Failure, WsiflowError
from wsiflow.run.executor import bounds, element, ends, jobs, lifetime, pieces, submission
from wsiflow.run.executor.dialect import ArrayParams, Charge, Place, Seen
from wsiflow.run.executor.ends import End
from wsiflow.run.executor.jobs import JobLog
from wsiflow.run.executor.params import ExecutorParams
from wsiflow.run.executor.pieces import FOLDER, Call, Piece, Request, Tries
from wsiflow.run.executor.protocol import Outcome, Site, Slice, Work
from wsiflow.run.executor.queue_watch import QueueWatch
from wsiflow.run.executor.submitter import Nodes, Submitter
from wsiflow.run.executor.watch import Array, Element, Files, Poll, Queue, logs_of
from wsiflow.system import publish
from wsiflow.system.notes import NOTES
from wsiflow.system.usage import now

_logger = logging.getLogger(__name__)

_WORTH_S = 60.0  # of work justify the start of an element
_LOOK_S = 1.0  # between two looks at the files of elements; longer where a look takes long
_LOOKS_SHARE = 0.1  # of the driver's time


class Batch(NamedTuple):
    """One call of `ArrayJobs.run`.

    Attributes:
        call: What is done with its tasks.
        unfinished: Tasks whose last outcome has not come yet.
        inbox: Outcomes to be yielded.
    """

    call: Call
    unfinished: set[int]
    inbox: deque[Outcome]

    def accept(self, outcome: Outcome) -> None:
        """Keep an outcome, unless the last outcome of its task has come already."""
        if outcome.task not in self.unfinished:
            return
        if not outcome.retried:
            self.unfinished.discard(outcome.task)
        self.inbox.append(outcome)


class Posted(NamedTuple):
    """A piece that was posted: the batch it belongs to, and those of its tasks of which no outcome has come, in order.

    The batch is None where an element of an earlier start has it, and no batch has asked for its tasks yet. It is
    expected to take so many core-seconds; 0 where nobody knows.
    """

    piece: Piece
    batch: Batch | None
    missing: dict[int, None]
    expected_s: float = 0.0


def make(params: ExecutorParams, site: Site) -> "ArrayJobs":
    """Return the executor for the scheduler that the settings describe."""
    assert params.array is not None, "the settings of this kind have it"
    nodes = Nodes(site.needs, site.numeric_class)
    return ArrayJobs(params.array, root=site.root, workers=params.workers, threads=params.threads, nodes=nodes)


class ArrayJobs:
    """The executor of array jobs; several threads may call `run` at once."""

    def __init__(
        self, params: ArrayParams, *, root: Path, workers: int, threads: int, nodes: "Nodes | None" = None
    ) -> None:
        """Store the settings; the scheduler is not called yet.

        Args:
            params: How arrays are submitted and watched.
            root: The run's folder, which has the same path on every node.
            workers: Most elements in the queue at a time, over all arrays; 0: ``params.window``.
            threads: Number of threads of the network in each element.
            nodes: What every node must have; None for nothing.
        """
        self._params, self._dialect, self._root = params, params.dialect, root.resolve()
        self._form = submission.Form(params, self._root, workers, threads)
        self._requests = ends.Requests(params)
        self._log, self._queue = JobLog(self._root), Queue(params, workers=workers)
        self._watch = QueueWatch(params, self._root)
        self._submitter = Submitter(self._form, self._log, self._queue, self._watch, self._is_stopped)
        self._submitter.nodes = nodes or Nodes()
        self._arrays: list[Array] = []
        self._posted: dict[str, Posted] = {}
        self._past: list[tuple[Call, Outcome]] = []  # outcomes that elements wrote while nobody read them
        self._fruitless: dict[Request, dict[str, End]] = {}  # arrays whose elements died before any work, and how
        self._cancelled: set[Request] = set()  # elements with these were cancelled by somebody
        self._has_begun = False
        self._requeued = "", float("-inf"), ""  # the array whose elements were requeued last, when it was seen, and why
        self._adrift: dict[str, float] = {}  # since when nobody is known to have a piece
        self._order = itertools.count()
        self._state, self._turn = threading.RLock(), threading.Lock()
        self._turned_s, self._pause_s, self._checked_s = float("-inf"), 0.0, float("-inf")
        self._identity = jobs.identity()

    def __enter__(self) -> Self:
        """Record this process as the driver, and find the arrays that an earlier driver left in the queue.

        Raises:
            EnvironmentFault: Another process drives the run, the scheduler does not answer or is not installed, or no
                node can meet what is requested.
        """
        jobs.require_alone(self._log)
        jobs.require_answer(self._dialect)
        self._requests.bounds = bounds.read(self._params)
        self._requests.bounds.require(**self._request(Tries())._asdict(), threads=self._form.threads)
        left = self._log.read().jobs
        (self._root / FOLDER).mkdir(parents=True, exist_ok=True)
        script = element.script(self._params.prologue)
        publish.write_view(self._root, str(self._form.script.relative_to(self._root)), script.encode())
        self._log.append("driver", **self._identity, dialect=self._dialect.model_dump(mode="json"))
        pieces.withdraw(self._root, pieces.posted(self._root))
        (self._root / pieces.CLOSED).unlink(missing_ok=True)
        if left:
            self._take_over(left)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_exc: object) -> None:
        """Let the elements end that have nothing to do, or cancel all where the run ends in an error."""
        self._queue.close()
        if not self._log.read().is_driven_by(self._identity):
            return  # the arrays in the queue belong to another driver
        try:
            if kind is not None:
                self._cancel()
            else:
                self._dismiss()
        finally:
            self._watch.end()
            self._log.append("left", **self._identity)

    def stop(self) -> str | None:
        """Cancel the arrays in the queue, and return in words how many they were."""
        self._queue.close()
        if not self._log.read().is_driven_by(self._identity):
            return None
        try:
            count = len(self._cancel())
        except WsiflowError:
            return jobs.may_be_left(self._root)
        return f"{count} array job{'s' * (count != 1)} cancelled"

    def _cancel(self) -> list[str]:
        """Record the cancellation, so that no thread submits anything more, and cancel what was submitted."""
        self._log.append("cancel")  # threads that still wait read it
        pieces.close(self._root)
        jobs.await_submissions(self._log)
        return jobs.drop_open(self._log, self._dialect)

    def _dismiss(self) -> None:
        """Let idle elements end by themselves, and cancel arrays of which some have not begun."""
        pieces.close(self._root)
        places = jobs.listing(self._dialect, [array.name for array in self._arrays])
        if places is None:
            return  # the next start of the run, or nobody, finds them
        alive = {place: seen for place, seen in places.items() if self._dialect.is_alive(seen.state)}
        waiting = {place.name: seen.job for place, seen in alive.items() if self._dialect.is_pending(seen.state)}
        with contextlib.suppress(EnvironmentFault):  # all is done: elements that begin later end at once
            jobs.drop(self._dialect, [self._dialect.whole.format(job=job) for job in waiting.values()])
        for array in self._arrays:
            self._log.append("ended", name=array.name)

    def run(self, work: Work, source: Path, stage: str, slices: Sequence[Slice]) -> Iterator[Outcome]:
        """Post the slices for elements to take, and yield outcomes as elements write them.

        Raises:
            EnvironmentFault: The scheduler refuses arrays or does not answer, or the executor was closed.
        """
        tasks = {task for part in slices for task in part.tasks}
        name = source.resolve().relative_to(self._root).as_posix()  # of the first pass of a cascade in a folder there
        batch = Batch(Call(element.dotted(work), name, stage), tasks, deque())
        try:
            yield from self._begin(batch, slices)
            while batch.unfinished or batch.inbox:
                while batch.inbox:
                    yield batch.inbox.popleft()
                if batch.unfinished:
                    self._take_turn()
        finally:
            self._leave(batch)

    def _take_over(self, left: Sequence[jobs.Job]) -> None:
        """Find the arrays that an earlier driver left, which of their elements are alive, and what these are doing.

        Raises:
            EnvironmentFault: The scheduler does not answer.
        """
        self._queue.hold(Place(job.name, -1) for job in left)
        places = self._queue.poll().places
        if places is None:
            cause = f"{self._dialect.name} does not answer, and arrays of an earlier start may still be in its queue"
            raise EnvironmentFault(cause, "run again when it does", path=self._log.path)
        self._queue.release(Place(job.name, -1) for job in left)
        alive = {place: seen for place, seen in places.items() if self._dialect.is_alive(seen.state)}
        self._queue.hold(alive)
        ids = {place.name: seen.job for place, seen in alive.items()}
        if alive:
            _logger.info(
                "%d elements that an earlier start submitted are in the queue and are watched again", len(alive)
            )
        for name, job in left:
            table = json.loads((self._root / FOLDER / f"{name}.json").read_text(encoding="utf-8"))
            array = Array(self._root, name, ids.get(name, job), table)
            self._take_over_array(array, {one.place for one in array.open} & alive.keys())

    def _take_over_array(self, array: Array, alive: Collection[Place]) -> None:
        """Read what the elements of an array have written, and watch on those that are alive."""
        files = array.look()
        for one in array.open:
            done: set[int] = set()
            for name, outcome in one.read(files.written.get(one.place.number, ())):
                done.add(outcome.task)
                if name in one.taken:  # files of earlier versions name no pieces
                    known = self._known(array, one, one.taken[name])
                    self._past.append((one.taken[name].call, outcome.with_usage(**known)))
            for name in files.taken.get(one.place.number, ()):
                if one.place in alive:
                    piece = pieces.read(self._root, array.name, one.place.number, name)
                    self._posted[name] = Posted(piece, None, dict.fromkeys(sorted({*piece.tasks} - done)))
                else:
                    pieces.finish(self._root, array.name, one.place.number, name)
        array.open = [one for one in array.open if one.place in alive]
        if array.open:
            self._arrays.append(array)
        else:
            self._log.append("ended", name=array.name)

    def _begin(self, batch: Batch, slices: Sequence[Slice]) -> Iterator[Outcome]:
        """Post the tasks of a batch that no element of an earlier start has.

        Yields:
            The outcomes that elements wrote while no driver was running; only the trace uses them.
        """
        with self._state:
            past = [outcome for call, outcome in self._past if call == batch.call]
            self._past = [each for each in self._past if each[0] != batch.call]
            covered: set[int] = set()
            for name, left in tuple(self._posted.items()):
                missing = {task: None for task in left.missing if task in batch.unfinished}
                if missing and left.batch is None and left.piece.call == batch.call:
                    self._posted[name] = Posted(left.piece, batch, missing)
                    covered |= missing.keys()
            for part in slices:
                for lo, hi in runs(task for task in part.tasks if task not in covered):
                    self._post(batch, Piece(batch.call, lo, hi), part.expected_s)
        for outcome in past:
            yield outcome._replace(retried=True)

    def _post(self, batch: Batch, piece: Piece, expected_s: float = 0.0) -> None:
        piece = piece._replace(posted=now())
        name = pieces.post(self._root, piece, self._request(piece.tries), next(self._order))
        self._posted[name] = Posted(piece, batch, dict.fromkeys(piece.tasks), expected_s)

    def _leave(self, batch: Batch) -> None:
        """Withdraw what is left of a batch whose caller does not wait for it any longer."""
        with self._state:
            names = [name for name, posted in self._posted.items() if posted.batch is batch]
            pieces.withdraw(self._root, names)
            for name in names:
                del self._posted[name]

    def _take_turn(self) -> None:
        """Read what elements have written and submit what is needed, for all batches; or wait for a thread that does.

        Raises:
            EnvironmentFault: The scheduler refuses arrays, or the executor was closed.
        """
        began_s = time.monotonic()
        with self._turn:
            if self._turned_s >= began_s:
                return
            self._queue.pause(self._turned_s + self._pause_s - time.monotonic())
            poll = self._queue.latest()
            looked_s = time.monotonic()
            with self._state:
                self._see_after(poll)
            self._turned_s = time.monotonic()
            self._pause_s = max(min(_LOOK_S, self._params.poll_s), (self._turned_s - looked_s) / _LOOKS_SHARE)

    def _see_after(self, poll: Poll) -> None:
        """Deliver outcomes, replace elements that are lost, and submit elements for pieces that nobody is free for."""
        listed = pieces.posted(self._root)  # before the elements: what is taken meanwhile is in both
        busy: set[Place] = set()
        had: set[str] = set()
        for array in tuple(self._arrays):
            files = array.look()
            working = self._collect(array, files, poll)
            busy |= working
            had.update(name for place in working for name in files.taken[place.number])
        waiting = [name for name in listed if name in self._posted]
        is_new, self._checked_s = poll.taken_s > self._checked_s, poll.taken_s
        if is_new and waiting and self._is_stopped():
            fault = EnvironmentFault("the run was cancelled", self._requests.remedy("cancelled"))
            self._give_up(waiting, fault.failure, "cancelled")
            return
        if is_new:
            self._refuse_hopeless(poll)
        self._catch(self._posted.keys() - had - {*waiting})
        for request in {pieces.request_of(name): None for name in waiting}:
            self._staff(request, [name for name in waiting if pieces.request_of(name) == request], busy)
        self._watch.show(self._arrays, poll)

    def _refuse_hopeless(self, poll: Poll) -> None:
        """Cancel elements that the scheduler will never start, and remember why it will not."""
        for array, places, reason in self._watch.hopeless(tuple(self._arrays), poll):
            with contextlib.suppress(EnvironmentFault):  # it is tried again after the next poll
                jobs.drop(self._dialect, [self._native(array, place.number) for place in places])
                self._fruitless.setdefault(array.request, {})[array.name] = End(
                    "start", f"{self._dialect.name} never starts it: {reason}"
                )
                self._end_of(array, [one for one in array.open if one.place in places])

    def _end_of(self, array: Array, ended: Collection[Element]) -> None:
        """Expect nothing more of some elements of an array, and nothing of the array where these were the last."""
        self._queue.finish(one.place for one in ended)
        array.open = [one for one in array.open if one not in ended]
        if not array.open:
            self._arrays.remove(array)
            self._log.append("ended", name=array.name)

    def _is_stopped(self) -> bool:
        """Tell whether the run was cancelled, or has a newer driver on another machine."""
        history = self._log.read()
        return history.cancelled or not history.is_driven_by(self._identity)

    def _staff(self, request: Request, waiting: Sequence[str], busy: Collection[Place]) -> None:
        """Submit elements for the waiting pieces of a request, if the elements in the queue are too few.

        Pieces that are known to be small share an element, whose start takes as long as they do.
        """
        present = [one.place for array in self._arrays if array.request == request for one in array.open]
        fruitless = self._fruitless.get(request, {})
        again = self._after_fruitless(request, waiting[0]) if fruitless else Tries()
        if request in self._cancelled or again is None:
            if not present:
                self._give_up_request(request, waiting)
            return
        worth = sum(min(1.0, (self._posted[name].expected_s or _WORTH_S) / _WORTH_S) for name in waiting)
        needed = math.ceil(worth) - sum(place not in busy for place in present)
        if needed <= 0 or self._submitter.is_waiting:
            return
        if fruitless and not present and self._request(again) != request:
            self._post_again(waiting, next(reversed(fruitless.values())).cause, request)
            return
        stages = [*dict.fromkeys(self._posted[name].piece.call.stage for name in waiting)]
        while needed > 0:
            name = f"{self._form.job_name()}-{stages[0]}-{uuid.uuid4().hex[:12]}"
            size = self._queue.take(name, needed, longest=self._submitter.longest())
            if not size or not self._submit(name, request, size, ", ".join(stages)):
                return
            needed -= size

    def _after_fruitless(self, request: Request, name: str) -> Tries | None:
        """Return the tries of a waiting piece after elements for it died before any work; None for no more of them."""
        died = self._fruitless[request]
        end, tries = next(reversed(died.values())), self._posted[name].piece.tries
        if end.cause in {"memory", "time"}:
            return self._requests.after(tries, end.cause, request)
        return None if end.cause == "start" or len(died) > self._params.retries else tries

    def _submit(self, name: str, request: Request, size: int, stages: str) -> bool:
        """Submit an array of elements for some stages; return whether it is in the queue now."""
        try:
            array = self._submitter.start(name, request, size, stages)
        except BaseException:
            self._queue.drop(name)  # other requests wait for its room
            raise
        if array is not None:
            self._arrays.append(array)
        return array is not None

    def _give_up_request(self, request: Request, names: Sequence[str]) -> None:
        """Give up the waiting pieces of a request: somebody cancelled its elements, or they died before any work."""
        if request in self._cancelled:
            fault = EnvironmentFault("its elements were cancelled", self._requests.remedy("cancelled"))
            self._give_up(names, fault.failure, "cancelled")
            return
        array, end = next(reversed(self._fruitless[request].items()))
        job = next((line["job"] for line in self._log.lines() if line.get("name") == array and "job" in line), "")
        log = logs_of(self._root, array, job) / f"{self._dialect.base}.log"
        native, count = self._dialect.whole.format(job=job), len(self._fruitless[request])
        cause = ends.describe(end, native=native, times=count, request=request, log=log)
        fault = EnvironmentFault(f"no element for it did any work: {cause}", self._requests.remedy(end.cause))
        self._give_up(names, fault.failure, end.cause)

    def _give_up(self, names: Iterable[str], failure: Failure, cause: str) -> None:
        """Withdraw pieces, and deliver failures as the outcomes of their tasks."""
        for name in pieces.withdraw(self._root, names):
            posted = self._posted.pop(name)
            for task in posted.missing:
                if posted.batch:
                    own, usage = failure.about(stage=posted.piece.call.stage), {"exit_class": cause}
                    posted.batch.accept(Outcome(task, None, executed=False, failure=own, usage=usage))

    def _post_again(self, names: Sequence[str], cause: str, had: Request) -> None:
        """Post waiting pieces for elements with more: those with as little as was requested died before any work."""
        for name in pieces.withdraw(self._root, names):
            posted = self._posted.pop(name)
            tries = self._requests.after(posted.piece.tries, cause, had)
            if posted.batch and tries is not None:
                self._post(posted.batch, posted.piece._replace(tries=tries))

    def _catch(self, names: Collection[str]) -> None:
        """Post again what nobody is known to have: an element that was given up has taken it, and may be gone."""
        moment = time.monotonic()
        self._adrift = {name: self._adrift.get(name, moment) for name in names}
        for name, since in tuple(self._adrift.items()):
            if moment - since > self._params.grace_s:
                posted = self._posted.pop(name)
                for span in runs(posted.missing):
                    if posted.batch:
                        self._post(posted.batch, posted.piece._replace(lo=span[0], hi=span[1]))

    def _request(self, tries: Tries) -> Request:
        """Return the memory (MB) and the minutes to request after earlier tries."""
        return self._requests.of(tries)

    def _collect(self, array: Array, files: Files, poll: Poll) -> set[Place]:
        """Deliver the new outcomes of an array, replace its elements that are lost, and return those that work."""
        ended, working = [], set()
        for one in array.open:
            has = files.taken.get(one.place.number, ())
            for name, outcome in one.read(files.written.get(one.place.number, ())):
                self._deliver(array, one, name, outcome)
            if has:
                self._fruitless.pop(array.request, None)
                self._greet(array, one)
            if one.ended:
                ended.append(one)
            elif self._is_lost(array, one, poll):
                ended.append(one)
                self._replace(array, one, has)
            elif has:
                working.add(one.place)
        if ended or not array.open:
            self._end_of(array, ended)
        return working

    def _greet(self, array: Array, one: Element) -> None:
        """Tell where the first element works, and that it found what tasks need."""
        if self._has_begun or not (node := one.node()):
            return
        self._has_begun = True
        about = ", ".join(f"{node[key]}{' cores' * (key == 'cores')}" for key in ("cores", "isa") if key in node)
        text = "elements   %s is the first to work, on %s (%s): it sees the run's folder%s"
        n_needs = len(self._submitter.nodes.needs)
        more = f" and {n_needs} other path{'s' * (n_needs != 1)}" if n_needs else ""
        NOTES.info(text, self._native(array, one.place.number), node.get("host", "?"), about, more)

    def _deliver(self, array: Array, one: Element, name: str, outcome: Outcome) -> None:
        """Hand an outcome to the batch that its piece belongs to; of a piece that nobody knows, the outcome is old."""
        posted = self._posted.get(name)
        if posted is None:
            return
        outcome = outcome.with_usage(**self._known(array, one, posted.piece))
        if not self._submitter.nodes.kind and (outcome.receipt or {}).get(
            "numeric_class"
        ):  # of the task that chooses the engine
            self._submitter.nodes = self._submitter.nodes._replace(kind=(outcome.receipt or {})["numeric_class"])
        if outcome.failure and (outcome.usage or {}).get("exit_class") == "memory" and posted.batch:
            outcome = self._with_more_memory(array, posted, outcome)
        if not outcome.retried:
            posted.missing.pop(outcome.task, None)
        if posted.batch is None:
            self._past.append((posted.piece.call, outcome))
            return
        posted.batch.accept(outcome)
        if not posted.missing:
            del self._posted[name]

    def _with_more_memory(self, array: Array, posted: Posted, outcome: Outcome) -> Outcome:
        """Post a task again that failed for lack of memory, and return its outcome as that of a lost attempt.

        Under a limit of address space no element dies of it: allocations fail. Where no more can be requested, the
        outcome stays the last one, with the bound as its remedy.
        """
        assert posted.batch is not None, "the caller asked"
        assert outcome.failure is not None, "the caller asked"
        tries = self._requests.after(posted.piece.tries, "memory", array.request)
        if tries is None:
            had = f"{outcome.failure.cause} (in an element of {array.request.memory_mb:,} MB)"
            return outcome._replace(
                failure=outcome.failure._replace(cause=had, remedy=self._requests.remedy("memory"), exit_code=30)
            )
        _logger.warning(
            "%s: %s; task %d is posted again for an element with more memory than %s MB",
            posted.piece.call.stage,
            " ".join(outcome.failure.cause.split()),
            outcome.task,
            f"{array.request.memory_mb:,}",
        )
        posted.missing.pop(outcome.task, None)
        self._post(posted.batch, Piece(posted.piece.call, outcome.task, outcome.task + 1, tries))
        return outcome._replace(retried=True)

    def _known(self, array: Array, one: Element, piece: Piece) -> dict[str, Any]:
        """Return when a piece was posted, and the scheduler's id of the element that took it, for the trace."""
        return {"submitted": piece.posted, "native_id": self._native(array, one.place.number)}

    def _native(self, array: Array, index: int) -> str:
        return self._dialect.native.format(job=array.job, index=index)

    def _is_lost(self, array: Array, one: Element, poll: Poll) -> bool:
        """Tell whether an element has been gone for so long that its files would have appeared."""
        if poll.places is None or poll.taken_s < array.since:  # no answer, or an answer from before the submission
            return False
        seen = poll.places.get(one.place)
        if seen and (self._dialect.is_alive(seen.state) or not self._dialect.is_stuck(one.seen.state)):
            one.seen = seen
        if seen and self._dialect.is_alive(seen.state):
            self._see_running(array, one, seen, poll)
        if one.unfit:  # it has ended by itself, and said why
            return True
        if one.warned_s is not None and seen is None:
            return True
        if seen is None or not (self._dialect.is_alive(seen.state) or self._dialect.is_stuck(seen.state)):
            return self._is_gone_for_good(array, one, poll)
        if self._dialect.is_stuck(seen.state):
            self._free(array, one)
        else:
            one.gone_since = None
        return False

    def _see_running(self, array: Array, one: Element, seen: Seen, poll: Poll) -> None:
        """Note since when an element runs, and tell where one that ran waits again."""
        if not self._dialect.is_pending(seen.state):
            one.running_since = one.running_since or poll.taken_s
        elif one.running_since is not None:
            one.running_since = None
            if self._requeued[:2] != (array.name, poll.taken_s):  # elements of an array that are stopped at once
                why = ends.why_requeued(self._params, {"job": array.job, "index": one.place.number})
                self._requeued = array.name, poll.taken_s, why
            one.requeued_for = self._requeued[2]
            what = "was preempted by other jobs" if one.requeued_for == "preempted" else "was stopped by its scheduler"
            reason = f" ({seen.reason})" if seen.reason not in {"", "None"} else ""
            text = "element %s %s and waits to be started again%s; what it had done is kept"
            _logger.warning(text, self._native(array, one.place.number), what, reason)

    def _free(self, array: Array, one: Element) -> None:
        """Cancel an element that is stuck, and keep the reason, which is gone with it."""
        one.seen = one.seen._replace(reason=one.seen.reason or self._watch.reason_of(array))
        with contextlib.suppress(EnvironmentFault):  # it is cancelled after the next poll
            jobs.drop(self._dialect, [self._native(array, one.place.number)])

    def _is_gone_for_good(self, array: Array, one: Element, poll: Poll) -> bool:
        """Tell whether an element that the queue does not list has been gone for long, and is unknown by its id too."""
        if one.gone_since is None:
            one.gone_since = poll.taken_s
            self._tell_gone(array, one)
        if poll.taken_s - one.gone_since < self._params.grace_s:
            return False
        if self._is_listed_wrongly(array, one):
            one.gone_since = None
        return one.gone_since is not None

    def _tell_gone(self, array: Array, one: Element) -> None:
        """Tell at once that somebody, or the scheduler, has ended an element; the rest follows when files are here."""
        if self._dialect.cause(one.seen.state, "", began=True) not in {"lost", "killed"}:
            text = "element %s has ended as %s; what it wrote is awaited for %.0f s"
            native = self._native(array, one.place.number)
            _logger.warning(text, native, one.seen.state, self._params.grace_s)

    def _is_listed_wrongly(self, array: Array, one: Element) -> bool:
        """Tell whether an element that the queue does not list waits or runs all the same, asked by its id."""
        place = {"job": array.job, "index": one.place.number}
        return bool(self._dialect.lives) and bool(re.search(self._dialect.lives, ends.report_of(self._params, place)))

    def _replace(self, array: Array, one: Element, has: Sequence[str]) -> None:
        """Post again what a lost element had taken, and deliver the lost attempt of the task that was running.

        Where the element was cancelled or a task has no attempts left, the outcome is the last one of the task.
        """
        log = array.logs / f"{one.place.number}.log"
        end, native = self._how_ended(array, one, log), self._native(array, one.place.number)
        self._note_charge(array, one, end)
        process = one.process()
        if process:  # a driver on another machine cannot see that the process is gone
            publish.forget_attempts(self._root, process)
        if end.cause == "cancelled":
            self._cancelled.add(array.request)
        if not has:
            if end.cause not in {"cancelled", "preempted"}:
                self._fruitless.setdefault(array.request, {})[array.name] = end
            when = "while it had no work" if one.taken else "before it took any work"
            _logger.warning("element %s died (%s) %s; its %s", native, end, when, ends.ending(log))
        for name in has:
            pieces.finish(self._root, array.name, one.place.number, name)
            posted = self._posted.pop(name, None)
            if posted and posted.batch:
                again = self._charge(array, one, name, posted, end)
                fate = "and its work is posted again" if again else "and its work is given up"
                stage = posted.piece.call.stage
                _logger.warning("%s: element %s was lost (%s) %s; its %s", stage, native, end, fate, ends.ending(log))

    def _note_charge(self, array: Array, one: Element, end: End) -> None:
        """Note what the scheduler charges for a lost element, or how long it was seen to run where nobody noted it."""
        charge = end.charge or (None if one.latest else Charge(self._form.threads, one.ran_s))
        if charge is not None:
            job = element.job_of(one.latest or self._root / FOLDER / array.name / f"{one.place.number}.jsonl")
            life = lifetime.Life(job, charge.cores, charge.seconds, charged=True)
            lifetime.note_charge(self._root, f"charged-{job}", life)

    def _charge(self, array: Array, one: Element, name: str, posted: Posted, end: End) -> bool:
        """Charge the task that was running with a lost attempt, and post all that is left; return whether it is."""
        batch, piece, (running_in, running) = posted.batch, posted.piece, one.running()
        assert batch is not None, "only pieces of batches are charged"
        is_running = running in posted.missing and running_in == name and end.cause != "cancelled"
        charged = [running] if is_running and running is not None else list(posted.missing)
        tries = self._requests.after(piece.tries, end.cause, array.request)
        usage = {**one.about(), **self._known(array, one, piece), "exit_class": end.cause}
        failure = self._fault(array, one, end, piece.tries.lost + 1).failure.about(stage=piece.call.stage)
        for task in charged:
            batch.accept(Outcome(task, None, executed=True, failure=failure, usage=usage, retried=tries is not None))
        if tries is not None:
            for span in runs(charged):
                self._post(batch, Piece(piece.call, *span, tries))
        for span in runs(set(posted.missing) - set(charged)):
            self._post(batch, Piece(piece.call, *span, piece.tries))
        return tries is not None

    def _how_ended(self, array: Array, one: Element, log: Path) -> End:
        """Return how an element was lost."""
        if self._is_stopped():
            return End("cancelled")
        place = {"job": array.job, "index": one.place.number}
        told = ends.Told(one.began, one.unfit, one.warned_s, ends.last_line(log))
        return ends.of_element(self._params, one.seen, place, array.request, told)

    def _fault(self, array: Array, one: Element, end: End, lost: int) -> EnvironmentFault:
        """Return the error of the tasks of a lost element."""
        log, native = array.logs / f"{one.place.number}.log", self._native(array, one.place.number)
        cause = ends.describe(end, native=native, times=lost, request=array.request, log=log)
        return EnvironmentFault(cause, self._requests.remedy(end.cause))


def runs(tasks: Iterable[int]) -> Iterator[tuple[int, int]]:
    """Yield the ranges that together contain exactly these tasks, in rising order."""
    lo = hi = None
    for task in sorted(tasks):
        if task != hi:
            if lo is not None and hi is not None:
                yield lo, hi
            lo = task
        hi = task + 1
    if lo is not None and hi is not None:
        yield lo, hi
