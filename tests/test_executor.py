"""Executors: every task once, and a task that kills its worker fails alone."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from wsiflow import executor, shards
from wsiflow.errors import EnvironmentFault
from wsiflow.executor import ExecutorParams, Outcome, Slice

HERE = Path(__file__)


def square(_plan: Path, _stage: str, lo: int, hi: int) -> Iterator[Outcome]:
    for index in range(lo, hi):
        yield Outcome(index, {"square": index**2}, executed=True)


def die_at_7(_plan: Path, _stage: str, lo: int, hi: int) -> Iterator[Outcome]:
    for index in range(lo, hi):
        if index == 7:
            os._exit(9)
        yield from square(_plan, _stage, index, index + 1)


def params(kind: str, workers: int = 2) -> ExecutorParams:
    return ExecutorParams(kind=kind, workers=workers, threads=1, slice_s=0)


def sliced(count: int) -> list[Slice]:
    return [Slice(lo, min(lo + 3, count)) for lo in range(0, count, 3)]


@pytest.mark.parametrize("kind", ["inline", "process"])
def test_every_task_ends_once(kind: str) -> None:
    """Twenty tasks give twenty outcomes, whatever runs them."""
    with executor.make(params(kind), cores=2, root=HERE.parent) as pool:
        outcomes = sorted(pool.run(square, HERE, "stage", sliced(20)), key=lambda outcome: outcome.task)
    assert [(o.task, o.receipt) for o in outcomes] == [(i, {"square": i**2}) for i in range(20)]


def test_a_task_that_kills_its_worker_fails_alone() -> None:
    """Its neighbours are tried again and succeed; it is named with the reason, and the pool goes on."""
    with executor.make(params("process"), cores=2, root=HERE.parent) as pool:
        attempts = list(pool.run(die_at_7, HERE, "predict", sliced(12)))
        outcomes = {o.task: o for o in attempts if not o.retried}
        assert sorted(outcomes) == list(range(12))
        assert [o.task for o in outcomes.values() if o.receipt is None] == [7]
        assert "worker process died" in outcomes[7].error
        assert outcomes[7].exit_code == 30
        assert {o.task for o in attempts if o.retried} >= {6, 7, 8}, "lost attempts are told"
        assert len(list(pool.run(square, HERE, "predict", sliced(3)))) == 3


@pytest.mark.parametrize(("kind", "workers", "expected"), [("inline", 5, 1), ("process", 0, 3), ("process", 2, 2)])
def test_workers_follow_the_cores_unless_told(kind: str, workers: int, expected: int) -> None:
    """Zero means one worker per core this process may use."""
    assert executor.worker_count(params(kind, workers), cores=3) == expected


def test_a_worker_that_died_without_a_word_has_cause_and_remedy(tmp_path: Path) -> None:
    """What a run has only one task of ends it: the line begins with the cause, whatever the executor said."""

    class Dying:
        def run(self, *_: object) -> Iterator[Outcome]:
            yield Outcome(0, None, executed=True, error="choose: the worker died", exit_code=30)

        def stop(self) -> None: ...

    with pytest.raises(EnvironmentFault, match=r"^choose: the worker died; free memory"):
        shards.once(Dying(), tmp_path / "cases.json", "choose")
