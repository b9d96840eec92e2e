"""One protocol for every place where tasks can run.

An executor is a context manager with one method, ``run(work, source, stage, slices)``. A slice is a range of a stage's
tasks, what a pool item, a Dask future or an array job's element works through; ``run`` yields an `Outcome` for every
task as it ends, in any order. ``work`` is an importable function; paths and numbers travel, never pixels.

Each kind of executor has a file, and a line in the table of `wsiflow.run.executor.kinds`.
"""

from typing import TYPE_CHECKING

import lazy_loader

if TYPE_CHECKING:
    from wsiflow.run.executor.factory import make
    from wsiflow.run.executor.params import DaskParams, ExecutorParams, worker_count
    from wsiflow.run.executor.protocol import Executor, Outcome, Slice, Work, closed

__all__ = [
    "DaskParams",
    "Executor",
    "ExecutorParams",
    "Outcome",
    "Slice",
    "Work",
    "closed",
    "make",
    "worker_count",
]

# Loaded by whoever asks first: an element of an array job needs little of it, and that at once.
__getattr__, __dir__, _ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "factory": ["make"],
        "params": ["DaskParams", "ExecutorParams", "worker_count"],
        "protocol": ["Executor", "Outcome", "Slice", "Work", "closed"],
    },
)
