"""``wsiflow explain``: why a task of a run is done, or is not, and every attempt at it."""

from argparse import ArgumentParser, Namespace
from pathlib import Path

from wsiflow.run.executor import waiting
from wsiflow.run.explain import explain

from ..terminal import say


def add_options(parser: ArgumentParser) -> None:
    """Add the run's folder and the task."""
    parser.add_argument("run", type=Path)
    parser.add_argument("task", nargs="+", help="as trace.csv names it: stage, slide, group; or a slide alone")


def main(arguments: Namespace) -> int:
    """Print what is known of the task."""
    try:
        for line in explain(arguments.run, arguments.task):
            say(line)
    finally:  # there may be no plan, because the first array waits
        for line in waiting.describe(arguments.run):
            say(line)
    return 0
