"""Run tasks one after another in this process."""

import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Self

from wsiflow.executor import Outcome, Work


class Inline:
    """The executor without workers; shards that run side by side take turns, so that one task has the process."""

    def __init__(self) -> None:
        """Let the first task begin."""
        self._turn = threading.Lock()

    def __enter__(self) -> Self:
        """Nothing to start."""
        return self

    def __exit__(self, *_exc: object) -> None:
        """Nothing to stop."""

    def run(self, work: Work, plan_path: Path, stage: str, indices: Sequence[int]) -> Iterator[Outcome]:
        """Run each task in turn."""
        for index in indices:
            with self._turn:
                outcome = work(plan_path, stage, index)
            yield outcome
