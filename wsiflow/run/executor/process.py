"""Run tasks in a pool of worker processes on this machine.

Workers are started fresh (spawn), keep to their share of the cores, and end by themselves when their parent is gone,
so that a killed run leaves nothing behind. A worker that dies (out of memory, a decoder's crash) breaks the whole pool;
the tasks that were under way are then tried again, each in a worker of its own, so that the one that kills it fails
alone.
"""

import logging
import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import CancelledError, Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path
from typing import Self

from wsiflow.errors import EnvironmentFault
from wsiflow.run.executor.params import ExecutorParams, worker_count
from wsiflow.run.executor.protocol import Outcome, Site, Slice, Work, closed
from wsiflow.system import faults, processes
from wsiflow.system.machine import limit_threads
from wsiflow.system.usage import now

_WAITING = 2  # slices handed over beyond those at work, so that no worker waits for the next

_logger = logging.getLogger(__name__)
_LOST = EnvironmentFault("a worker process died while it was under way", "nothing to do: it is tried again")

_Landed = deque[Future[list[Outcome]]]


def make(params: ExecutorParams, site: Site) -> "ProcessPool":
    """Return a pool of the size that the settings say."""
    return ProcessPool(worker_count(params, cores=site.cores), threads=params.threads)


class ProcessPool:
    """A pool that several threads may feed at once."""

    def __init__(self, workers: int, *, threads: int) -> None:
        """Remember the size; workers start with the first task."""
        self._workers, self._threads = workers, threads
        self._pool: ProcessPoolExecutor | None = None
        self._single: ProcessPoolExecutor | None = None
        self._lock = threading.Lock()
        self._alone = threading.Lock()
        self._closed = False
        self._changed = threading.Condition()
        self._flying, self._room = 0, workers + _WAITING  # what a worker's death takes along stays little

    def __enter__(self) -> Self:
        """Return the pool."""
        return self

    def __exit__(self, kind: type[BaseException] | None, *_exc: object) -> None:
        """Stop the workers, at once if the run ends in an error; tasks that have not started are dropped."""
        self._close(kill=kind is not None)

    def stop(self) -> None:
        """Kill the workers; their attempts are swept by the next start, as those of any killed process."""
        self._close(kill=True)

    def _close(self, *, kill: bool) -> None:
        with self._changed:
            self._closed = True  # a run that is ended from outside loses its workers too: they must not start again
            self._changed.notify_all()
        with self._lock:
            pools = [pool for pool in (self._pool, self._single) if pool is not None]
        for pool in pools:
            if kill:
                for process in list((pool._processes or {}).values()):  # noqa: SLF001 - public from Python 3.14 on
                    process.kill()
            pool.shutdown(cancel_futures=True)

    def run(self, work: Work, source: Path, stage: str, slices: Sequence[Slice]) -> Iterator[Outcome]:
        """Run the slices in the order given as far as workers are free; all callers together have few in flight."""
        waiting = deque(slices)
        flying: dict[Future[list[Outcome]], tuple[Slice, str]] = {}
        landed: _Landed = deque()
        lost: list[Slice] = []
        try:
            while waiting or flying:
                if self._place(wanted=bool(waiting), landed=landed):
                    part = waiting.popleft()
                    flying[self._submit(work, source, stage, part, landed)] = part, now()
                while landed:
                    future = landed.popleft()
                    part, submitted = flying.pop(future)
                    outcomes = self._outcomes(future)
                    if outcomes is None:
                        _logger.warning("%s: a worker died, tasks %d to %d are tried again", stage, *_ends(part))
                        lost.append(part)
                    else:
                        yield from (outcome.with_usage(submitted=submitted) for outcome in outcomes)
        finally:
            for future in flying:  # the caller wants no more, or an error ended this
                future.cancel()
        for lo, hi in sorted(lost):
            for index in range(lo, hi):
                yield Outcome(
                    index, None, executed=True, failure=_LOST.failure, usage={"exit_class": "killed"}, retried=True
                )
                yield self._run_alone(work, source, stage, index)

    def _place(self, *, wanted: bool, landed: _Landed) -> bool:
        """Wait until something has landed or a place is free that is wanted; take the place, and say so."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or landed or (wanted and self._flying < self._room))
            self._check_open()
            taken = wanted and self._flying < self._room
            self._flying += taken
        return taken

    def _land(self, landed: _Landed, future: Future[list[Outcome]]) -> None:
        """Give back the place of a future that has ended in whatever way, whether or not anybody waits for it."""
        with self._changed:
            self._flying -= 1
            landed.append(future)
            self._changed.notify_all()

    def _run_alone(self, work: Work, source: Path, stage: str, index: int) -> Outcome:
        """Run a task in a worker of its own, one such task at a time; other shards keep the pool."""
        submitted = now()
        with self._alone:
            with self._lock:
                self._check_open()
                self._single = single = self._start(1)
                future = single.submit(_collect, work, source, stage, Slice(index, index + 1))
            with single:
                outcomes = self._outcomes(future)
        if outcomes is not None:
            return outcomes[0].with_usage(submitted=submitted)
        cause = "the worker process died while it ran alone (killed, out of memory, or a crash in a decoder)"
        fault = EnvironmentFault(cause, "free memory or see what kills it, then run again", stage=stage)
        usage = {"submitted": submitted, "exit_class": "killed"}
        return Outcome(index, None, executed=True, failure=fault.failure, usage=usage)

    def _submit(self, work: Work, source: Path, stage: str, part: Slice, landed: _Landed) -> Future[list[Outcome]]:
        """Hand a slice over; its place comes back when it has ended, or now if it cannot be handed over."""
        try:
            future = self._hand_over(work, source, stage, part)
        except BaseException:
            with self._changed:
                self._flying -= 1
                self._changed.notify_all()
            raise
        future.add_done_callback(partial(self._land, landed))
        _logger.debug("%s: tasks %d to %d are handed over", stage, *_ends(part))
        return future

    def _hand_over(self, work: Work, source: Path, stage: str, part: Slice) -> Future[list[Outcome]]:
        with self._lock:
            for _ in range(3):  # a pool may break between being looked at and being used
                self._check_open()
                if self._pool is None:
                    self._pool = self._start(self._workers)
                try:
                    return self._pool.submit(_collect, work, source, stage, part)
                except BrokenProcessPool:
                    self._pool = None
        cause = "worker processes die as soon as they start"
        raise EnvironmentFault(cause, "free memory, or see what kills them; then run again", stage=stage)

    def _check_open(self) -> None:
        if self._closed:
            raise closed()

    def _outcomes(self, future: Future[list[Outcome]]) -> list[Outcome] | None:
        """Return the outcomes of a slice, or None where its worker died."""
        try:
            return future.result()
        except (BrokenProcessPool, CancelledError):
            self._check_open()  # then it was we who ended it
            return None

    def _start(self, workers: int) -> ProcessPoolExecutor:
        _logger.info("starting a pool of worker processes, %d at most", workers)
        try:
            return ProcessPoolExecutor(
                workers,
                mp_context=multiprocessing.get_context("spawn"),
                initializer=_begin_worker,
                initargs=(self._threads, os.getpid()),
            )
        except OSError as error:
            raise faults.worker_fault(error, "or take executor=inline") from error


def _ends(part: Slice) -> tuple[int, int]:
    """Return the first and the last task of a slice."""
    return part.lo, part.hi - 1


def _collect(work: Work, source: Path, stage: str, part: Slice) -> list[Outcome]:
    return list(work(source, stage, *part))


def _begin_worker(threads: int, parent: int) -> None:
    limit_threads(threads)
    processes.end_with(parent)
