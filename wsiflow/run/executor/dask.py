"""Run slices on the workers of a Dask cluster.

A future is one slice: the name of an importable function, a path, a stage and two numbers go out, the outcomes come
back. The scheduler never holds more of them than a window per worker. What a dying worker leaves behind goes to another
one by itself; a slice that was there at too many deaths is given up by Dask, and its tasks are then tried again one at
a time, so that the one that kills its worker fails alone.
"""

import itertools
import logging
import threading
import time
import uuid
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import CancelledError
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import NamedTuple, Self

from distributed import Client, Future, Worker, WorkerPlugin, get_worker
from distributed.comm.core import CommClosedError
from distributed.scheduler import KilledWorker

from wsiflow.errors import EnvironmentFault
from wsiflow.run.executor.params import DaskParams, ExecutorParams
from wsiflow.run.executor.protocol import Outcome, Site, Slice, Work, closed
from wsiflow.system.machine import limit_threads
from wsiflow.system.usage import now

_ATTEMPTS = 3
_LOOK_S = 1.0  # how often the workers are counted, and the connection is looked at
_FIRST = 1 << 30  # priority of a task that is tried alone: nothing that may kill the worker goes before it

_logger = logging.getLogger(__name__)
_turn = threading.Lock()  # of a worker: the process's CPU time and memory are those of one task


class _Flight(NamedTuple):
    """A slice on its way."""

    part: Slice
    attempt: int
    submitted: str


class _Call(NamedTuple):
    """What every slice of one ``run`` has in common."""

    work: Work
    source: Path
    stage: str
    name: str  # the scheduler's group of keys


def make(params: ExecutorParams, site: Site) -> "Dask":
    """Return the workers of the cluster that the client is connected to."""
    return Dask(site.client, threads=params.threads, window=(params.dask or DaskParams()).window)


