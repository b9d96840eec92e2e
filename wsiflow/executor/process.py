"""Run tasks in a pool of worker processes on this machine.

Workers are started fresh (spawn), keep to their share of the cores, and end by themselves when their parent is gone,
so that a killed run leaves nothing behind. A worker that dies (out of memory, a decoder's crash) breaks the whole pool;
the tasks that were under way are then tried again, each in a worker of its own, so that the one that kills it fails
alone.
"""

import multiprocessing
import os
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Self

from wsiflow import faults
from wsiflow.executor import Outcome, Slice, Work
from wsiflow.model.threads import limit_threads
from wsiflow.usage import now

_PARENT_POLL_S = 1.0
_WAITING = 2  # slices handed over beyond those at work, so that no worker waits for the next


class ProcessPool:
    """A pool that several threads may feed at once."""

    def __init__(self, workers: int, *, threads: int) -> None:
        """Remember the size; workers start with the first task."""
        self._workers, self._threads = workers, threads
        self._pool: ProcessPoolExecutor | None = None
        self._lock = threading.Lock()
        self._alone = threading.Lock()
        self._closed = False
        self._room = threading.Semaphore(workers + _WAITING)  # what a worker's death takes along stays little

    def __enter__(self) -> Self:
        """Return the pool."""
        return self

    def __exit__(self, *_exc: object) -> None:
        """Stop the workers; tasks that have not started are dropped."""
        self._closed = True  # a run that is ended from outside loses its workers too: they must not be started again
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def run(self, work: Work, source: Path, stage: str, slices: Sequence[Slice]) -> Iterator[Outcome]:
        """Run the slices in the order given as far as workers are free; all callers together have few in flight."""
        waiting = list(reversed(slices))
        flying: dict[Future[list[Outcome]], tuple[Slice, str]] = {}
        lost: list[Slice] = []
        while waiting or flying:
            while waiting and self._room.acquire(blocking=not flying):
                part = waiting.pop()
                flying[self._submit(work, source, stage, part)] = part, now()
            ended, _ = wait(flying, return_when=FIRST_COMPLETED)
            for future in ended:
                part, submitted = flying.pop(future)
                self._room.release()
                outcomes = _outcomes(future)
                if outcomes is None:
                    lost.append(part)
                else:
                    yield from (outcome.with_usage(submitted=submitted) for outcome in outcomes)
        for lo, hi in sorted(lost):
            for index in range(lo, hi):
                yield Outcome(index, None, executed=True, usage={"exit_class": "killed"}, retried=True)
                yield self._run_alone(work, source, stage, index)

    def _run_alone(self, work: Work, source: Path, stage: str, index: int) -> Outcome:
        """Run a task in a worker of its own, one such task at a time; other shards keep the pool."""
        submitted = now()
        with self._alone, self._start(1) as single:
            self._check_open()
            outcomes = _outcomes(single.submit(_collect, work, source, stage, Slice(index, index + 1)))
        if outcomes is not None:
            return outcomes[0].with_usage(submitted=submitted)
        died = "the worker process died while it ran alone (killed, out of memory, or a crash in a decoder)"
        usage = {"submitted": submitted, "exit_class": "killed"}
        return Outcome(index, None, executed=True, error=f"{stage}: {died}", exit_code=30, usage=usage)

    def _submit(self, work: Work, source: Path, stage: str, part: Slice) -> Future[list[Outcome]]:
        with self._lock:
            self._check_open()
            for _ in range(3):  # a pool may break between being looked at and being used
                if self._pool is None:
                    self._pool = self._start(self._workers)
                try:
                    return self._pool.submit(_collect, work, source, stage, part)
                except BrokenProcessPool:
                    self._pool = None
        raise BrokenProcessPool("worker processes die as soon as they start")

    def _check_open(self) -> None:
        if self._closed:
            raise BrokenProcessPool("the run is over")

    def _start(self, workers: int) -> ProcessPoolExecutor:
        try:
            return ProcessPoolExecutor(
                workers,
                mp_context=multiprocessing.get_context("spawn"),
                initializer=_begin_worker,
                initargs=(self._threads, os.getpid()),
            )
        except OSError as error:
            raise faults.of_workers(error, "or take executor=inline") from error


def _collect(work: Work, source: Path, stage: str, part: Slice) -> list[Outcome]:
    return list(work(source, stage, *part))


def _outcomes(future: Future[list[Outcome]]) -> list[Outcome] | None:
    """Return the outcomes of a slice, or None where its worker died."""
    try:
        return future.result()
    except BrokenProcessPool:
        return None


def _begin_worker(threads: int, parent: int) -> None:
    limit_threads(threads)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_PARENT_POLL_S)
    os._exit(1)
