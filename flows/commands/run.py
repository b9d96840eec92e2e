"""``wsiflow run``: the whole line. Hydra reads its arguments: overrides, and options with a help of their own."""

import sys
from argparse import ArgumentParser, Namespace

from .. import run


def add_options(_parser: ArgumentParser) -> None:
    """Add nothing: Hydra reads the command line."""


def main(arguments: Namespace) -> int:
    """Run the job, or every job of a sweep."""
    run.quieten()
    sys.argv = ["wsiflow run", *run.as_typed(arguments.words)]
    return run.all_jobs()