class Dask:
    """The workers of a cluster, which several threads may feed at once."""

    def __init__(self, client: Client, *, threads: int, window: int) -> None:
        """Remember the cluster.

        Args:
            client: Connected to the cluster's scheduler; it stays open.
            threads: Threads of each worker's network.
            window: Slices in flight at most, per worker.
        """
        self._client, self._plugin, self._window = client, _Threads(threads), window
        self._changed = threading.Condition()
        self._flying, self._room, self._looked = 0, window, -_LOOK_S
        self._alone = threading.Lock()
        self._closed = False

    def __enter__(self) -> Self:
        """Prepare the workers, also those that come later.

        Raises:
            EnvironmentFault: They lack this package, or run already with another number of threads.
        """
        try:
            self._client.register_plugin(self._plugin)
        except (ImportError, AttributeError, OSError) as error:
            remedy = "install the same version of wsiflow and its packages there"
            raise EnvironmentFault(f"the Dask workers cannot be prepared: {error}", remedy) from error
        return self

    def __exit__(self, *_exc: object) -> None:
        """Leave the workers as they were found, and let nobody wait for them."""
        self.stop()
        with suppress(OSError, RuntimeError, ValueError, AttributeError):  # the scheduler is gone, and so is its proxy
            self._client.unregister_worker_plugin(self._plugin.name)  # type: ignore[no-untyped-call]

    def stop(self) -> None:
        """Let nobody wait any more; what the workers are at ends with their cluster."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def run(self, work: Work, source: Path, stage: str, slices: Sequence[Slice]) -> Iterator[Outcome]:
        """Run the slices, a bounded number in flight, in the order given as far as workers are free.

        Raises:
            EnvironmentFault: The scheduler is gone, or drops what it is given, or the run is over.
        """
        call = _Call(work, source, stage, f"{stage}-{uuid.uuid4().hex}")
        killed: list[int] = []
        for flight, ended in self._fly(call, slices, priority=0):
            if ended == "killed":
                lo, hi = flight.part
                _logger.warning("%s: workers died of tasks %d to %d, tried again one by one", stage, lo, hi - 1)
                killed.extend(range(lo, hi))
            yield from _told(flight, ended)
        for index in sorted(killed):
            yield from self._run_alone(call, index)

    def _run_alone(self, call: _Call, index: int) -> list[Outcome]:
        """Run a task before everything else, one such task at a time; other shards keep their workers."""
        outcomes: list[Outcome] = []
        with self._alone:
            for flight, ended in self._fly(call, [Slice(index, index + 1)], priority=_FIRST):
                outcomes += _told(flight, ended)
        if outcomes[-1].retried:
            cause = "the worker process died each time it ran (killed, out of memory, or a crash in a decoder)"
            remedy = "give workers more memory or see what kills them, then run again"
            fault = EnvironmentFault(cause, remedy, stage=call.stage)
            outcomes[-1] = outcomes[-1]._replace(failure=fault.failure, retried=False)
        return outcomes

    def _fly(
        self, call: _Call, slices: Sequence[Slice], *, priority: int
    ) -> Iterator[tuple[_Flight, list[Outcome] | str]]:
        """Yield every attempt at a slice with its outcomes, or with the reason why there are none.

        A cancelled attempt is made again; a killed one is left to the caller.
        """
        waiting = deque(_Flight(part, 1, "") for part in slices)
        flying: dict[Future[list[Outcome]], _Flight] = {}
        landed: deque[Future[list[Outcome]]] = deque()
        rank = itertools.count()
        try:
            while waiting or flying:
                if self._place(wanted=bool(waiting), landed=landed):
                    flight = waiting.popleft()._replace(submitted=now())
                    future = self._submit(call, flight, priority - next(rank))
                    flying[future] = flight
                    future.add_done_callback(partial(self._land, landed))  # type: ignore[no-untyped-call]
                while landed:
                    future = landed.popleft()
                    flight = flying.pop(future)
                    try:
                        ended = _ended(future)
                    finally:
                        self._leave(future)
                    yield flight, ended
                    if ended == "cancelled":
                        waiting.append(self._again(flight))
        finally:
            for future in flying:  # the caller wants no more, or an error ended this
                self._leave(future)

    def _submit(self, call: _Call, flight: _Flight, priority: int) -> "Future[list[Outcome]]":
        """Hand a slice to the scheduler; keys of one group make it keep back what no worker is free for."""
        lo, hi = flight.part
        _logger.debug("%s: tasks %d to %d are handed over", call.stage, lo, hi - 1)
        key = (call.name, lo, hi, flight.attempt, priority)
        try:
            return self._client.submit(
                _work_through, call.work, call.source, call.stage, lo, hi, key=key, priority=priority, pure=False
            )
        except BaseException:  # what is not handed over has no place
            self._give_back()
            raise

    def _place(self, *, wanted: bool, landed: "deque[Future[list[Outcome]]]") -> bool:
        """Wait until something has landed or a place is free that is wanted; take the place, and say so."""
        self._look()
        with self._changed:
            self._changed.wait_for(
                lambda: self._closed or landed or (wanted and self._flying < self._room), timeout=_LOOK_S
            )
            if self._closed:
                raise closed()
            taken = wanted and self._flying < self._room
            self._flying += taken
        return taken

    def _look(self) -> None:
        """Count the workers, which come and go.

        Raises:
            EnvironmentFault: The connection to the scheduler is lost for good.
        """
        if time.monotonic() - self._looked < _LOOK_S:
            return
        self._looked = time.monotonic()
        if self._client.status not in {"running", "connecting"}:
            remedy = "see why it ended, then run again: what is done stays done"
            raise EnvironmentFault("the connection to the Dask scheduler is lost", remedy)
        workers = self._client.scheduler_info(n_workers=0).get("n_workers", 0)  # says nothing while it reconnects
        with self._changed:  # what waits for a first worker is what makes an adaptive cluster ask for one
            self._room = self._window * max(1, workers)
            self._changed.notify_all()

    def _land(self, landed: "deque[Future[list[Outcome]]]", future: "Future[list[Outcome]]") -> None:
        with self._changed:
            landed.append(future)
            self._changed.notify_all()

    def _leave(self, future: "Future[list[Outcome]]") -> None:
        """Give back the place of a future, and tell the scheduler to forget it."""
        try:
            future.release()  # type: ignore[no-untyped-call]
        finally:
            self._give_back()

    def _give_back(self) -> None:
        with self._changed:
            self._flying -= 1
            self._changed.notify_all()

    def _again(self, flight: _Flight) -> _Flight:
        """Return the next attempt at a slice that the scheduler dropped."""
        self._looked = -_LOOK_S
        self._look()
        if flight.attempt == _ATTEMPTS:
            cause = f"the Dask scheduler dropped the same work {_ATTEMPTS} times"
            raise EnvironmentFault(cause, "see its log, then run again: what is done stays done")
        lo, hi = flight.part
        _logger.warning("the scheduler dropped tasks %d to %d, which are handed over again", lo, hi - 1)
        return flight._replace(attempt=flight.attempt + 1)


class _Threads(WorkerPlugin):
    """Keeps every worker to its share of the cores, before anything there imports a numerical library."""

    name = "wsiflow-threads"

    def __init__(self, threads: int) -> None:
        self._threads = threads

    def setup(self, worker: Worker) -> None:  # noqa: ARG002 - the form of a plugin
        limit_threads(self._threads)


def _work_through(work: Work, source: Path, stage: str, lo: int, hi: int) -> list[Outcome]:
    """Do a slice, in a worker."""
    with _turn:
        name = str(get_worker().name)
        return [outcome.with_usage(native_id=name) for outcome in work(source, stage, lo, hi)]


def _ended(future: "Future[list[Outcome]]") -> list[Outcome] | str:
    """Return a slice's outcomes, or how its attempt was lost."""
    try:
        return future.result()
    except KilledWorker:
        return "killed"
    except (CancelledError, CommClosedError):
        return "cancelled"


def _told(flight: _Flight, ended: list[Outcome] | str) -> list[Outcome]:
    """Return what the caller hears of an attempt."""
    if isinstance(ended, str):
        usage = {"submitted": flight.submitted, "exit_class": ended}
        failure = EnvironmentFault(f"its worker was lost ({ended})", "nothing to do: it starts again").failure
        return [
            Outcome(index, None, executed=True, failure=failure, usage=usage, retried=True)
            for index in range(*flight.part)
        ]
    return [outcome.with_usage(submitted=flight.submitted) for outcome in ended]
