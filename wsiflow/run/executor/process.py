"""Run tasks in a pool of worker processes on this machine.

Worker processes are spawned, keep to their share of the cores, and end by themselves when their parent process is gone,
so that a killed run leaves none behind. A worker process that dies, for lack of memory or in a crash of a decoder,
breaks the whole pool. The slices that were running are then retried, each task in a process of its own, so that only
the task that kills its process fails.
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

_WAITING = 2  # submitted slices besides the running ones, so that no worker waits for its next slice

_logger = logging.getLogger(__name__)
_LOST = EnvironmentFault("a worker process died while it was under way", "nothing to do: it is tried again").failure

_Landed = deque[Future[list[Outcome]]]


def make(params: ExecutorParams, site: Site) -> "ProcessPool":
    """Return a pool with the number of workers of the settings."""
    return ProcessPool(worker_count(params, cores=site.cores), threads=params.threads)


class ProcessPool:
    """The executor of a pool of worker processes; several threads may call `run` at once."""

    def __init__(self, workers: int, *, threads: int) -> None:
        """Store the settings; the processes start with the first slice."""
        self._workers, self._threads = workers, threads
        self._pool: ProcessPoolExecutor | None = None
        self._single: ProcessPoolExecutor | None = None
        self._lock = threading.Lock()
        self._alone = threading.Lock()
        self._closed = False
        self._changed = threading.Condition()
        self._flying, self._room = 0, workers + _WAITING  # few slices are lost with a pool

    def __enter__(self) -> Self:
        """Return the pool."""
        return self

    def __exit__(self, kind: type[BaseException] | None, *_exc: object) -> None:
        """End the workers, by killing them where the run ends in an error; slices that have not started are dropped."""
        self._close(kill=kind is not None)

    def stop(self) -> None:
        """Kill the workers; the next start removes their attempt files, as those of any killed process."""
        self._close(kill=True)

    def _close(self, *, kill: bool) -> None:
        with self._changed:
            self._closed = True  # set before the workers end, so that no new pool is started
            self._changed.notify_all()
        with self._lock:
            pools = [pool for pool in (self._pool, self._single) if pool is not None]
        for pool in pools:
            if kill:
                for process in list((pool._processes or {}).values()):  # noqa: SLF001 - public from Python 3.14 on
                    process.kill()
            pool.shutdown(cancel_futures=True)

    def run(self, work: Work, source: Path, stage: str, slices: Sequence[Slice]) -> Iterator[Outcome]:
        """Run the slices in the given order as far as workers are free; all callers together have few in flight."""
        waiting = deque(slices)
        flying: dict[Future[list[Outcome]], tuple[Slice, str]] = {}
        landed: _Landed = deque()
        lost: list[Slice] = []
        try:
            while waiting or flying:
                if self._take_place(needed=bool(waiting), landed=landed):
                    part = waiting.popleft()
                    flying[self._submit(work, source, stage, part, landed)] = part, now()
                while landed:
                    future = landed.popleft()
                    part, submitted = flying.pop(future)
                    outcomes = self._outcomes(future)
                    if outcomes is None:
                        _logger.warning("%s: a worker process died, tasks %d to %d are retried", stage, *_ends(part))
                        lost.append(part)
                    else:
                        yield from (outcome.with_usage(submitted=submitted) for outcome in outcomes)
        finally:
            for future in flying:  # the caller has stopped, or an error was raised
                future.cancel()
        for part in sorted(lost):
            for index in part.tasks:
                yield Outcome(index, None, executed=True, failure=_LOST, usage={"exit_class": "killed"}, retried=True)
                yield self._run_alone(work, source, stage, index)

    def _take_place(self, *, needed: bool, landed: _Landed) -> bool:
        """Wait until a future has ended, or a place that is needed is free; return whether the place was taken."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or landed or (needed and self._flying < self._room))
            self._check_open()
            taken = needed and self._flying < self._room
            self._flying += taken
        return taken

    def _land(self, landed: _Landed, future: Future[list[Outcome]]) -> None:
        """Give back the place of a future that has ended in any way, even where its caller has stopped."""
        with self._changed:
            self._flying -= 1
            landed.append(future)
            self._changed.notify_all()

    def _run_alone(self, work: Work, source: Path, stage: str, index: int) -> Outcome:
        """Run a task in a process of its own, one such task at a time, while other callers use the pool."""
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
        fault = EnvironmentFault(cause, "free memory or find out what kills it, then run again", stage=stage)
        usage = {"submitted": submitted, "exit_class": "killed"}
        return Outcome(index, None, executed=True, failure=fault.failure, usage=usage)

    def _submit(self, work: Work, source: Path, stage: str, part: Slice, landed: _Landed) -> Future[list[Outcome]]:
        """Submit a slice; its place is given back when it has ended, or now where it cannot be submitted."""
        try:
            future = self._submit_to_pool(work, source, stage, part)
        except BaseException:
            with self._changed:
                self._flying -= 1
                self._changed.notify_all()
            raise
        future.add_done_callback(partial(self._land, landed))
        _logger.debug("%s: tasks %d to %d are submitted", stage, *_ends(part))
        return future

    def _submit_to_pool(self, work: Work, source: Path, stage: str, part: Slice) -> Future[list[Outcome]]:
        with self._lock:
            for _ in range(3):  # a pool may break before it takes the slice
                self._check_open()
                if self._pool is None:
                    self._pool = self._start(self._workers)
                try:
                    return self._pool.submit(_collect, work, source, stage, part)
                except BrokenProcessPool:
                    self._pool = None
        cause = "worker processes die as soon as they start"
        raise EnvironmentFault(cause, "free memory or find out what kills them, then run again", stage=stage)

    def _check_open(self) -> None:
        if self._closed:
            raise closed()

    def _outcomes(self, future: Future[list[Outcome]]) -> list[Outcome] | None:
        """Return the outcomes of a slice, or None where its worker process died."""
        try:
            return future.result()
        except (BrokenProcessPool, CancelledError):
            self._check_open()  # the executor itself may have ended the worker
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
    return list(work(source, stage, part.lo, part.hi))


def _begin_worker(threads: int, parent: int) -> None:
    limit_threads(threads)
    processes.end_with(parent)
    processes.skip_teardown(0)
