"""Executors: one protocol for every place where tasks can run.

An executor is a context manager with a method ``run(work, source, stage, slices)``. A slice is a range of the tasks of
a stage; a worker process, a Dask future or an element of an array job works through it. ``run`` yields an `Outcome` for
every task as it ends, in any order. ``work`` is an importable function; only paths and numbers are sent, never pixels.

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

# Loaded when they are first used: an element of an array job needs few of them, and has to start quickly.
__getattr__, __dir__, _ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "factory": ["make"],
        "params": ["DaskParams", "ExecutorParams", "worker_count"],
        "protocol": ["Executor", "Outcome", "Slice", "Work", "closed"],
    },
)
