"""Run slices on the workers of a Dask cluster.

A future is one slice: it sends an importable function, a path, a stage and two numbers, and returns the outcomes. The
scheduler holds at most a window of slices per worker. Dask moves the slices of a worker that dies to another worker. It
gives up a slice that was on too many workers that died; the tasks of that slice are then retried one at a time, so that
only the task that kills its worker fails.
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
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple, Self

from distributed import Client, Future, Nanny, NannyPlugin, Worker, WorkerPlugin, get_worker
from distributed.comm.core import CommClosedError
from distributed.core import Status
from distributed.scheduler import KilledWorker, WorkerState

from wsiflow.errors import EnvironmentFault
from wsiflow.run.executor import lifetime
from wsiflow.run.executor.params import DaskParams, ExecutorParams, starts_all_workers
from wsiflow.run.executor.protocol import Outcome, Site, Slice, Work, closed
from wsiflow.system.machine import limit_threads
from wsiflow.system.usage import now

_ATTEMPTS = 3
_EVENT_S = 1.0  # so long a nanny's word may take to arrive
_TELL_S = 60.0  # between two warnings that nobody works
_POLL_S = 1.0  # how often the workers are counted and the connection is checked
_DEATHS = {"killed", "memory"}  # why attempts are lost whose worker died
_FIRST = 1 << 30  # priority of a task that is retried alone, before any other that may kill its worker

_logger = logging.getLogger(__name__)
_turn = threading.Lock()  # in a worker: one slice at a time, since CPU time and memory are measured by process


class _Flight(NamedTuple):
    """An attempt at a slice: the slice, the number of the attempt, and when it was submitted."""

    part: Slice
    attempt: int
    submitted: str


class _Call(NamedTuple):
    """The arguments of one `Dask.run`, and the name of its group of keys in the scheduler."""

    work: Work
    source: Path
    stage: str
    name: str


def make(params: ExecutorParams, site: Site) -> "Dask":
    """Return the executor for the cluster that the client is connected to."""
    dask = params.dask or DaskParams()
    lent = bool(dask.address)
    life = None if starts_all_workers(params) else _Life(site.root, threads=params.threads, lent=lent)
    plugins: list[_Worker | _Nanny] = [
        _Worker(params.threads, life, lent=lent),
        *([_Nanny(life)] if life and not lent else []),
    ]
    return Dask(site.client, plugins, window=dask.window, memory_key=_memory_key(dask))


def _memory_key(dask: DaskParams) -> str:
    """Return the setting that limits the memory of a worker."""
    if dask.address:
        return "the memory limit of the cluster's workers"
    is_of_jobs = dask.cluster.startswith("dask_jobqueue.")
    return f"executor.dask.cluster_kwargs.{'memory' if is_of_jobs else 'memory_limit'}"


class Dask:
    """The executor of a Dask cluster; several threads may call `run` at once."""

    def __init__(self, client: Client, plugins: "Sequence[_Worker | _Nanny]", *, window: int, memory_key: str) -> None:
        """Store the client and the settings.

        Args:
            client: A client that is connected to the scheduler; it stays open.
            plugins: What prepares each worker and nanny.
            window: Most slices in flight at a time, per worker.
            memory_key: The setting that limits the memory of a worker, in words for the user.
        """
        self._client, self._plugins, self._window = client, plugins, window
        self._memory_key, self._memory_mb, self._told_s = memory_key, 0, time.monotonic()
        self._changed = threading.Condition()
        self._flying, self._room, self._counted_s = 0, window, -_POLL_S
        self._alone = threading.Lock()
        self._closed = False

    def __enter__(self) -> Self:
        """Prepare the workers, including those that start later.

        Raises:
            EnvironmentFault: They do not have this package, or run already with another number of threads.
        """
        try:
            for plugin in self._plugins:
                self._client.register_plugin(plugin)
        except (ImportError, AttributeError, OSError) as error:
            remedy = "install the same version of wsiflow and its packages there"
            raise EnvironmentFault(f"the Dask workers cannot be prepared: {error}", remedy) from error
        return self

    def __exit__(self, *_exc: object) -> None:
        """End every `run` that waits, and remove the plugins from the workers."""
        self.stop()
        for plugin in self._plugins:
            is_of_nanny = isinstance(plugin, NannyPlugin)
            with suppress(OSError, RuntimeError, ValueError, AttributeError):  # the scheduler is gone
                self._client.unregister_worker_plugin(plugin.name, nanny=is_of_nanny)  # type: ignore[no-untyped-call]

    def stop(self) -> None:
        """End every `run` that waits; running tasks end with their cluster."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def run(self, work: Work, source: Path, stage: str, slices: Sequence[Slice]) -> Iterator[Outcome]:
        """Run the slices in the given order as far as workers are free, with a bounded number in flight.

        Raises:
            EnvironmentFault: The scheduler is gone or drops slices repeatedly, or the executor was closed.
        """
        call = _Call(work, source, stage, f"{stage}-{uuid.uuid4().hex}")
        killed: list[int] = []
        for flight, ended in self._fly(call, slices, priority=0):
            if isinstance(ended, str) and ended in _DEATHS:
                lo, hi, _ = flight.part
                why = f" (beyond their memory limit, {self._memory_mb} MB)" if ended == "memory" else ""
                _logger.warning(
                    "%s: workers died%s during tasks %d to %d, which are retried one by one", stage, why, lo, hi - 1
                )
                killed.extend(range(lo, hi))
            yield from _outcomes_of(flight, ended)
        for index in sorted(killed):
            yield from self._run_alone(call, index)

    def _run_alone(self, call: _Call, index: int) -> list[Outcome]:
        """Run one task with the highest priority, one such task at a time, and return the outcomes of its attempts."""
        outcomes: list[Outcome] = []
        with self._alone:
            for flight, ended in self._fly(call, [Slice(index, index + 1)], priority=_FIRST):
                outcomes += _outcomes_of(flight, ended)
        if outcomes[-1].retried:
            fault = self._fault((outcomes[-1].usage or {})["exit_class"], call.stage)
            outcomes[-1] = outcomes[-1]._replace(failure=fault.failure, retried=False)
        return outcomes

    def _fault(self, cause: str, stage: str) -> EnvironmentFault:
        """Return the error of a task whose worker died each time it ran."""
        if cause == "memory":
            text = f"the worker process exceeded its memory limit, {self._memory_mb} MB, each time it ran"
            remedy = f"raise {self._memory_key} or lower tiles.memory_mb, then run again"
            return EnvironmentFault(text, remedy, stage=stage)
        text = "the worker process died each time it ran (killed, out of memory, or a crash in a decoder)"
        remedy = "give the workers more memory or find out what kills them, then run again"
        return EnvironmentFault(text, remedy, stage=stage)

    def _fly(
        self, call: _Call, slices: Sequence[Slice], *, priority: int
    ) -> Iterator[tuple[_Flight, list[Outcome] | str]]:
        """Yield every attempt at a slice with its outcomes, or with the reason why it was lost.

        An attempt that was ``cancelled`` is repeated; one whose worker died is left to the caller.
        """
        waiting = deque(_Flight(part, 1, "") for part in slices)
        flying: dict[Future[list[Outcome]], _Flight] = {}
        landed: deque[Future[list[Outcome]]] = deque()
        rank = itertools.count()
        try:
            while waiting or flying:
                if self._take_place(needed=bool(waiting), landed=landed):
                    flight = waiting.popleft()._replace(submitted=now())
                    future = self._submit(call, flight, priority - next(rank))
                    flying[future] = flight
                    future.add_done_callback(partial(self._land, landed))  # type: ignore[no-untyped-call]
                while landed:
                    future = landed.popleft()
                    flight = flying.pop(future)
                    try:
                        ended = self._ended(future, flight)
                    finally:
                        self._leave(future)
                    yield flight, ended
                    if ended == "cancelled":
                        waiting.append(self._again(flight))
        finally:
            for future in flying:  # the caller has stopped, or an error was raised
                self._leave(future)

    def _submit(self, call: _Call, flight: _Flight, priority: int) -> "Future[list[Outcome]]":
        """Submit a slice; keys of one group let the scheduler hold back slices that no worker is free for."""
        lo, hi, _ = flight.part
        _logger.debug("%s: tasks %d to %d are submitted", call.stage, lo, hi - 1)
        key = (call.name, lo, hi, flight.attempt, priority)
        try:
            return self._client.submit(
                _work_through, call.work, call.source, call.stage, lo, hi, key=key, priority=priority, pure=False
            )
        except BaseException:  # a slice that is not submitted has no place
            self._give_back()
            raise

    def _take_place(self, *, needed: bool, landed: "deque[Future[list[Outcome]]]") -> bool:
        """Wait until a future has ended, or a place that is needed is free; return whether the place was taken."""
        self._count_workers()
        with self._changed:
            self._changed.wait_for(
                lambda: self._closed or landed or (needed and self._flying < self._room), timeout=_POLL_S
            )
            if self._closed:
                raise closed()
            taken = needed and self._flying < self._room
            self._flying += taken
        return taken

    def _count_workers(self) -> None:
        """Count the workers, whose number changes, and check the connection, at most once in `_POLL_S`.

        Raises:
            EnvironmentFault: The connection to the scheduler is lost for good.
        """
        if time.monotonic() - self._counted_s < _POLL_S:
            return
        self._counted_s = time.monotonic()
        if self._client.status not in {"running", "connecting"}:
            remedy = "find out why the scheduler ended, then run again: what is done stays done"
            raise EnvironmentFault("the connection to the Dask scheduler is lost", remedy)
        workers = self._client.scheduler_info(n_workers=0).get("n_workers", 0)  # 0 while the client reconnects
        self._tell_where_nobody_works(workers)
        with self._changed:  # without workers one window is submitted, so that an adaptive cluster starts some
            self._room = self._window * max(1, workers)
            self._changed.notify_all()

    def _ended(self, future: "Future[list[Outcome]]", flight: _Flight) -> list[Outcome] | str:
        """Return the outcomes of a slice, or why its attempt was lost: ``killed``, ``memory`` or ``cancelled``."""
        try:
            return future.result()
        except KilledWorker as error:
            since_s = datetime.fromisoformat(flight.submitted).timestamp()
            return "memory" if self._exceeded_memory(error.last_worker, since_s) else "killed"
        except (CancelledError, CommClosedError):
            return "cancelled"

    def _exceeded_memory(self, worker: WorkerState, since_s: float) -> bool:
        """Tell whether nannies have ended workers for their memory since then; note how much these may have."""
        end_s = time.monotonic() + _EVENT_S
        with suppress(OSError, RuntimeError):
            while time.monotonic() < end_s:
                events = self._client.get_events("worker-restart-memory")
                if any(event["worker"] == worker.address or at_s >= since_s for at_s, event in events):
                    self._memory_mb = worker.memory_limit // 1_000_000
                    return True
                time.sleep(_EVENT_S / 5)
        return False

    def _tell_where_nobody_works(self, workers: int) -> None:
        """Warn once a minute while the scheduler has no worker."""
        if workers:
            self._told_s = time.monotonic()
        elif time.monotonic() - self._told_s >= _TELL_S:
            self._told_s = time.monotonic()
            _logger.warning("the Dask scheduler has no worker, and %d slices of work wait for one", self._flying)

    def _land(self, landed: "deque[Future[list[Outcome]]]", future: "Future[list[Outcome]]") -> None:
        with self._changed:
            landed.append(future)
            self._changed.notify_all()

    def _leave(self, future: "Future[list[Outcome]]") -> None:
        """Release a future in the scheduler, and give back its place."""
        try:
            future.release()  # type: ignore[no-untyped-call]
        finally:
            self._give_back()

    def _give_back(self) -> None:
        with self._changed:
            self._flying -= 1
            self._changed.notify_all()

    def _again(self, flight: _Flight) -> _Flight:
        """Return the next attempt at a slice that the scheduler dropped.

        Raises:
            EnvironmentFault: The slice was dropped too often, or the connection is lost.
        """
        self._counted_s = -_POLL_S
        self._count_workers()
        if flight.attempt == _ATTEMPTS:
            cause = f"the Dask scheduler dropped the same tasks {_ATTEMPTS} times"
            raise EnvironmentFault(cause, "read the log of the scheduler, then run again: what is done stays done")
        lo, hi, _ = flight.part
        _logger.warning("the scheduler dropped tasks %d to %d, which are submitted again", lo, hi - 1)
        return flight._replace(attempt=flight.attempt + 1)


