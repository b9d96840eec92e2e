"""``wsiflow cancel``: cancel a run's jobs and its driver, from its folder alone."""

from argparse import ArgumentParser, Namespace
from pathlib import Path

from wsiflow.run.executor import dask_jobs, jobs

from ..terminal import say


def add_options(parser: ArgumentParser) -> None:
    """Add the run's folder."""
    parser.add_argument("run", type=Path)


def main(arguments: Namespace) -> int:
    """Cancel the jobs and the driver, and print what was cancelled."""
    sentences = dask_jobs.cancel(arguments.run)
    if not sentences or (arguments.run / jobs.LOG).exists():
        sentences += jobs.cancel(arguments.run)
    for sentence in sentences:
        say(sentence)
    return 0
