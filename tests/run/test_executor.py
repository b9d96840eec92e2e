"""Executors: each task ends once, a task that kills its worker fails alone, and no caller waits for ever."""

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager, suppress
from pathlib import Path

import pytest
from pydantic import ValidationError
from slice_work import die_at_7, linger, square

from flows.cluster import _note_shared_cores, workers
from wsiflow.errors import EnvironmentFault, Failure
from wsiflow.run import executor, shards
from wsiflow.run.executor.kinds import KINDS, Kind
from wsiflow.run.executor.params import ExecutorParams, worker_count
from wsiflow.run.executor.protocol import Executor, Outcome, Slice

HERE = Path(__file__)


def params(kind: str, workers: int = 2) -> ExecutorParams:
    return ExecutorParams(kind=kind, workers=workers, threads=1, slice_s=0)


def sliced(count: int) -> list[Slice]:
    return [Slice(lo, min(lo + 3, count)) for lo in range(0, count, 3)]


@pytest.mark.parametrize("kind", ["inline", "process"])
def test_every_task_ends_once(kind: str) -> None:
    """Twenty tasks give twenty outcomes with any executor."""
    with executor.make(params(kind), cores=2, root=HERE.parent) as pool:
        outcomes = sorted(pool.run(square, HERE, "stage", sliced(20)), key=lambda outcome: outcome.task)
    assert [(o.task, o.receipt) for o in outcomes] == [(i, {"square": i**2, "threads": "1"}) for i in range(20)]


def test_a_task_that_kills_its_worker_fails_alone(caplog: pytest.LogCaptureFixture) -> None:
    """Its neighbours are retried and succeed; the task is named with the reason, and the pool goes on."""
    with executor.make(params("process"), cores=2, root=HERE.parent) as pool:
        attempts = list(pool.run(die_at_7, HERE, "predict", sliced(12)))
        outcomes = {o.task: o for o in attempts if not o.retried}
        assert sorted(outcomes) == list(range(12))
        assert [o.task for o in outcomes.values() if o.receipt is None] == [7]
        assert "worker process died" in outcomes[7].failure.cause
        assert outcomes[7].exit_code == 30
        assert {o.task for o in attempts if o.retried} >= {6, 7, 8}, "lost attempts are reported"
        assert "predict: a worker process died, tasks 6 to 8 are retried" in caplog.messages
        assert len(list(pool.run(square, HERE, "predict", sliced(3)))) == 3


BACKWARDS = """
from wsiflow.run.executor.inline import Inline

class Backwards(Inline):
    def run(self, work, source, stage, slices):
        return super().run(work, source, stage, slices[::-1])

def make(params, site):
    return Backwards()
"""