class _Life:
    """Notes in a run's folder how long a process of the cluster lives."""

    def __init__(self, folder: Path, *, threads: int, lent: bool) -> None:
        self._folder, self._threads, self._lent = folder, threads, lent
        self._job_of_driver = lifetime.job_name()
        self._recorder: lifetime.Recorder | None = None

    def begin(self) -> None:
        lent = self._lent or lifetime.job_name() == self._job_of_driver != ""
        self._recorder = lifetime.Recorder(self._folder, threads=self._threads, lent=lent)

    def end(self) -> None:
        """Record the end, or that it is near: the process belongs to the run, and is ended a moment later."""
        if self._recorder is not None:
            self._recorder.end() if self._lent else self._recorder.end_soon()


class _Worker(WorkerPlugin):
    """Prepares every worker: limits its threads, before anything there imports a numerical library, and notes its life.

    The life of workers that descend from the driver is the driver's, and that of one with a nanny is the nanny's.
    """

    name = "wsiflow-worker"

    def __init__(self, threads: int, life: _Life | None, *, lent: bool) -> None:
        self._threads, self._life, self._lent = threads, life, lent
        self._paused_at: float | Literal[False] = False

    def setup(self, worker: Worker) -> None:
        limit_threads(self._threads)
        # Near its memory limit a worker pauses until results are spilled to disk: without any it would wait for ever.
        self._paused_at = worker.memory_manager.memory_pause_fraction
        worker.memory_manager.memory_pause_fraction = False
        if worker.status == Status.paused:
            worker.status = Status.running
        if self._life is not None and (self._lent or worker.nanny is None):
            self._life.begin()

    def teardown(self, worker: Worker) -> None:
        worker.memory_manager.memory_pause_fraction = self._paused_at
        if self._life is not None:
            self._life.end()


