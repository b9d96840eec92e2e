"""Run tasks one after another in this process."""

import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Self

from wsiflow.run.executor.params import ExecutorParams
from wsiflow.run.executor.protocol import Outcome, Site, Slice, Work, closed
from wsiflow.system.usage import not_a_worker, now


def make(_params: ExecutorParams, _site: Site) -> "Inline":
    """Return the executor."""
    return Inline()


class Inline:
    """The executor without workers; shards that run side by side take turns, so that one task has the process."""

    def __init__(self) -> None:
        """Let the first task begin."""
        self._turn = threading.Lock()
        self._closed = False

    def __enter__(self) -> Self:
        """Nothing to start."""
        not_a_worker()
        return self

    def __exit__(self, *_exc: object) -> None:
        """Let no task begin any more."""
        self._closed = True

    def stop(self) -> None:
        """Let no task begin any more; the one that is under way cannot be ended."""
        self._closed = True

    def run(self, work: Work, source: Path, stage: str, slices: Sequence[Slice]) -> Iterator[Outcome]:
        """Run each slice in turn."""
        for lo, hi in slices:
            submitted = now()
            with self._turn:
                outcomes = [each for task in range(lo, hi) for each in self._open(work)(source, stage, task, task + 1)]
            yield from (outcome.with_usage(submitted=submitted) for outcome in outcomes)

    def _open(self, work: Work) -> Work:
        """Return the work, unless no more of it is to begin."""
        if self._closed:
            raise closed()
        return work
