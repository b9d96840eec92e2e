"""``wsiflow cancel``: cancel a run's array jobs and its driver, from its folder alone."""

from argparse import ArgumentParser, Namespace
from pathlib import Path

from wsiflow.run.executor import jobs

from ..terminal import say


def add_options(parser: ArgumentParser) -> None:
    """Add the run's folder."""
    parser.add_argument("run", type=Path)


def main(arguments: Namespace) -> int:
    """Cancel the jobs and the driver, and print what was cancelled."""
    for sentence in jobs.cancel(arguments.run):
        say(sentence)
    return 0