class _Nanny(NannyPlugin):
    """Notes the life of every nanny, the process of a job that starts its worker and ends after it."""

    name = "wsiflow-nanny"

    def __init__(self, life: _Life) -> None:
        self._life = life

    def setup(self, nanny: Nanny) -> None:  # noqa: ARG002 - the signature of a plugin
        self._life.begin()

    def teardown(self, nanny: Nanny) -> None:  # noqa: ARG002 - the signature of a plugin
        self._life.end()


def _work_through(work: Work, source: Path, stage: str, lo: int, hi: int) -> list[Outcome]:
    """Do a slice in a worker, and return its outcomes."""
    with _turn:
        name = str(get_worker().name)
        return [outcome.with_usage(native_id=name) for outcome in work(source, stage, lo, hi)]


def _outcomes_of(flight: _Flight, ended: list[Outcome] | str) -> list[Outcome]:
    """Return the outcomes of an attempt; of one that was lost, an outcome that is ``retried`` for each task."""
    if isinstance(ended, str):
        usage = {"submitted": flight.submitted, "exit_class": ended}
        failure = EnvironmentFault(f"its worker process was lost ({ended})", "nothing to do: it starts again").failure
        return [
            Outcome(index, None, executed=True, failure=failure, usage=usage, retried=True)
            for index in flight.part.tasks
        ]
    return [outcome.with_usage(submitted=flight.submitted) for outcome in ended]
