"""One protocol for every place where tasks can run.

An executor is a context manager with one method, ``run(work, plan_path, stage, indices)``, which yields an `Outcome`
for each index as it ends, in any order. ``work`` is an importable function; paths and numbers travel, never pixels.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

from pydantic import BaseModel, Field


class ExecutorParams(BaseModel, frozen=True, extra="forbid"):
    """Where tasks run.

    Attributes:
        kind: ``inline`` in this process, ``process`` in a pool of worker processes.
        workers: Worker processes; 0 takes one per core this process may use.
        threads: Threads of each worker's network; part of the numeric class, since it can change the last bits.
    """

    kind: Literal["inline", "process"]
    workers: int = Field(ge=0, le=1024)
    threads: int = Field(ge=1, le=1024)


class Outcome(NamedTuple):
    """How one task ended.

    Attributes:
        task: The task's place in its stage.
        receipt: The receipt of what it published, None where it failed.
        executed: False where it was done already.
        error: What went wrong, in one line.
        exit_code: The error's exit class, 0 where all is well.
    """

    task: int
    receipt: dict[str, Any] | None
    executed: bool
    error: str = ""
    exit_code: int = 0


Work = Callable[[Path, str, int], Outcome]


class Executor(Protocol):
    """Runs tasks of a plan."""

    def run(self, work: Work, plan_path: Path, stage: str, indices: Sequence[int]) -> Iterator[Outcome]:
        """Run ``work`` for each index and yield the outcomes as they come."""
        ...


def make(params: ExecutorParams, *, cores: int) -> AbstractContextManager[Executor]:
    """Return the executor that the parameters name.

    Args:
        params: The choice.
        cores: Cores this process may use.
    """
    from wsiflow.executor.inline import Inline
    from wsiflow.executor.process import ProcessPool

    workers = worker_count(params, cores=cores)
    if params.kind == "inline":
        return Inline()
    return ProcessPool(workers, threads=params.threads)


def worker_count(params: ExecutorParams, *, cores: int) -> int:
    """Return how many tasks run at a time."""
    return 1 if params.kind == "inline" else params.workers or cores
