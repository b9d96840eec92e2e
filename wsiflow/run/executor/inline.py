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
    """The executor without workers; several threads may call `run`, and their tasks take turns."""

    def __init__(self) -> None:
        """Create the executor; nothing is started."""
        self._turn = threading.Lock()
        self._closed = False

    def __enter__(self) -> Self:
        """Record that tasks run in the process of the driver, see `wsiflow.system.usage.not_a_worker`."""
        not_a_worker()
        return self

    def __exit__(self, *_exc: object) -> None:
        """Start no more tasks."""
        self._closed = True

    def stop(self) -> None:
        """Start no more tasks; a running task cannot be ended."""
        self._closed = True

    def run(self, work: Work, source: Path, stage: str, slices: Sequence[Slice]) -> Iterator[Outcome]:
        """Run the slices one after another.

        Raises:
            EnvironmentFault: The executor was closed.
        """
        for part in slices:
            submitted = now()
            with self._turn:
                outcomes = [each for task in part.tasks for each in self._open(work)(source, stage, task, task + 1)]
            yield from (outcome.with_usage(submitted=submitted) for outcome in outcomes)

    def _open(self, work: Work) -> Work:
        """Return the work, unless the executor was closed."""
        if self._closed:
            raise closed()
        return work
