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

from wsiflow.executor import Outcome, Work
from wsiflow.model.threads import limit_threads

_PARENT_POLL_S = 1.0
_WINDOW_PER_WORKER = 4


class ProcessPool:
    """A pool that several threads may feed at once."""

    def __init__(self, workers: int, *, threads: int) -> None:
        """Remember the size; workers start with the first task."""
        self._workers, self._threads = workers, threads
        self._pool: ProcessPoolExecutor | None = None
        self._lock = threading.Lock()
        self._alone = threading.Lock()

    def __enter__(self) -> Self:
        """Return the pool."""
        return self

    def __exit__(self, *_exc: object) -> None:
        """Stop the workers; tasks that have not started are dropped."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def run(self, work: Work, plan_path: Path, stage: str, indices: Sequence[int]) -> Iterator[Outcome]:
        """Run the tasks, a bounded number in flight, in the order given as far as workers are free."""
        waiting = list(reversed(indices))
        flying: dict[Future[Outcome], int] = {}
        lost: list[int] = []
        while waiting or flying:
            while waiting and len(flying) < self._workers * _WINDOW_PER_WORKER:
                index = waiting.pop()
                flying[self._submit(work, plan_path, stage, index)] = index
            ended, _ = wait(flying, return_when=FIRST_COMPLETED)
            for future in ended:
                index = flying.pop(future)
                outcome = _outcome(future)
                if outcome is None:
                    lost.append(index)
                else:
                    yield outcome
        for index in sorted(lost):
            yield self._run_alone(work, plan_path, stage, index)

    def _run_alone(self, work: Work, plan_path: Path, stage: str, index: int) -> Outcome:
        """Run a task in a worker of its own, one such task at a time; other shards keep the pool."""
        with self._alone, self._start(1) as single:
            outcome = _outcome(single.submit(work, plan_path, stage, index))
        died = "the worker process died while it ran alone (killed, out of memory, or a crash in a decoder)"
        return outcome or Outcome(index, None, executed=False, error=f"{stage}: {died}", exit_code=30)

    def _submit(self, work: Work, plan_path: Path, stage: str, index: int) -> Future[Outcome]:
        with self._lock:
            for _ in range(3):  # a pool may break between being looked at and being used
                if self._pool is None:
                    self._pool = self._start(self._workers)
                try:
                    return self._pool.submit(work, plan_path, stage, index)
                except BrokenProcessPool:
                    self._pool = None
        raise BrokenProcessPool("worker processes die as soon as they start")

    def _start(self, workers: int) -> ProcessPoolExecutor:
        return ProcessPoolExecutor(
            workers,
            mp_context=multiprocessing.get_context("spawn"),
            initializer=_begin_worker,
            initargs=(self._threads, os.getpid()),
        )


def _outcome(future: Future[Outcome]) -> Outcome | None:
    """Return the task's outcome, or None where its worker died."""
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
