"""Executors: every task once, and a task that kills its worker fails alone."""

import os
from pathlib import Path

import pytest

from wsiflow import executor
from wsiflow.executor import ExecutorParams, Outcome

HERE = Path(__file__)


def square(_plan: Path, _stage: str, index: int) -> Outcome:
    return Outcome(index, {"square": index**2}, executed=True)


def die_at_7(_plan: Path, _stage: str, index: int) -> Outcome:
    if index == 7:
        os._exit(9)
    return square(_plan, _stage, index)


@pytest.mark.parametrize("kind", ["inline", "process"])
def test_every_task_ends_once(kind: str) -> None:
    """Twenty tasks give twenty outcomes, whatever runs them."""
    with executor.make(ExecutorParams(kind=kind, workers=2, threads=1), cores=2) as pool:
        outcomes = sorted(pool.run(square, HERE, "stage", range(20)))
    assert [(o.task, o.receipt) for o in outcomes] == [(i, {"square": i**2}) for i in range(20)]


def test_a_task_that_kills_its_worker_fails_alone() -> None:
    """Its neighbours are tried again and succeed; it is named with the reason, and the pool goes on."""
    with executor.make(ExecutorParams(kind="process", workers=2, threads=1), cores=2) as pool:
        outcomes = sorted(pool.run(die_at_7, HERE, "predict", range(12)))
        assert [o.task for o in outcomes if o.receipt is None] == [7]
        assert "worker process died" in outcomes[7].error
        assert outcomes[7].exit_code == 30
        assert len(list(pool.run(square, HERE, "predict", range(3)))) == 3


@pytest.mark.parametrize(("kind", "workers", "expected"), [("inline", 5, 1), ("process", 0, 3), ("process", 2, 2)])
def test_workers_follow_the_cores_unless_told(kind: str, workers: int, expected: int) -> None:
    """Zero means one worker per core this process may use."""
    assert executor.worker_count(ExecutorParams(kind=kind, workers=workers, threads=1), cores=3) == expected
