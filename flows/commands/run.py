"""``wsiflow run``: the whole line. Hydra reads its arguments: overrides, and options with a help of their own."""

import sys
from argparse import ArgumentParser, Namespace

from .. import compose, run
from ..terminal import say

_HELP = {"-h", "--help"}


def add_options(_parser: ArgumentParser) -> None:
    """Add nothing: Hydra reads the command line."""


def main(arguments: Namespace) -> int:
    """Run the job, or every job of a sweep, or show every key."""
    run.quieten()
    others = [word for word in arguments.words if word not in _HELP]
    if len(others) < len(arguments.words) and not any(word.startswith("-") for word in others):
        say(compose.help_text(others))  # beside options of its own Hydra shows it, which takes seconds longer
        return 0
    sys.argv = ["wsiflow run", *run.as_typed(arguments.words)]
    return run.all_jobs()