def test_a_kind_of_executor_is_a_file_and_a_line_in_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A configuration may name a new kind, and a run uses it, without any other change."""
    with pytest.raises(ValidationError, match="Input should be 'inline', 'process', 'dask' or 'array'"):
        params("backwards")
    (tmp_path / "backwards.py").write_text(BACKWARDS)
    monkeypatch.setattr(executor, "__path__", [*executor.__path__, str(tmp_path)])
    monkeypatch.setitem(KINDS, "backwards", Kind("backwards", "one"))
    chosen = params("backwards")
    assert worker_count(chosen, cores=3) == 1
    with workers(chosen, tmp_path) as pool:
        assert [outcome.task for outcome in pool.run(square, HERE, "stage", sliced(6))] == [3, 4, 5, 0, 1, 2]


@pytest.mark.parametrize(("kind", "workers", "expected"), [("inline", 5, 1), ("process", 0, 3), ("process", 2, 2)])
def test_workers_follow_the_cores_by_default(kind: str, workers: int, expected: int) -> None:
    """Zero means one worker per core this process may use."""
    assert worker_count(params(kind, workers), cores=3) == expected


def both(kind: str, root: Path) -> AbstractContextManager[Executor]:
    return executor.make(params(kind), cores=2, root=root)


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.02)


class Shards:
    """Threads that call one executor, and how each of them ended."""

    def __init__(self, pool: Executor, folder: Path, count: int) -> None:
        self.ended: list[object] = []
        self._threads = [threading.Thread(target=self._shard, args=(pool, folder), daemon=True) for _ in range(count)]
        for thread in self._threads:
            thread.start()

    def _shard(self, pool: Executor, folder: Path) -> None:
        try:
            self.ended.append(list(pool.run(linger, folder, "predict", [Slice(5, 6), Slice(6, 7), Slice(7, 8)])))
        except EnvironmentFault as error:
            self.ended.append(str(error))

    def join(self) -> None:
        for thread in self._threads:
            thread.join(120)
            assert not thread.is_alive(), "a shard waits for ever"


@pytest.mark.parametrize("how", ["an error", "a stop"])
def test_a_pool_that_ends_lets_no_caller_wait(tmp_path: Path, how: str) -> None:
    """Twelve callers, more than there is room for, all end with the reason, although their slices take ten minutes."""
    with suppress(OSError), both("process", tmp_path) as pool:
        shards = Shards(pool, tmp_path, 12)
        wait_for(lambda: any(tmp_path.iterdir()))
        if how == "an error":
            raise OSError
        pool.stop()
    shards.join()
    assert len(shards.ended) == 12
    assert set(shards.ended) == {"the run ended before this was done; run again: what is done stays done"}
    assert pool._flying == 0


def test_inline_begins_nothing_after_its_end(tmp_path: Path) -> None:
    """The running task ends; neither the rest of its slice nor waiting tasks begin."""
    with both("inline", tmp_path) as pool:
        first = pool.run(linger, tmp_path, "predict", [Slice(0, 1), Slice(1, 2)])
        next(first)
    with pytest.raises(EnvironmentFault, match="the run ended before"):
        next(first)
    assert [path.name for path in tmp_path.iterdir()] == ["0"]


def test_a_consumer_that_stops_gives_its_places_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A caller whose slice cannot be submitted gives its place back too: others use all of the room."""
    with both("process", tmp_path) as pool:
        for _ in range(6):  # more than there are places
            outcomes = pool.run(linger, tmp_path, "predict", [Slice(index, index + 1) for index in range(4)])
            next(outcomes)
            outcomes.close()
        wait_for(lambda: pool._flying == 0)
        with monkeypatch.context() as patched:
            patched.setattr(ProcessPoolExecutor, "submit", lambda *_: 1 / 0)
            for _ in range(6):
                with pytest.raises(ZeroDivisionError):
                    next(pool.run(square, HERE, "predict", sliced(3)))
        assert len(list(pool.run(square, HERE, "predict", sliced(20)))) == 20


def test_what_a_run_has_one_task_of_ends_it_with_the_error_of_that_task(tmp_path: Path) -> None:
    """Class, cause and remedy are those of the worker's error, also where the cause contains their separator."""
    failure = Failure(30, "it died; nobody knows why", "free memory; run again", stage="choose")

    class Dying:
        def run(self, *_: object) -> Iterator[Outcome]:
            yield Outcome(0, None, executed=True, failure=failure)

        def stop(self) -> None: ...

    with pytest.raises(EnvironmentFault, match=r"^choose: it died; nobody knows why; free memory; run again") as ended:
        shards.once(Dying(), tmp_path / "cases.json", "choose")
    assert ended.value.failure == failure


def test_workers_beyond_the_cores_of_a_job_are_told(caplog: pytest.LogCaptureFixture) -> None:
    """In a job the cores are its own, and not those of the machine."""
    caplog.set_level("WARNING", "wsiflow")
    base = {"kind": "process", "slice_s": 0}
    for count, threads in ((0, 1), (4, 1), (2, 4)):
        _note_shared_cores(ExecutorParams.model_validate(base | {"workers": count, "threads": threads}), 4)
    assert caplog.messages == [
        "executor.workers=2 of executor.threads=4 share 4 cores, which are all that this process may use"
    ]
