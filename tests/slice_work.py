"""Work for tests of executors; its imports are few, because every worker process imports it."""

import os
import time
from collections.abc import Iterator
from pathlib import Path

from wsiflow.run.executor.protocol import Outcome


def square(_source: Path, _stage: str, lo: int, hi: int) -> Iterator[Outcome]:
    for index in range(lo, hi):
        yield Outcome(index, {"square": index**2, "threads": os.environ["OMP_NUM_THREADS"]}, executed=True)


def die_at_7(source: Path, stage: str, lo: int, hi: int) -> Iterator[Outcome]:
    for index in range(lo, hi):
        if index == 7:
            os._exit(9)
        yield from square(source, stage, index, index + 1)


def tell_pid_and_wait(folder: Path, _stage: str, lo: int, hi: int) -> Iterator[Outcome]:
    for index in range(lo, hi):
        with (folder / f"{index}").open("a") as stream:
            stream.write(f"{os.getpid()}\n")
        time.sleep(0.4)
        yield Outcome(index, {}, executed=True)


def linger(folder: Path, _stage: str, lo: int, hi: int) -> Iterator[Outcome]:
    """Take a moment for each of the first four tasks, and ten minutes for every other."""
    for index in range(lo, hi):
        (folder / str(index)).touch()
        time.sleep(0.1 if index < 4 else 600)
        yield Outcome(index, {}, executed=True)
